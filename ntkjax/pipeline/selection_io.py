"""The selected records for use elsewhere: each as its file holds it, beside where it came from and how it was scored.

Beside the record's own fields stand ``id``, ``source``, ``score``, ``rank``, ``file`` and ``line``: ``id`` and
``source`` only where the record has none. A name that some selected record has already is left as it is, and ours is
then called ``ntkjax_score`` and so on, in all of them; ``ntkjax_id`` where ids differ, because two files number alike.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ntkjax.data import Records
from ntkjax.errors import DataError, UserError
from ntkjax.files import read_json, write_json, write_lines, written_file, written_folder
from ntkjax.job import barrier, process
from ntkjax.pipeline.load import Loaded
from ntkjax.selection import Selection
from ntkjax.selection.diagnostics import examples

SelectedFormat = Literal["original", "ntkjax", "parquet", "hf"]
FILES = {"original": "selected.jsonl", "ntkjax": "selected.jsonl", "parquet": "selected.parquet", "hf": "selected"}
"""Format -> the file or folder that it is written to."""
OWN = "ntkjax_"
"""In front of our names where the record has fields of these names."""
_BLOCK = 1000


def write_selected(out: Path, records: Records, result: Selection, kind: SelectedFormat = "original") -> Path:
    """Write the selected records, best first, as ``kind`` says; the file or folder appears whole or not at all.

    Args:
      kind: ``original``: JSON lines of the records as they were; ``ntkjax``: JSON lines of what ntkjax read;
        ``parquet`` and ``hf``: the records as they were, as Parquet or a folder for ``datasets.load_from_disk``.

    Raises:
      DataError: a file of the records is gone or has changed since it was read; columns that no table can hold.
    """
    path = out / FILES[kind]
    files, lines = records.locations(result.selected)
    scored = result.scored[result.selected]
    beside = {
        "score": [float(s) if good else None for s, good in zip(result.scores[result.selected], scored)],
        "rank": [int(r) if good else None for r, good in zip(result.ranks[result.selected], scored)],
        "file": files,
        "line": lines.tolist(),
    }
    if kind == "ntkjax":
        records.write_jsonl(path, result.selected, extra=beside)
        return path
    rows = _Rows(records, result.selected, beside)
    {"original": _write_jsonl, "parquet": _write_parquet, "hf": _write_dataset}[kind](path, rows)
    return path


class _Rows:
    """The records as they were, with our fields beside theirs; may be iterated more than once."""

    def __init__(self, records: Records, selected: np.ndarray, beside: Mapping[str, list[Any]]):
        self._originals = records.originals(selected)
        self._ids, self._sources = list(records.ids[selected]), list(records.sources[selected])
        taken = {str(name) for name in self._originals.names}
        self._beside = {OWN + name if name in taken else name: values for name, values in beside.items()}
        same = all(given is None or _label(given) == own for given, own in zip(self._given_ids(), self._ids))
        self._id = "id" if same else f"{OWN}id"
        self.names = list(dict.fromkeys([*map(str, self._originals.names), self._id, "source", *self._beside]))

    def _given_ids(self) -> Iterator[Any]:
        return (_present(record.get("id")) for record in self._originals)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for k, record in enumerate(self._originals):
            if _present(record.get("source")) is None:
                record["source"] = self._sources[k]
            if self._id != "id" or _present(record.get("id")) is None:
                record[self._id] = self._ids[k]
            yield record | {name: values[k] for name, values in self._beside.items()}

    def blocks(self) -> Iterator[list[dict[str, Any]]]:
        """The records, ``_BLOCK`` at a time."""
        block: list[dict[str, Any]] = []
        for record in self:
            block.append(record)
            if len(block) == _BLOCK:
                yield block
                block = []
        if block:
            yield block


def _present(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _label(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


# -- JSON lines --


def _write_jsonl(path: Path, rows: _Rows) -> None:
    write_lines(path, map(_as_json, rows))


def _as_json(record: Mapping[str, Any]) -> str:
    """One line that every JSON reader takes: NaN is null, dates are text, bytes base64."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=_plain)
    except ValueError:
        text = json.dumps(_without_nan(record), ensure_ascii=False, default=_plain)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in a field that is not used
        return json.dumps(_without_nan(record), default=_plain)
    return text


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(field) for key, field in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


