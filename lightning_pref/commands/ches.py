"""`python -m lightning_pref ches`: score pairs before training on them, and drop those that would displace likelihood."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lightning_pref import __version__
from lightning_pref.commands.places import device_named
from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.filtering import KeptRows, highest_rows, parse_share, write_kept
from lightning_pref.data.groups import GroupBatch, PairSelection
from lightning_pref.data.loading import OnBadRow
from lightning_pref.data.playground_source import PlaygroundRows, PlaygroundSettings, is_playground
from lightning_pref.data.sources import RowSource, read_rows
from lightning_pref.data.store import GroupSubset, GroupTable
from lightning_pref.data.truncation import Truncation
from lightning_pref.models.backbones import Dtype, check_vocabulary, load_model
from lightning_pref.models.forward import Layout
from lightning_pref.models.pair_table import PairTable, score_pairs

NUM_BINS = 16
BAR_WIDTH = 40
# Half-precision models are wrong by about this much over a response, so that closer pairs may be ranked either way.
CLOSE_NATS = 0.5


def ches(
    model: str = "playground:tiny",
    data: str = "playground:preference",
    out: str = "scores.parquet",
    *,
    drop_top: str | None = None,
    kept: str | None = None,
    beta: float = 0.1,
    pairs: PairSelection = "all",
    split: str | None = None,
    subset: str | None = None,
    revision: str | None = None,
    columns: dict[str, str] | None = None,
    limit_rows: int | None = None,
    on_bad_row: OnBadRow = "error",
    tokenizer: str | None = None,
    chat_template: str | None = None,
    template_date: str | None = None,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation: Truncation = "keep_start",
    playground: PlaygroundSettings = PlaygroundSettings(),  # noqa: B008  # frozen
    layout: Layout = "auto",
    max_tokens_per_batch: int = 8192,
    dtype: Dtype = "float32",
    device: str = "auto",
    cache_dir: str | None = None,
) -> None:
    """Score preference pairs by how much likelihood displacement training on them is likely to cause, and drop the worst.

    Reads rows as training does, runs the model over them once, writes one row for each pair to a Parquet file, and shows a
    histogram of the length-normalised CHES score.

    Args:
        model: The model that training would start from: a folder, a hub id, `playground:tiny` or `playground:small`.
        data: A file (.jsonl, .json, .csv, .parquet, .arrow), a folder saved by `datasets`, a hub id, or `playground:preference`.
        out: Parquet file to write the scores to.
        drop_top: Share of the rows to drop, those with the highest length-normalised CHES: `5%` or `0.05`. Not given, only
            scores are written.
        kept: JSON-lines file for the rows that are kept; `scores.kept.jsonl` beside `scores.parquet` if not given.
        beta: Of the DPO loss, for the flip thresholds.
        pairs: Which pairs are made of more than two ranked responses.
        split: Split of the folder or hub data set.
        subset: Configuration of a hub data set that has several.
        revision: Branch, tag or commit of a hub data set.
        columns: Columns by the names they have there, {name here: name there}, such as `{chosen: preferred}`.
        limit_rows: Read only that many rows.
        on_bad_row: `error` stops at the first row that cannot be used, `skip` leaves such rows out and counts them by reason.
        tokenizer: Folder or hub id; that of the model if not given.
        chat_template: Text or file of a Jinja template that replaces the tokenizer's own.
        template_date: The day (ISO) that templates which print a date are told.
        max_length: Most tokens of prompt and response together.
        max_prompt_length: Most tokens of the prompt.
        truncation: What is kept of longer rows: `keep_start` cuts the ends of responses, `keep_end` the start of the prompt,
            `drop` leaves such rows out.
        playground: What the rows of the playground are like.
        layout: How prompts and responses are laid out for the forward pass.
        max_tokens_per_batch: Most tokens of a batch, a prompt that several responses share counted once.
        dtype: Of the weights.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU where there is one.
        cache_dir: Folder of the tokenised data; `lightning_pref` in the user's cache folder if not given.
    """
    share = None if drop_top is None else parse_share(drop_top)
    scores_file, kept_file = _output_files(out, kept, data, drops=share is not None)
    if not beta > 0:
        raise ValueError(f"`beta` must be above 0, got {beta!r}.")
    rows = PreferenceData(
        data,
        val_size=None if is_playground(data) else 0,
        split=split,
        subset=subset,
        revision=revision,
        columns=columns,
        limit_rows=limit_rows,
        on_bad_row=on_bad_row,
        tokenizer=tokenizer or model,
        chat_template=chat_template,
        template_date=template_date,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        truncation=truncation,
        max_tokens_per_batch=max_tokens_per_batch,
        cache_dir=cache_dir,
        playground=replace(playground, num_val_rows=0) if is_playground(data) else playground,
    )
    rows.prepare_data()
    rows.setup(TrainerFn.FITTING)
    with_pairs = _rows_with_pairs(rows.train_table, data, pairs)
    policy = load_model(model, dtype=dtype)
    policy.to(device_named(device))  # type: ignore[arg-type]  # transformers wraps the method and loses its overloads
    check_vocabulary(policy, rows.loaded_tokenizer)
    console = Console()
    batches = _shown(rows.every_batch(with_pairs), len(with_pairs), console)
    scores = score_pairs(policy, batches, beta=beta, layout=layout, selection=pairs)
    _check_finite(scores, dtype)
    if share is not None:
        dropped = highest_rows(scores["row_id"].tolist(), scores["length_normalized_ches"].tolist(), share)
        scores["dropped"] = np.isin(scores["row_id"], sorted(dropped))
    facts = {"model": model, "data": data, "beta": str(beta), "pairs": pairs, "lightning_pref": __version__}
    pq.write_table(pa.table(scores).replace_schema_metadata(facts), scores_file)
    _print_histogram(scores, console)
    _print_summary(scores, len(rows.train_table) - len(with_pairs), console)
    _say(console, f"scores: {scores_file}")
    if share is not None:
        source = _original_rows(rows, data)
        counts = write_kept(source, kept_file, dropped, set(scores["row_id"].tolist()), limit_rows)
        _say(console, _filter_line(counts, kept_file))


def _output_files(out: str, kept: str | None, data: str, *, drops: bool) -> tuple[Path, Path]:
    """Where scores and kept rows go; refused before hours of work where it cannot be meant."""
    scores_file = Path(out)
    if scores_file.suffix != ".parquet":
        raise ValueError(f"`out` is the Parquet file for the scores, got {out!r}; give a name that ends with `.parquet`.")
    if kept is not None and not drops:
        raise ValueError(
            "`kept` is the file for the rows that are left over; say what to drop with `--drop-top 5%`, or leave it out."
        )
    kept_file = scores_file.with_suffix(".kept.jsonl") if kept is None else Path(kept)
    if kept_file.suffix != ".jsonl":
        raise ValueError(f"`kept` is a file of JSON lines, got {kept!r}; give a name that ends with `.jsonl`.")
    for name, path in (("out", scores_file), *([("kept", kept_file)] if drops else [])):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"There is no folder {path.absolute().parent} for `{name}` ({path}); make it first.")
        if path.resolve() == Path(data).resolve():
            raise ValueError(f"`{name}` is {path}, the data itself, which would be overwritten; give another name.")
    return scores_file, kept_file


def _rows_with_pairs(table: GroupTable, data: str, selection: PairSelection) -> GroupTable:
    """The rows of a table that have at least one ordered pair."""
    num_pairs = [table[i].num_pairs(selection) for i in range(len(table))]
    if not any(num_pairs):
        raise ValueError(
            f"{data}: there are no pairs in its {len(table)} rows; they hold single responses, or responses without an order. "
            "CHES compares a chosen with a rejected response: give rows with the columns `prompt`, `chosen` and `rejected`, or "
            "with ranked or scored responses."
        )
    return table if all(num_pairs) else GroupSubset(table, np.flatnonzero(num_pairs))


def _shown(batches: Iterable[GroupBatch], num_rows: int, console: Console) -> Iterator[GroupBatch]:
    """The batches, with a progress bar where someone looks on."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring rows", total=num_rows)
        for batch in batches:
            yield batch
            progress.advance(task, batch.num_groups)


