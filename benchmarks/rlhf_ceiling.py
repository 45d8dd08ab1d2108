"""How close `python -m lightning_pref.recipes.rlhf` comes to the best attainable gold reward of the playground, seed by seed.

    python benchmarks/rlhf_ceiling.py --root FOLDER                # seeds 0, 1 and 2
    python benchmarks/rlhf_ceiling.py --root FOLDER --seeds 3 4    # more; what is there already is only read

Two runs for each seed. The first is the recipe with nothing but the seed: supervised fine-tuning, a reward model, and RLHF on
that. The second is its last stage again, from the same fine-tuned policy, on the gold reward itself: what those rollouts attain
where the reward is never wrong, the ceiling. It has the weaker tie to the start that suits a reward that cannot be exploited.

The script then samples one answer of the fine-tuned policy and of both results to each of the same held-out prompts, many more
than the recipe's own curve has, and prints their mean gold rewards; `share` is learned / ceiling. The absolute best is the mean
of an answer with all its parts right to every prompt.

Processor time is of all threads together. One thread each, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import NamedTuple

from lightning_pref.cli import CONFIGS
from lightning_pref.data.playground import gold_reward, playground_rows
from lightning_pref.data.playground_text import draw_marks, read_request, write_answer
from lightning_pref.models.backbones import load_model, load_tokenizer
from lightning_pref.models.generation import sample_responses

LEARNED, GOLD = "learned", "gold"
ON_GOLD = ("--data.reward=playground:gold", "--model.kl.coefficient=0.04")
MAX_NEW_TOKENS = 48


class Row(NamedTuple):
    """One seed."""

    seed: int
    start: float
    learned: float
    ceiling: float
    kl: float
    kl_on_gold: float
    seconds: float  # of the processor

    @property
    def share(self) -> float:
        """What is attained, of what can be."""
        return self.learned / self.ceiling


def trained(root: Path, seed: int, name: str, *flags: str) -> Path:
    """The folder of a finished run of the recipe, which is run now if it is not there."""
    folder = root / "rlhf" / name
    if not (root / f"{name}.json").exists():
        print(f"seed {seed}: {name}, into {folder}", flush=True)
        # What an interrupted run has left: its own folder, and those of its first stages.
        for left in (folder, root / "sft" / f"for-rlhf-{name}", root / "reward" / f"for-rlhf-{name}"):
            shutil.rmtree(left, ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        where = [f"--seed_everything={seed}", f"--run.root={root}", f"--run.name={name}"]
        done = subprocess.run(  # noqa: S603  # this package, with the user's own flags
            [sys.executable, "-m", "lightning_pref.recipes.rlhf", *flags, *where],
            env={"OMP_NUM_THREADS": "1", **os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"seed {seed}: {name} failed:\n{done.stderr[-4000:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        (root / f"{name}.json").write_text(json.dumps({"cpu_seconds": seconds}) + "\n", encoding="utf-8")
    return folder


def measured(root: Path, seed: int, num_prompts: int) -> Row:
    """Both runs of a seed, and what their answers are worth."""
    learned = trained(root, seed, LEARNED)
    start = root / "sft" / f"for-rlhf-{LEARNED}" / "export"
    # The defaults of the playground are looked up by the name of a preset, which the fine-tuned model has no more.
    gold = trained(root, seed, GOLD, f"--config={CONFIGS}/rlhf_playground.yaml", f"--model.model={start}", *ON_GOLD)
    worth = [mean_gold_reward(folder, num_prompts) for folder in (start, learned / "export", gold / "export")]
    kls = [json.loads((run / "summary.json").read_text(encoding="utf-8"))["metrics"]["kl"]["last"] for run in (learned, gold)]
    seconds = json.loads((root / f"{LEARNED}.json").read_text(encoding="utf-8"))["cpu_seconds"]
    return Row(seed, worth[0], worth[1], worth[2], kls[0], kls[1], seconds)


def held_out_prompts(num_prompts: int) -> list[list[dict[str, str]]]:
    """Prompts that no stage trains on."""
    return [row["prompt"] for row in playground_rows("prompts", num_prompts, split="val")]


def mean_gold_reward(model: Path, num_prompts: int) -> float:
    """What sampled answers of a saved policy are worth."""
    policy, tokenizer = load_model(str(model)), load_tokenizer(str(model))
    texts = [
        str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
        for prompt in held_out_prompts(num_prompts)
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    eos = int(tokenizer.eos_token_id)
    answers = sample_responses(policy, ids, eos_token_id=eos, max_new_tokens=MAX_NEW_TOKENS)
    decoded = [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]
    return statistics.fmean(gold_reward(text, answer) for text, answer in zip(texts, decoded, strict=True))


def absolute_best(num_prompts: int) -> float:
    """Mean gold reward of an answer with all its parts right to every held-out prompt."""
    rewards = []
    for prompt in held_out_prompts(num_prompts):
        request = read_request("\n".join(message["content"] for message in prompt))
        marks = draw_marks(request, 1.0, Random(0))
        rewards.append(gold_reward(prompt, write_answer(request, marks, Random(0))))
    return statistics.fmean(rewards)


def main() -> None:
    """Run what is missing, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder for the runs; runs that it holds are not repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=512, help="held-out prompts that are answered")
    given = parser.parse_args()
    rows = [measured((given.root / f"seed-{seed}").resolve(), seed, given.prompts) for seed in given.seeds]
    print(f"\nabsolute best: {absolute_best(given.prompts):.3f}\n")
    print("| seed | fine-tuned | RLHF | on the gold reward | share | KL | KL on gold | processor s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        rewards = f"{row.start:.3f} | {row.learned:.3f} | {row.ceiling:.3f} | {row.share:.1%}"
        print(f"| {row.seed} | {rewards} | {row.kl:.1f} | {row.kl_on_gold:.1f} | {row.seconds:.0f} |")


if __name__ == "__main__":
    main()