# -- tables --


def _write_parquet(path: Path, rows: _Rows) -> None:
    schema = _schema(rows)
    with written_file(path) as work, pq.ParquetWriter(work, schema) as file:
        for table in _tables(rows, schema):
            file.write_table(table)


def _write_dataset(path: Path, rows: _Rows) -> None:
    import datasets

    schema = _schema(rows)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        stream = Path(scratch) / "rows.arrow"
        with pa.OSFile(str(stream), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for table in _tables(rows, schema):
                writer.write_table(table)
        with written_folder(path) as work:
            datasets.Dataset.from_file(str(stream)).save_to_disk(str(work))


def _schema(rows: _Rows) -> pa.Schema:
    """The types of all columns, from one pass over the records."""
    types: dict[str, pa.DataType] = dict.fromkeys(rows.names, pa.null())
    for block in rows.blocks():
        for name, known in types.items():
            fields = [pa.schema([(name, known)]), pa.schema([(name, _column(name, block, None).type)])]
            try:
                types[name] = pa.unify_schemas(fields, promote_options="permissive").field(name).type
            except pa.ArrowException as error:
                raise _mixed(name, error) from error
    return pa.schema(list(types.items()))


def _tables(rows: _Rows, schema: pa.Schema) -> Iterator[pa.Table]:
    for block in rows.blocks():
        yield pa.table([_column(field.name, block, field.type) for field in schema], schema=schema)


def _column(name: str, block: list[dict[str, Any]], kind: pa.DataType | None) -> pa.Array:
    try:
        return pa.array([record.get(name) for record in block], type=kind, from_pandas=True)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
        raise _mixed(name, error) from error


def _mixed(name: str, error: Exception) -> DataError:
    return DataError(
        f"column {name!r} of the selected records: {str(error).splitlines()[0]}; expected values of one kind, which a "
        "table needs; choose --selected-format original, which writes JSON lines"
    )


ROW_GROUP = 1 << 13


SCORES = pa.schema(
    [
        ("id", pa.string()),
        ("score", pa.float64()),
        ("votes", pa.int64()),
        ("rank", pa.int64()),
        ("selected", pa.bool_()),
        ("source", pa.string()),
        ("response_tokens", pa.int32()),
        ("file", pa.string()),
        ("line", pa.int64()),
    ]
)


def write_selection(out: Path, result: Selection, pool: Loaded, selected_format: SelectedFormat = "original") -> None:
    """scores.parquet (every pool row), the selected records (best first), and last selection.json: the mark of the
    end.

    In a job every process calls this: each writes its part of the scores, and the first the rest."""
    _write_scores(out, result, pool)
    if process()[0] == 0:
        _write_choice(out, result, pool, selected_format)
    barrier("selection made")


def _write_choice(out: Path, result: Selection, pool: Loaded, selected_format: SelectedFormat) -> None:
    write_selected(out, pool.records, result, selected_format)
    content = {
        "method": result.method,
        "selected": result.selected.tolist(),
        "diagnostics": result.diagnostics,
        "examples": {name: _shown(result, pool, rows) for name, rows in examples(result).items()},
    }
    write_json(out / "selection.json", content)


def _write_scores(out: Path, result: Selection, pool: Loaded) -> None:
    """OUT/scores.parquet. In a job each process writes whole row groups of it as OUT/scores/part-K.parquet, a data set
    of parts for every reader of Parquet; the first copies them into one file, a row group at a time, and removes them.
    """
    path, folder, (index, count) = out / "scores.parquet", out / "scores", process()
    if count == 1:
        _write_rows(path, result, pool, range(len(pool)))
    else:
        groups = -(-len(pool) // ROW_GROUP)
        bound = lambda k: min(groups * k // count * ROW_GROUP, len(pool))
        part = lambda k: folder / f"part-{k:05}.parquet"
        _write_rows(part(index), result, pool, range(bound(index), bound(index + 1)))
        barrier("parts of the scores")
        if index == 0:
            merge_scores([part(k) for k in range(count)], path)
    if index == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a job that was stopped, too


def merge_scores(parts: Sequence[Path], path: Path) -> None:
    """One Parquet file ``path`` of the row groups of ``parts``, in their order; one of them is held at a time."""
    with written_file(path) as work, pq.ParquetWriter(work, SCORES) as file:
        for part in parts:
            with pq.ParquetFile(part, pre_buffer=False) as source:
                for group in range(source.num_row_groups):
                    file.write_table(source.read_row_group(group))


def _write_rows(path: Path, result: Selection, pool: Loaded, of: range) -> None:
    """The scores of these rows as Parquet, ``ROW_GROUP`` at a time: texts of a whole pool are never held at once."""
    chosen = np.zeros(len(pool), bool)
    chosen[result.selected] = True
    scored = result.scored
    with written_file(path) as work, pq.ParquetWriter(work, SCORES) as file:
        for start in range(of.start, of.stop, ROW_GROUP):
            rows = slice(start, min(start + ROW_GROUP, of.stop))
            records = pool.records.subset(np.arange(rows.start, rows.stop))
            files, lines = pool.records.locations(np.arange(rows.start, rows.stop))
            columns = {
                "id": pa.array([str(name) for name in records.ids]),
                "score": pa.array(result.scores[rows], mask=~scored[rows]),
                "votes": pa.nulls(len(records)) if result.votes is None else pa.array(result.votes[rows]),
                "rank": pa.array(result.ranks[rows], mask=~scored[rows]),
                "selected": pa.array(chosen[rows]),
                "source": pa.array([str(name) for name in records.sources]),
                "response_tokens": pa.array(np.asarray(pool.tokens.response_lengths[rows])),
                "file": pa.array(files),
                "line": pa.array(lines),
            }
            file.write_table(pa.table(columns).cast(SCORES))


def _shown(result: Selection, pool: Loaded, rows: Sequence[int] | np.ndarray) -> list[dict]:
    examples = [pool.records[int(row)] for row in rows]
    return [
        {
            "id": example.id,
            "source": example.source,
            "score": float(result.scores[row]),
            "rank": int(result.ranks[row]),
            "prompt": example.prompt,
            "response": example.response,
        }
        for row, example in zip(rows, examples)
    ]


def read_selection(out: Path) -> Selection:
    """What ``write_selection`` wrote into ``out``. Raises as `read_scores`."""
    content = read_json(out / "selection.json")
    table = read_scores(out, ["score", "votes", "rank"])
    column = lambda name, fill: table[name].fill_null(fill).to_numpy()
    votes = None if table["votes"].null_count == len(table) else column("votes", 0)
    return Selection(
        method=content["method"],
        scores=column("score", float("nan")),
        ranks=column("rank", 0),
        selected=np.asarray(content["selected"], np.int64),
        votes=votes,
        diagnostics=content["diagnostics"],
    )


def read_scores(out: Path, columns: Sequence[str]) -> pa.Table:
    """These columns of the scores.parquet that ``write_selection`` wrote into ``out``.

    Raises:
      UserError: the file is missing or damaged.
    """
    path = out / "scores.parquet"
    remedy = f"remove {out / 'selection.json'} and run the command again, or use a new output directory"
    try:
        return pq.read_table(path, columns=list(columns))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; {remedy}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet ({error}); {remedy}") from None