def _check_finite(scores: PairTable, dtype: Dtype) -> None:
    names = ("length_normalized_ches", "ref_chosen_logps", "ref_rejected_logps")
    bad = np.flatnonzero(~np.logical_and.reduce([np.isfinite(scores[name]) for name in names]))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(scores['row_id'])} pairs have no finite score, the first in row {scores['row_id'][bad[0]]} "
            f"(counted from 0): the model gives nan or inf there. Its weights are damaged, or {dtype} overflows; try "
            "`--dtype float32`."
        )


def _original_rows(rows: PreferenceData, data: str) -> RowSource:
    """The rows under their own column names, so that the settings of the data fit the kept ones, too."""
    if is_playground(data):
        return PlaygroundRows(data, rows.playground, "train")
    return read_rows(data, split=rows.split, subset=rows.subset, revision=rows.revision)


def _print_histogram(scores: PairTable, console: Console) -> None:
    values = scores["length_normalized_ches"].astype(np.float64)
    counts, edges = np.histogram(values, bins=NUM_BINS)
    table = Table("length-normalized CHES", "pairs", "", box=None, pad_edge=False, title_justify="left")
    for i, count in enumerate(counts):
        bar = "#" * round(BAR_WIDTH * count / counts.max())
        # A bin with few pairs is no empty bin.
        table.add_row(f"{edges[i]:10.3g} to {edges[i + 1]:10.3g}", f"{count:6d}", bar or ("." if count else ""))
    console.print(table)


def _print_summary(scores: PairTable, num_without_pairs: int, console: Console) -> None:
    values = scores["length_normalized_ches"].astype(np.float64)
    facts = {
        "pairs": f"{len(values)}",
        "length-normalized CHES": f"median {np.median(values):.3g}, 95 % below {np.quantile(values, 0.95):.3g}, "
        f"above 0: {_percent(values > 0)}",
        "edit distance": f"median {np.median(scores['edit_distance']):.0f} tokens, "
        f"{np.median(scores['normalized_edit_distance']):.2f} of the longer response",
        "ranked rightly by this model": f"{_percent(scores['ranked_rightly'])}, per token "
        f"{_percent(scores['ranked_rightly_per_token'])}",
        f"closer than {CLOSE_NATS} nats": _percent(np.abs(scores["difficulty"]) < CLOSE_NATS),
        "DPO loss to flip the wrong ones": _threshold_text(scores),
    }
    if num_without_pairs:
        facts["rows without a pair"] = f"{num_without_pairs}, not scored (ties, or a single response)"
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in facts.items():
        table.add_row(name, text)
    console.print(table)


def _threshold_text(scores: PairTable) -> str:
    wrong = scores["flip_threshold"][~scores["ranked_rightly"]]
    return f"median {np.median(wrong):.3g}" if len(wrong) else "none is ranked wrongly"


def _percent(found: NDArray[Any]) -> str:  # Any: NumPy types a comparison loosely
    return f"{100 * np.mean(found):.1f} %"


def _filter_line(counts: KeptRows, path: Path) -> str:
    others = {"not scored and written too": counts.not_scored, "unreadable and left out": counts.unreadable}
    more = "".join(f", {count} {what}" for what, count in others.items() if count)
    return f"kept {counts.kept} rows, dropped {counts.dropped}{more}: {path}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
