"""GRPO, RLOO, PPO and REINFORCE++ on the playground, from the same fine-tuned policy and the same reward model.

    python benchmarks/rlhf_algorithms.py --root FOLDER                 # all four, one after the other
    python benchmarks/rlhf_algorithms.py --root FOLDER --only ppo      # what is there already is only read

GRPO comes first, with nothing but its preset: `python -m lightning_pref.recipes.rlhf --preset grpo` trains the policy and the
reward model on the way. The others start from these two with the same settings of the playground and their own preset. Printed
is the gold reward of answers to held-out prompts before and after (a mean over 64 of them), the KL to the start per response,
the mean length, and what the over-optimisation monitor said.

One thread each, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_pref.cli import CONFIGS
from lightning_pref.recipes.rlhf import PRESETS

FIRST = "grpo"
ALGORITHMS = (FIRST, "rloo", "ppo", "reinforce_pp")


def flags_of(algorithm: str, root: Path, seed: int) -> list[str]:
    """The command line of one run; all but the first start from the stages of that."""
    where = [f"--run.root={root}", f"--run.name={algorithm}", f"--seed_everything={seed}"]
    if algorithm == FIRST:
        return [f"--preset={algorithm}", *where]
    stages = {name: root / name / f"for-rlhf-{FIRST}" / "export" for name in ("sft", "reward")}
    return [
        f"--config={CONFIGS / 'rlhf_playground.yaml'}",
        f"--config={PRESETS / algorithm}.yaml",
        f"--model.model={stages['sft']}",
        f"--data.reward={stages['reward']}",
        *where,
    ]


def summary_of(algorithm: str, root: Path, seed: int) -> dict[str, Any]:  # Any: as in `summary.json`
    """The summary of a run, which is made now if it is not there."""
    file = root / "rlhf" / algorithm / "summary.json"
    if not file.exists():
        print(f"{algorithm}, into {file.parent}", flush=True)
        done = subprocess.run(  # noqa: S603  # this package
            [sys.executable, "-m", "lightning_pref.recipes.rlhf", *flags_of(algorithm, root, seed)],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{algorithm} failed:\n{done.stderr[-4000:]}")
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return summary


def row(algorithm: str, summary: dict[str, Any]) -> str:  # Any: as above
    """One line of the table."""
    metrics = summary["metrics"]
    gold, kl, length = (metrics[name] for name in ("gold_reward", "kl", "response/length"))
    cells = (gold["first"], gold["last"], kl["last"], length["last"])
    return f"| {algorithm} | {' | '.join(f'{cell:.3f}' for cell in cells)} | {summary['alerts']} | {summary['seconds']:.0f} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Four policy-gradient algorithms on the playground.")
    parser.add_argument("--root", type=Path, required=True, help="folder above all runs")
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    root = args.root.absolute()
    names = [name for name in ALGORITHMS if name in args.only]
    if not (root / "reward" / f"for-rlhf-{FIRST}" / "export").exists() and FIRST not in names:
        names.insert(0, FIRST)  # the others start from its stages
    rows = [row(name, summary_of(name, root, args.seed)) for name in names]
    print("| algorithm | gold before | gold after | KL | length | alerts | seconds of the last stage |")
    print("|---" * 7 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
