"""Writes docs/invariance.md: how far every cut of an update is from the exact one, measured in one run of the grid.

Run it from anywhere: `python docs/make_invariance.py`. It takes about a minute and starts three processes. The numbers are
rounding errors and differ a little from machine to machine; `tests/invariants/test_matrix.py` runs the same grid and holds the
bounds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests" / "parts"))

# Found by the line above, also in the processes that it starts.
import invariance  # type: ignore[import-not-found]  # noqa: E402

TEXT = """# One update, however it is cut

Batch size, accumulation, number of processes, layout and precision are matters of speed and memory. None of them is meant to
change what is learned. This table measures how far they do: {rows} rows of ragged lengths make one update; every line is the
same update cut in another way, against the same update computed by hand in float64, one row at a time, without the package.
No cut divides the rows evenly, so that some processes and micro-batches have fewer of them.

*Loss* is the one logged for the first update; *gradient* the deviation of its gradient over its norm; *change* that of the
weights after {updates} clipped AdamW updates, over the norm of their change. Each is the largest of the layouts in the grid.

{table}

How to read it:

* Down a column of one precision nothing changes: cutting an update costs nothing beyond the rounding of that precision.
* `64-true` shows the arithmetic itself. What is left there of the gradient comes from Llama's norms, which compute in float32
  whatever the model is in, and of the loss from the logs, which are in float32.
* `bf16-true` has the gradient of `bf16-mixed` and loses it in the weights: the change of an update is smaller than the rounding
  of the weights. That is what `LostUpdateMeter` measures; see [precision](precision.md).

The bounds, with their reasons, are in `tests/parts/invariance.py`; `tests/invariants/test_matrix.py` holds every cell to them and
asserts besides that all processes end with the same weights bit for bit. It runs on CPUs, with gloo between processes.

This page is written by `docs/make_invariance.py`.
"""


def main() -> None:
    """Run the grid and write the page."""
    with tempfile.TemporaryDirectory() as folder:
        matrix = invariance.run_matrix(Path(folder))
    text = TEXT.format(rows=invariance.NUM_ROWS, updates=invariance.NUM_UPDATES, table=invariance.table(matrix))
    (DOCS / "invariance.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
