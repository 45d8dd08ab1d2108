"""Writes docs/pitfalls.md: each known pitfall, who was bitten by it, and the test here that would catch it.

Run it from anywhere: `python docs/make_pitfalls.py`. With `--check` nothing is written; it fails where the page is out of date.
The column of tests is read off the names `test_<ID>_<sentence>` under tests/, so it lists what exists and nothing else.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "pitfalls.md"

REPOSITORIES = {
    "AReaL": "inclusionAI/AReaL",
    "DeepSeek-R1": "deepseek-ai/DeepSeek-R1",
    "GRM": "YangRui2015/Generalizable-Reward-Model",
    "LLaMA-Factory": "hiyouga/LLaMA-Factory",
    "Lightning": "Lightning-AI/pytorch-lightning",
    "Liger": "linkedin/Liger-Kernel",
    "NeMo-Aligner": "NVIDIA/NeMo-Aligner",
    "NeMo-RL": "NVIDIA-NeMo/RL",
    "OpenRLHF": "OpenRLHF/OpenRLHF",
    "ROLL": "alibaba/ROLL",
    "VeOmni": "ByteDance-Seed/VeOmni",
    "bitsandbytes": "bitsandbytes-foundation/bitsandbytes",
    "ms-swift": "modelscope/ms-swift",
    "open-instruct": "allenai/open-instruct",
    "open-r1": "huggingface/open-r1",
    "prime-rl": "PrimeIntellect-ai/prime-rl",
    "reward-bench": "allenai/reward-bench",
    "torchtune": "meta-pytorch/torchtune",
    "transformers": "huggingface/transformers",
    "trl": "huggingface/trl",
    "unsloth": "unslothai/unsloth",
    "verl": "volcengine/verl",
}


class Pitfall(NamedTuple):
    """One way to be silently wrong. `bitten` names threads as repository#number, separated by blanks."""

    id: str
    what: str
    bitten: str = ""


