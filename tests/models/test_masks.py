import torch
from transformers import Gemma3TextConfig, Llama4TextConfig, LlamaConfig, MistralConfig, Qwen2Config

from lightning_pref.models.masks import additive, attention_masks, attention_spans

# Two prompt tokens, a response of two, a response of one, another group of two, and one slot of padding.
UNIT = torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]])
BRANCH = torch.tensor([[-1, -1, 0, 0, 1, -1, 2, -1]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 2, 0, 1, 0]])


def rows(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if value else "." for value in row) for row in mask[0, 0].tolist()]


def test_responses_see_their_prompt_and_themselves_only() -> None:
    mask = attention_masks({"full_attention": None}, UNIT, BRANCH, POSITIONS)["full_attention"]
    assert mask.shape == (1, 1, 8, 8)
    assert mask.dtype == torch.bool
    assert rows(mask) == [
        "x.......",
        "xx......",
        "xxx.....",
        "xxxx....",
        "xx..x...",
        ".....x..",
        ".....xx.",
        ".......x",
    ]


def test_a_window_counts_positions_not_places_in_the_row() -> None:
    """The first token of the second response is at position 2, four places after the token at position 0."""
    mask = attention_masks({"sliding_attention": 2}, UNIT, BRANCH, POSITIONS)["sliding_attention"]
    assert rows(mask)[3] == "..xx...."
    assert rows(mask)[4] == ".x..x..."


def test_chunks_are_cut_by_position() -> None:
    mask = attention_masks({"chunked_attention": 2}, UNIT, BRANCH, POSITIONS)["chunked_attention"]
    assert rows(mask)[3] == "..xx...."
    assert rows(mask)[4] == "....x..."


def test_no_query_is_left_without_a_key() -> None:
    masks = attention_masks({"full_attention": None, "sliding_attention": 1, "chunked_attention": 1}, UNIT, BRANCH, POSITIONS)
    for mask in masks.values():
        assert mask.any(-1).all()


def test_additive_masks_are_zero_or_the_lowest_finite_number() -> None:
    added = additive(torch.tensor([True, False]), torch.bfloat16)
    assert added.dtype == torch.bfloat16
    assert added.tolist() == [0.0, torch.finfo(torch.bfloat16).min]


def test_spans_follow_the_config_of_each_architecture() -> None:
    sizes = {"num_hidden_layers": 4}
    assert attention_spans(LlamaConfig()) == {"full_attention": None}
    assert attention_spans(MistralConfig(sliding_window=7)) == {"sliding_attention": 7}
    assert attention_spans(MistralConfig(sliding_window=None)) == {"full_attention": None}
    # Qwen2 configs name a window that is only in force with `use_sliding_window`.
    assert attention_spans(Qwen2Config(**sizes, sliding_window=7)) == {"full_attention": None}
    mixed = Qwen2Config(**sizes, sliding_window=7, use_sliding_window=True, max_window_layers=2)
    assert attention_spans(mixed) == {"full_attention": None, "sliding_attention": 7}
    gemma = Gemma3TextConfig(**sizes, sliding_window=5, layer_types=["sliding_attention"] * 3 + ["full_attention"])
    assert attention_spans(gemma) == {"sliding_attention": 5, "full_attention": None}
    chunked = Llama4TextConfig(**sizes, attention_chunk_size=6)
    assert attention_spans(chunked) == {"chunked_attention": 6, "full_attention": None}
