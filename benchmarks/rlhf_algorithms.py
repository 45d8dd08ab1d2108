"""GRPO, RLOO, PPO and REINFORCE++ on the playground, from the same fine-tuned policy and the same reward model.

    python benchmarks/rlhf_algorithms.py --root FOLDER                 # all four, one after the other
    python benchmarks/rlhf_algorithms.py --root FOLDER --only ppo      # what is there already is only read
    python benchmarks/rlhf_algorithms.py --root FOLDER --prompts 1600  # as long as the recipe itself

GRPO comes first, with nothing but its preset: `python -m lightning_pref.recipes.rlhf --preset grpo` trains the policy and the
reward model on the way. The others start from these two with the same settings of the playground and their own preset. All see
the same prompts once, 16 in a rollout. Printed is the gold reward of answers to held-out prompts before and after (a mean over
64 of them), the KL to the start per response, the mean length, the alerts that were raised, and how long it took, the stages
before not counted.

One thread each, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_pref.cli import CONFIGS
from lightning_pref.recipes.rlhf import PRESETS

FIRST = "grpo"
ALGORITHMS = (FIRST, "rloo", "ppo", "reinforce_pp")


def stage(root: Path, name: str) -> Path:
    """The folder of a stage that the first run has trained."""
    return root / name / f"for-rlhf-{FIRST}"


def flags_of(algorithm: str, root: Path, seed: int, prompts: int) -> list[str]:
    """The command line of one run; all but the first start from the stages of that."""
    common = [
        f"--run.root={root}",
        f"--run.name={algorithm}",
        f"--seed_everything={seed}",
        f"--data.playground.num_rows={prompts}",
    ]
    if algorithm == FIRST:
        return [f"--preset={algorithm}", *common]
    return [
        # The defaults of the playground are looked up by the name of a preset, which the fine-tuned model has no more.
        f"--config={CONFIGS / 'rlhf_playground.yaml'}",
        f"--config={PRESETS / algorithm}.yaml",
        f"--model.model={stage(root, 'sft') / 'export'}",
        f"--data.reward={stage(root, 'reward') / 'export'}",
        *common,
    ]


def finished(algorithm: str, root: Path, seed: int, prompts: int) -> Path:
    """The folder of a finished run, which is run now if it is not there."""
    folder = root / "rlhf" / algorithm
    if not (folder / "summary.json").exists():
        print(f"{algorithm}, into {folder}", flush=True)
        # What an interrupted run has left.
        left = [folder, *([stage(root, "sft"), stage(root, "reward")] if algorithm == FIRST else [])]
        for each in left:
            shutil.rmtree(each, ignore_errors=True)
        done = subprocess.run(  # noqa: S603  # this package
            [sys.executable, "-m", "lightning_pref.recipes.rlhf", *flags_of(algorithm, root, seed, prompts)],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{algorithm} failed:\n{done.stderr[-4000:]}")
    return folder


def summary_of(folder: Path) -> dict[str, Any]:  # Any: as in `summary.json`
    """What a finished run says of itself."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def alerts_of(folder: Path) -> str:
    """The names of the alerts of a run, each once."""
    file = folder / "alerts.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return ", ".join(dict.fromkeys(f"`{json.loads(line)['name']}`" for line in lines)) or "none"


def row(algorithm: str, root: Path, folder: Path) -> str:
    """One line of the table."""
    summary = summary_of(folder)
    metrics, seconds = summary["metrics"], float(summary["seconds"])
    if algorithm == FIRST:
        seconds -= sum(float(summary_of(stage(root, name))["seconds"]) for name in ("sft", "reward"))
    gold, kl, length = (metrics[name] for name in ("gold_reward", "kl", "response/length"))
    worth = f"{gold['first']:.3f} | {gold['last']:.3f} | {kl['last']:.1f} | {length['last']:.1f}"
    return f"| `{algorithm}` | {worth} | {alerts_of(folder)} | {seconds:.0f} |"


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for and print a Markdown table."""
    parser = argparse.ArgumentParser(description="Four policy-gradient algorithms on the playground.")
    parser.add_argument("--root", type=Path, required=True, help="folder above all runs")
    parser.add_argument("--only", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--prompts", type=int, default=800, help="that the policy is trained on, once each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    root = args.root.absolute()
    names = [name for name in ALGORITHMS if name in args.only]
    if not (stage(root, "reward") / "export").exists() and FIRST not in names:
        names.insert(0, FIRST)  # the others start from its stages
    rows = [row(name, root, finished(name, root, args.seed, args.prompts)) for name in names]
    print("| algorithm | gold before | gold after | KL | length | alerts | seconds |")
    print("|---" * 7 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