SECTIONS: dict[str, list[Pitfall]] = {
    "Tokens, templates, truncation": [
        Pitfall("T1", "The end-of-text token is masked out because it is also the padding token", "trl#6357 trl#3200 trl#1623"),
        Pitfall("T2", "Padding id 0 is a real token of the vocabulary", "trl#1284 trl#1692"),
        Pitfall("T3", "The template writes a BOS and the tokenizer adds another", "OpenRLHF#393 open-r1#462 prime-rl#367 GRM#6"),
        Pitfall("T4", "The chat template prints today's date, so tokens change overnight"),
        Pitfall("T5", "The templated prompt is no prefix of the templated conversation", "trl#6433"),
        Pitfall("T6", "The tokenizer merges the end of the prompt with the start of the response"),
        Pitfall("T7", "Conversations end with two EOS, or with a newline after it", "trl#4908"),
        Pitfall("T8", "A truncated response is given an EOS it never had"),
        Pitfall(
            "T9", "Truncation leaves an empty response, and its mean is NaN", "trl#6548 trl#3382 trl#3398 open-instruct#1685"
        ),
        Pitfall("T10", "The length filter looks at the chosen response only", "open-instruct#1597"),
        Pitfall("T11", "Chosen and rejected are equal once truncated, so the pair teaches nothing"),
        Pitfall("T12", "Taking the common prefix as prompt swallows the first token of the answers"),
        Pitfall("T13", "Embedding rows that only pad the vocabulary are counted by one path and not by another", "verl#5349"),
    ],
    "Log-probabilities": [
        Pitfall("L1", "Logits and labels are shifted against each other by one"),
        Pitfall("L2", "Prompt tokens leak into the sum over the response"),
        Pitfall("L3", "Long sums are accumulated in bfloat16", "OpenRLHF#620"),
        Pitfall("L4", "Where logits are cast up, and at what cost of memory", "trl#1980 trl#5926 LLaMA-Factory#10720"),
        Pitfall("L5", "A fused head forgets soft-cap, logit scale, bias, tied weights or LoRA", "trl#7063 Liger#1082"),
        Pitfall("L6", "A fused or cached path drops an option of the loss"),
        Pitfall("L7", "Packed documents attend to one another, or their positions do not restart", "trl#4170"),
        Pitfall("L8", "Results depend on the padding side", "trl#2778 transformers#35352"),
        Pitfall("L9", "A row's score depends on the rows beside it", "reward-bench#137"),
        Pitfall("L10", "Dividing by a temperature changes the logits of the caller", "trl#6554"),
        Pitfall("L13", "Entropy is averaged over padding or prompt tokens", "trl#3833 trl#3964 trl#3715 trl#5620"),
        Pitfall("L14", "The estimate of the KL has a wrong sign or gradient: descending it does not reduce the KL", "verl#2953"),
    ],
    "Reference model": [
        Pitfall("R1", "Policy and reference differ before the first step", "NeMo-Aligner#227"),
        Pitfall("R2", "Dropout is on while the reference is computed", "trl#5542"),
        Pitfall("R3", "Evaluation takes the trained policy for the reference", "trl#6443"),
        Pitfall("R4", "Missing reference log-probs default to 0", "trl#5563"),
        Pitfall("R5", "Cached reference log-probs of another model, template, dataset or precision are used"),
        Pitfall(
            "R6", "Switching the adapter off leaves a wrong adapter on, or trains the reference", "verl#4675 LLaMA-Factory#10514"
        ),
        Pitfall("R7", "The model is called past its DDP wrapper, and the ranks drift apart", "trl#7245"),
        Pitfall("R8", "The reference is not split as the policy is, or not at all", "trl#1147 trl#2539"),
        Pitfall("R9", "The reference moves while its cached log-probs do not"),
        Pitfall("R10", "A loss without a reference still pays for one"),
    ],
    "Formulas of losses": [
        Pitfall("F1", "A formula is not that of its paper"),
        Pitfall("F2", "Sum or mean over tokens, with the same name for both"),
        Pitfall("F3", "log(1 + exp(x)) overflows at large margins"),
        Pitfall("F4", "An option is accepted and changes nothing"),
        Pitfall("F5", "A (B, 1) margin broadcasts a (B,) loss to B x B"),
        Pitfall("F6", "log(1 - p) of the odds ratio is infinite as p goes to 1"),
        Pitfall("F7", "The baseline of KTO: which pairs, detached, never below 0, equal on all ranks"),
        Pitfall("F8", "Unlearning diverges instead of levelling off"),
    ],
    "Reward models": [
        Pitfall(
            "W1",
            "The reward is read at a padding token, or at the last token of the batch",
            "transformers#35352 trl#937 trl#2778 trl#7318",
        ),
        Pitfall("W2", "The head of the reward model differs over ranks, is in half precision, or is lost with the adapter"),
        Pitfall("W3", "A constant reward counts as an accuracy of 50 % or 100 %, and nobody is told"),
        Pitfall("W4", "Centring and margin change what an offset of all rewards may not change"),
        Pitfall("W5", "The exported reward model scores otherwise in plain transformers"),
        Pitfall("W6", "Step labels sit one token beside the separator"),
    ],
    "RLHF": [
        Pitfall("L11", "Top-p or top-k is applied when sampling and not in the ratio", "trl#6789 trl#6945 open-instruct#1678"),
        Pitfall("L12", "The ratio of the first inner step is not 1"),
        Pitfall("N4", "Whitened advantages blow up: one sample, no spread, other ranks left out", "ROLL#475 verl#6497 trl#2665"),
        Pitfall("P1", "Values bootstrap past the end of a response, or not past a truncation"),
        Pitfall("P2", "The reward lands on a padding token", "trl#3750 trl#1893"),
        Pitfall("P3", "Clip, normalisation and missing-EOS penalty of the score come in any order"),
        Pitfall("P4", "Generation leaves eval mode, cache or random state behind"),
        Pitfall("P5", "Old log-probs are refreshed between inner epochs, or shuffled against their tokens"),
        Pitfall("P6", "The value loss is clipped on one side only, or normalised per micro-batch", "verl#6957"),
        Pitfall("P7", "The samples of one prompt are split over ranks before their statistics are taken"),
    ],
    "Normalisation": [
        Pitfall(
            "N1",
            "Accumulated micro-batches weigh short and long rows otherwise than one large batch",
            "transformers#34191 transformers#35856 trl#2175 ms-swift#10117 unsloth#8261 Lightning#20350",
        ),
        Pitfall("N2", "Ranks with unequal rows weigh them otherwise than one process with all of them"),
        Pitfall("N3", "The global token count is known only after the backward pass that needs it"),
        Pitfall(
            "N5",
            "Metrics are means of means, local to a rank, or count padding rows twice",
            "VeOmni#1130 trl#7010 Lightning#21838",
        ),
        Pitfall("N6", "Gradients are clipped per micro-batch, or before they are unscaled"),
        Pitfall("N7", "Gradients are lost or shrunk where an engine and the trainer both accumulate them", "open-instruct#1498"),
    ],
    "Optimisation": [
        Pitfall("O1", "An update that the fp16 loss scaler skips still advances counters, schedules and monitors"),
        Pitfall(
            "O2",
            "Weights in bfloat16 swallow updates that are smaller than their rounding",
            "NeMo-RL#2322 torchtune#2254 AReaL#1634",
        ),
        Pitfall("O3", "Zeroing quantised optimiser state leaves codes that mean a large momentum", "bitsandbytes#2080"),
        Pitfall("O4", "A reset of moments forgets step counter, amsgrad maximum, sharded or fused state"),
        Pitfall("O5", "Checkpointed blocks see an input without gradient, and the adapters inside them never learn", "trl#2514"),
        Pitfall("O6", "Ranks decide for themselves whether a step was a spike, and drift apart"),
        Pitfall("O7", "The detector learns from the spike and misses the next one"),
    ],
    "Resume": [
        Pitfall(
            "C1",
            "An interrupted and resumed run ends elsewhere than one in one go",
            "ms-swift#9935 Lightning#18780 Lightning#19764",
        ),
        Pitfall("C2", "A checkpoint in the middle of a window of accumulation loses half a gradient"),
        Pitfall("C3", "Asking for the length of the run forgets where the loaders were", "Lightning#20550"),
        Pitfall("C4", "A checkpoint of an adapter alone is loaded into nothing, and nobody says so"),
        Pitfall("C5", "A callback's state is saved and never loaded, or loaded and never tested"),
        Pitfall("C6", "On another number of processes rows are left out or come twice"),
        Pitfall("C7", "A crash while a checkpoint is written takes the former one along"),
    ],
    "Monitors": [
        Pitfall("M1", "CHES sums padding, drops the wrong column, or divides by the padded length"),
        Pitfall("M2", "Displacement is measured without the value from before training"),
        Pitfall("M3", "Two variances of the reward under one name: per prompt or pooled, raw or whitened"),
        Pitfall("M4", "Evaluating changes the training: random state, dropout, batch norm, gradients"),
        Pitfall("M5", "A monitor waits for the device in every step"),
        Pitfall("M6", "A collective in a branch that only some ranks take hangs the run"),
    ],
}

