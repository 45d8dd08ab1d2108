from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.measures.edits import edit_distance, normalized_edit_distance, shared_prefix_length

# Few different tokens, so that long matches and repeats are common.
TOKENS = st.lists(st.integers(min_value=0, max_value=3), max_size=24)


def levenshtein(first: list[int], second: list[int]) -> int:
    """Oracle: the table of Wagner and Fischer, cell by cell."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i in range(len(first) + 1):
        for j in range(len(second) + 1):
            if i == 0 or j == 0:
                table[i][j] = i + j
            else:
                change = table[i - 1][j - 1] + (first[i - 1] != second[j - 1])
                table[i][j] = min(change, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


@given(TOKENS, TOKENS)
def test_the_distance_is_that_of_the_full_table(first: list[int], second: list[int]) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == levenshtein(first, second)


@pytest.mark.parametrize("lengths", [(300, 300), (64, 257), (200, 1)])
def test_long_responses_are_exact_beyond_a_machine_word(lengths: tuple[int, int]) -> None:
    generator = random.Random(0)
    first = [generator.randrange(20) for _ in range(lengths[0])]
    second = [token if generator.random() < 0.8 else generator.randrange(20) for token in first][: lengths[1]]
    second = [*second[:50], 7, 7, 7, *second[50:]]
    assert edit_distance(first, second) == levenshtein(first, second)


@pytest.mark.parametrize(
    ("first", "second", "distance"), [([], [], 0), ([1, 2], [], 2), ([], [5], 1), ([1, 2, 3], [1, 2, 3], 0), ([1], [2], 1)]
)
def test_small_cases_are_as_counted_by_hand(first: list[int], second: list[int], distance: int) -> None:
    assert edit_distance(first, second) == distance


def test_the_normalised_distance_is_a_share_of_the_longer_response() -> None:
    assert normalized_edit_distance([1, 2, 3], [4]) == 1.0
    assert normalized_edit_distance([1, 2], [1, 2, 3, 4]) == 0.5
    assert normalized_edit_distance([], []) == 0.0


@given(TOKENS, TOKENS, TOKENS)
def test_the_shared_prefix_is_where_the_responses_part(start: list[int], first: list[int], second: list[int]) -> None:
    length = shared_prefix_length(start + first, start + second)
    assert length >= len(start)
    assert (start + first)[:length] == (start + second)[:length]
    assert (start + first)[length : length + 1] != (start + second)[length : length + 1] or start + first == start + second
