"""What the token store costs: build, memory, start on a warm cache, batches a second.

Run it as `python -m benchmarks.data` (from the root of the repository), or with `--rows 10000` for a quick look. Each
measurement is a process of its own, so that its peak of resident memory is its own too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Prompt and response lengths are log-normal with these medians and spreads, cut at these ends: much like UltraFeedback's.
PROMPT = (160, 0.9, 8, 1024)
RESPONSE = (240, 0.7, 8, 1024)
VOCAB_SIZE = 151_936  # a large one: four bytes a token


def lengths(rng, shape, median, spread, low, high):  # noqa: ANN001, ANN201  # numpy is imported by the measured process
    """Log-normal token counts."""
    import numpy as np

    return np.exp(rng.normal(np.log(median), spread, shape)).astype(np.int64).clip(low, high)


def build(folder: Path, num_rows: int) -> dict[str, float]:
    """Write synthetic pairs into a store."""
    import numpy as np

    from lightning_pref.data.groups import PromptGroup
    from lightning_pref.data.store import GroupStoreWriter

    rng = np.random.default_rng(0)
    prompts, responses = lengths(rng, num_rows, *PROMPT), lengths(rng, (num_rows, 2), *RESPONSE)
    pool = rng.integers(0, VOCAB_SIZE, size=1 << 20, dtype=np.int32)
    started = time.perf_counter()
    with GroupStoreWriter(folder, vocab_size=VOCAB_SIZE) as writer:
        for row in range(num_rows):
            at = row * 7919 % (len(pool) - 4096)
            p, c, r = int(prompts[row]), int(responses[row, 0]), int(responses[row, 1])
            pieces = (pool[at + p : at + p + c], pool[at + p + c : at + p + c + r])
            writer.append(PromptGroup(row_id=row, prompt=pool[at : at + p], responses=pieces, ranks=(0, 1)))
    return {
        "build seconds": time.perf_counter() - started,
        "store GiB": sum(path.stat().st_size for path in folder.iterdir()) / 2**30,
    }


def tokenise(folder: Path, num_rows: int) -> dict[str, float]:
    """From a JSONL file through `PreferenceData`: the first time, and again on a warm cache."""
    from lightning_pref.data.datamodule import PreferenceData
    from lightning_pref.data.playground import playground_rows
    from lightning_pref.data.playground_tokenizer import playground_tokenizer

    folder.mkdir(parents=True)
    path = folder / "pairs.jsonl"
    with path.open("w") as file:
        rows = [json.dumps(row) for row in playground_rows("preference", min(num_rows, 10_000))]
        for i in range(num_rows):
            file.write(rows[i % len(rows)].replace(". ", f". Row {i}. ", 1) + "\n")
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))
    tokenizer = playground_tokenizer()
    seconds = {}
    for when in ("cold", "warm"):
        began = time.perf_counter()
        data = PreferenceData(str(path), val_size=0, tokenizer=tokenizer, cache_dir=str(folder / "cache"))
        data.prepare_data()
        data.setup("fit")
        next(iter(data.train_dataloader()))
        seconds[when] = time.perf_counter() - began
    return {
        "rows": num_rows,
        "rows/s, cold": num_rows / seconds["cold"],
        "tokens a row": float((data.train_table.prompt_lengths + data.train_table.response_tokens).mean()),
        "warm start to first batch seconds": seconds["warm"],
    }


def start(folder: Path, max_tokens: int, num_batches: int) -> dict[str, float]:
    """Open the store, plan the first epoch, make the first batch, then many."""
    began = time.perf_counter()
    from lightning_pref.data.datamodule import PreferenceData  # noqa: F401  # what a run imports
    from lightning_pref.data.sampler import GroupBatches, GroupBatchSampler, GroupLoader
    from lightning_pref.data.store import GroupStore

    imported = time.perf_counter()
    batches = GroupBatches(GroupStore(folder))
    sampler = GroupBatchSampler(batches, max_tokens_per_batch=max_tokens)
    loader = GroupLoader(batches, batch_size=None, sampler=sampler)
    iterator = iter(loader)
    next(iterator)
    first = time.perf_counter()
    num_tokens = num_groups = done = 0
    for batch in iterator:
        num_tokens, num_groups, done = num_tokens + batch.num_tokens, num_groups + batch.num_groups, done + 1
        if done == num_batches:
            break
    seconds = time.perf_counter() - first
    costs = sampler.table.prompt_lengths + sampler.table.response_tokens
    return {
        "import seconds": imported - began,
        "start to first batch seconds, imports apart": first - imported,
        "start to first batch seconds, with imports": first - began,
        "batches an epoch": len(sampler),
        "batches/s": done / seconds,
        "pairs/s": num_groups / seconds,
        "tokens/s": num_tokens / seconds,
        "milliseconds a batch": 1000 * seconds / done,
        "fill of the token budget": float(costs.sum()) / (len(sampler) * max_tokens),
    }


def measured(task: str, **arguments: object) -> dict[str, float]:
    """Run one task in a process of its own."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
    command = [sys.executable, "-m", "benchmarks.data", "--task", task, *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603  # our own file
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measure and print a table; as a child, measure one task and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--max-tokens", type=int, default=8192, help="token budget of a batch")
    parser.add_argument("--batches", type=int, default=0, help="batches to make after the first; 0 = a whole epoch")
    parser.add_argument("--folder", type=Path, help="where the store is written (and deleted); a temporary folder if not given")
    parser.add_argument("--task", choices=["build", "start", "tokenise"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        if args.task == "start":
            figures = start(args.folder, args.max_tokens, args.batches)
        else:
            figures = {"build": build, "tokenise": tokenise}[args.task](args.folder, args.rows)
        # Kilobytes on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        figures["peak resident GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        print(json.dumps(figures))
        return
    folder = args.folder or Path(tempfile.mkdtemp())
    try:
        print(f"{args.rows} pairs, vocabulary {VOCAB_SIZE}, {args.max_tokens} tokens a batch")
        for task in ("build", "start", "tokenise"):
            # Tokenising is slow and its memory does not depend on the number of rows.
            rows, place = (args.rows // 20, folder / "text") if task == "tokenise" else (args.rows, folder / "store")
            figures = measured(task, rows=rows, max_tokens=args.max_tokens, batches=args.batches, folder=place)
            for name, value in figures.items():
                print(f"{task:8s} {name:45s} {value:14,.3f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