PREAMBLE = """# Pitfalls

Ways in which preference training has gone silently wrong, and what guards against each here. The threads are where
others met the problem or discussed it; whether it has been fixed there since was not checked. The last column names the tests of
this repository that fail if the mistake is made.

This page is written by `docs/make_pitfalls.py`; edit that file.
"""

TEST_NAME = re.compile(r"^def (test_([A-Z]\d+)_\w+)\(", re.MULTILINE)


def find_tests(folder: Path) -> dict[str, list[str]]:
    """Tests by pitfall id, each as `file::name`, in order of file and line."""
    found = defaultdict(list)
    for file in sorted(folder.rglob("test_*.py")):
        for name, pitfall in TEST_NAME.findall(file.read_text(encoding="utf-8")):
            found[pitfall].append(f"{file.relative_to(ROOT).as_posix()}::{name}")
    return dict(found)


def link(thread: str) -> str:
    """A thread as a Markdown link.

    >>> link("trl#6357")
    '[trl#6357](https://github.com/huggingface/trl/issues/6357)'
    """
    project, number = thread.split("#")
    return f"[{thread}](https://github.com/{REPOSITORIES[project]}/issues/{number})"


def rows(pitfalls: Iterable[Pitfall], tests: dict[str, list[str]]) -> list[str]:
    """The lines of one section's table."""
    lines = ["| | pitfall | who was bitten | our test |", "|---|---|---|---|"]
    for pitfall in pitfalls:
        bitten = ", ".join(link(thread) for thread in pitfall.bitten.split())
        named = "<br>".join(f"`{test}`" for test in tests.get(pitfall.id, [])) or "none yet"
        lines.append(f"| {pitfall.id} | {pitfall.what} | {bitten} | {named} |")
    return lines


def page(tests: dict[str, list[str]]) -> str:
    """The whole page."""
    known = {pitfall.id for pitfalls in SECTIONS.values() for pitfall in pitfalls}
    if unknown := sorted(set(tests) - known):
        raise SystemExit(f"Tests are named after {unknown}, which docs/make_pitfalls.py does not list; add a row or rename them.")
    parts = [PREAMBLE]
    for title, pitfalls in SECTIONS.items():
        parts.append("\n".join(["", f"## {title}", "", *rows(pitfalls, tests), ""]))
    return "".join(parts)


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description="Write docs/pitfalls.md from the names of the tests.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    text = page(find_tests(ROOT / "tests"))
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit("docs/pitfalls.md is out of date; run `python docs/make_pitfalls.py` and commit the result.")


if __name__ == "__main__":
    main()
