"""Writes docs/losses.md from the registry: every loss, its formula, its source, its defaults, and what others call it.

Run it from anywhere: `python docs/make_losses.py`. With `--check` nothing is written; it fails where the page is out of date.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from pathlib import Path

from lightning_pref.losses import FORGET_LOSSES, GROUP_LOSSES, PREFERENCE_LOSSES, UNPAIRED_LOSSES, LossSpec
from lightning_pref.losses.spec import Length

PAGE = Path(__file__).resolve().parent / "losses.md"

LENGTHS: dict[Length, str] = {
    "sum": "sums over tokens",
    "mean": "means over tokens",
    "mixed": "sums over tokens, and one part that counts them",
    "option": "means over tokens, or sums with `length_normalize=False`",
}

INTRODUCTION = """\
# Losses

Written by `docs/make_losses.py` from `lightning_pref/losses/registry.py`; edit there.

```python
from lightning_pref.losses import LossMix, PairLogps, implicit_rewards, preference_loss, sensitivities

pair = PairLogps(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)  # sums of log-probs, [B] each
losses = preference_loss("sigmoid", pair, beta=0.1)  # [B], not reduced
rewards = implicit_rewards("sigmoid", pair, beta=0.1)  # what the loss compares: log these
d_c, d_r = sensitivities("sigmoid", pair, beta=0.1)  # -dL/dS_c and dL/dS_r: how hard it pulls and pushes
losses = preference_loss(LossMix([("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)]), pair)
```

An unknown name, an option that the loss does not have, and a missing input raise. A function `(pair, *, options) -> [B]` of
your own goes wherever a name does.

## Symbols

| symbol | meaning |
|---|---|
| `S`, `R` | log-probability of a response under the policy and the reference, summed over its tokens, in nats |
| `n`, `s` | number of response tokens; `s = S / n` |
| `h`, `z` | `h = S - R`; `z = h_c - h_r` |
| `_c`, `_r` | chosen, rejected |
| `eps` | the option `label_smoothing` |
| `phi` | what the option `f_divergence` makes of `h`: `reverse_kl` `h`, `forward_kl` `1 - exp(-h)`, `js_divergence` \
`log 2 + log sigmoid(h)`, a number `a` `(exp((a - 1) h) - 1) / (a - 1)`. It replaces `h` in every loss that has the option |
| `softplus(u)` | `log(1 + exp(u))`, so that `softplus(-u) = -log sigmoid(u)` |

Log-probs in half precision are widened to float32 first. All losses stay finite at margins of 10,000 nats; exponentials go on as
their tangent beyond `exp(30)`, which no healthy run reaches.

Not losses of their own: **LD-DPO** changes the sums (`length_decoupled_sums`, for policy and reference both), **WPO**
multiplies the losses (`wpo_weights`), **TR-DPO** moves the reference. **Losses as logic**: `PreferenceStructure` and
`compile_structure` make a loss from a truth table.
"""

SECTIONS: dict[str, tuple[str, Mapping[str, LossSpec]]] = {
    "Pairs": ("`preference_loss(name, pair, **options)`, one loss per pair.", PREFERENCE_LOSSES),
    "Labelled responses": (
        "`kto(logps, ref_logps, desirable, **options)` and its kin, one loss per response; `baseline` comes from `kto_baseline`.",
        UNPAIRED_LOSSES,
    ),
    "Responses to forget": (
        "`npo(logps, ref_logps, **options)` and `simnpo(logps, lengths, **options)`, one loss per response.",
        FORGET_LOSSES,
    ),
    "Ranked responses of one prompt": (
        "`align(scores, ranks, mask)` and its kin, one loss per prompt; `scores` are means over tokens.",
        GROUP_LOSSES,
    ),
}


def page() -> str:
    """The whole page as text."""
    parts = [INTRODUCTION]
    for title, (introduction, losses) in SECTIONS.items():
        parts.append(f"## {title}\n\n{introduction}\n")
        parts += [entry(name, spec) for name, spec in losses.items()]
    return "\n".join(parts)


def entry(name: str, spec: LossSpec) -> str:
    """One loss: its formula, then a list of what is known of it."""
    lines = [
        f"### `{name}`\n",
        f"{inspect.getdoc(spec.fn) or ''}".partition("\n\n")[0].replace("\n", " ") + "\n",
        f"`{spec.formula}`\n",
        f"- Source: {spec.source}.",
        f"- Options: {', '.join(option(*item) for item in spec.options.items()) or 'none'}.",
        f"- Reference: {'needed' if spec.needs_reference else 'none'}. Length: {LENGTHS[spec.length]}.",
    ]
    if spec.num_coupled > 1:
        lines.append(
            f"- Couples the examples of a micro-batch: give it {spec.num_coupled} or more, and no weights of single examples."
        )
    if spec.peers:
        lines.append(f"- Elsewhere: {spec.peers}")
    return "\n".join(lines) + "\n"


def option(name: str, default: object) -> str:
    """An option with its default."""
    return f"`{name}` (required)" if default is inspect.Parameter.empty else f"`{name}={default!r}`"


def main() -> None:
    """Write the page, or only compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date, and write nothing")
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text() != page():
            raise SystemExit("docs/losses.md is out of date; run `python docs/make_losses.py`.")
        return
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
