"""Forward and backward time of the three layouts, and whether `auto` picks well.

    python benchmarks/layouts.py                        # every length profile on a model of about 1.6 M parameters
    python benchmarks/layouts.py --hidden 512 --layers 8 --profiles long-prompt even --device cuda --dtype bfloat16

The layouts of one profile are timed in turns (A B C A B C ...), so that a machine that speeds up or slows down does so for
all; the table shows medians. `auto / best` is the time of the layout that `auto` picked over that of the fastest, `speed`
its inverse; the design asks for 0.98 or more.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_pref.data.groups import GroupBatch, PromptGroup
from lightning_pref.models.attention import token_costs
from lightning_pref.models.forward import LAYOUTS, response_logps
from lightning_pref.models.layouts import choose_layout

# Name -> (groups, responses of each, range of prompt lengths, range of response lengths).
PROFILES: dict[str, tuple[int, int, tuple[int, int], tuple[int, int]]] = {
    "long-prompt": (4, 2, (200, 300), (20, 60)),
    "pairs": (8, 2, (20, 120), (20, 120)),
    "short-prompt": (8, 2, (4, 12), (40, 160)),
    "many-responses": (2, 8, (60, 100), (20, 100)),
    "many-long-responses": (2, 8, (4, 10), (150, 250)),
    "single": (16, 1, (10, 100), (10, 100)),
    "even": (8, 2, (32, 32), (64, 64)),
    "even-long": (2, 2, (100, 100), (400, 400)),
}


def random_batch(profile: str, vocabulary: int, seed: int) -> GroupBatch:
    """Random tokens in the lengths of a profile."""
    num_groups, num_responses, prompt, response = PROFILES[profile]
    generator = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return generator.integers(0, vocabulary, size=generator.integers(low, high + 1))

    return GroupBatch.from_groups(
        [
            PromptGroup(row_id=row, prompt=tokens(*prompt), responses=tuple(tokens(*response) for _ in range(num_responses)))
            for row in range(num_groups)
        ]
    )


def timed(model: LlamaForCausalLM, batch: GroupBatch, layout: str) -> float:
    """Seconds of one forward and backward pass."""
    model.zero_grad()
    start = time.perf_counter()
    response_logps(model, batch, layout=layout).logps.sum().backward()
    if batch.input_ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Time every profile and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--backend", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=8192,
        attn_implementation=args.backend,
    )
    model = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    placed = [layout for layout in LAYOUTS if layout != "auto"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.backend}, {args.device}, {args.dtype}")
    print(f"{'profile':20} {'tokens':>7} " + " ".join(f"{layout:>9}" for layout in placed) + f" {'auto':>8} {'speed':>6}")
    for profile in args.profiles:
        batch = random_batch(profile, args.vocabulary, seed=1).to(args.device)
        seconds: dict[str, list[float]] = {layout: [] for layout in placed}
        for layout in placed:
            timed(model, batch, layout)
        for _ in range(args.rounds):
            for layout in placed:
                seconds[layout].append(timed(model, batch, layout))
        medians = {layout: statistics.median(values) for layout, values in seconds.items()}
        chosen = choose_layout(batch, token_costs(model.model))
        speed = min(medians.values()) / medians[chosen]
        times = " ".join(f"{1000 * medians[layout]:7.1f}ms" for layout in placed)
        print(f"{profile:20} {batch.num_tokens:7} {times} {chosen:>8} {speed:6.2f}")


if __name__ == "__main__":
    main()
