"""One update is the same update however it is cut: batch x accumulation x processes x layout x precision, against float64."""

from __future__ import annotations

import pytest
import torch
from invariance import CLIP, NUM_ROWS, Cell, Matrix, bound_of, cells, run_matrix, table

pytestmark = pytest.mark.slow

every_cell = pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return run_matrix(tmp_path_factory.mktemp("matrix"))


def test_the_grid_has_every_pair_of_settings_of_dpo() -> None:
    """Whatever two settings disturb each other meet in some cell."""
    dpo = [cell for cell in cells() if cell.kind == "dpo"]
    values = {name: sorted({getattr(cell, name) for cell in dpo}) for name in ("ranks", "layout", "precision")}
    assert values["ranks"] == [1, 2, 3]
    assert len(values["precision"]) == 5
    for layout in values["layout"]:
        for precision in values["precision"]:
            assert any(cell.layout == layout and cell.precision == precision for cell in dpo)
            for ranks in (1, 2):
                wanted = layout != "packed" or precision in ("64-true", "32-true") or ranks == 1
                found = any((c.layout, c.precision, c.ranks) == (layout, precision, ranks) and c.accumulate > 1 for c in dpo)
                assert found or not wanted
    assert all(cell.ranks * cell.accumulate * cell.batch_size >= NUM_ROWS for cell in cells())
    assert any(cell.ranks * cell.accumulate * cell.batch_size > NUM_ROWS for cell in cells()), "rows that only fill a batch"


@every_cell
def test_N1_N2_loss_gradient_and_weights_are_those_of_one_exact_update(matrix: Matrix, cell: Cell) -> None:
    found, bound = matrix.deviation(cell), bound_of(cell)
    assert found.gradient < bound.gradient
    assert found.change < bound.change


@every_cell
def test_N5_the_logged_loss_is_the_mean_over_all_rows(matrix: Matrix, cell: Cell) -> None:
    assert matrix.deviation(cell).loss < bound_of(cell).loss


def test_N6_every_update_was_clipped_as_a_whole(matrix: Matrix) -> None:
    """The exact weights, which the cells come down to, are those after clipping; and there was something to clip."""
    assert min(matrix.norms.values()) > 4 * CLIP


@pytest.mark.parametrize("cell", [cell for cell in cells() if cell.ranks > 1], ids=lambda cell: cell.name)
def test_R7_all_processes_have_the_same_gradient_and_the_same_weights(matrix: Matrix, cell: Cell) -> None:
    first, *others = matrix.outcomes[cell.name]
    assert len(others) == cell.ranks - 1
    for other in others:
        assert torch.equal(first.gradient, other.gradient)
        assert torch.equal(first.weights, other.weights)


def test_the_exact_update_is_another_one_for_every_kind_and_moves_the_weights(matrix: Matrix) -> None:
    """A grid whose outcomes were all the same, or nothing, would prove nothing."""
    assert len({round(oracle.loss, 3) for oracle in matrix.oracles.values()}) == len(matrix.oracles)
    for kind, oracle in matrix.oracles.items():
        assert (oracle.weights - matrix.starts[kind]).norm() > 1e-2


def test_the_deviations_at_a_glance(matrix: Matrix) -> None:
    """`pytest -s` shows them, and docs/make_invariance.py writes them down."""
    lines = table(matrix)
    print(f"\n{lines}")  # noqa: T201
    assert all(
        f"| {cell.kind} | {cell.ranks} x {cell.accumulate} x {cell.batch_size} | `{cell.precision}` |" in lines
        for cell in cells()
    )
