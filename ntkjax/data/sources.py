"""Sources of data: files, directories, folders of ``Dataset.save_to_disk`` and hub ids, read one record at a time.

A file may be named by a URL of an object store (`ntkjax.remote`): it is copied into the cache once, and read there.
Readers are those of `ntkjax.data.formats`; saved data sets and hub data count their rows from 1.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ntkjax.data.cache import default_cache_dir, file_signature
from ntkjax.data.formats import FORMATS, Item, Wanted, stem_of, suffix_of, suffixes, unpacked_bytes
from ntkjax.data.problems import printable
from ntkjax.errors import DataError, UserError
from ntkjax.remote import fetch, identity, is_url, listing

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_ROWS = 1000
MAX_ENTRIES = 100_000
"""Files and folders that are looked at in a directory of data."""
# What datasets' save_to_disk writes beside the rows: of a Dataset, of a DatasetDict.
_SAVED, _SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".gz", ".bz2", ".xz", ".zst")


def list_sources(paths: str | Path | Sequence[str | Path], split: str = "train") -> list[str]:
    """Files (directories expanded, sorted by name), saved data sets and hub ids, in the order given.

    A folder that ``Dataset.save_to_disk`` wrote is one source; of a ``DatasetDict`` it is the split ``split``, or the
    only one.

    Raises:
      DataError: a path is missing, has an unknown extension, is empty, or a directory holds no data.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise DataError("no data was given; expected at least one path; name a JSONL, JSON or Parquet file, a "
                        "directory or a hub id")  # fmt: skip
    return [source for path in given for source in _expand(str(path), split)]


def is_hub_id(source: str) -> bool:
    """True for ``owner/name`` or ``owner/name:config`` where no such path exists here."""
    return _HUB_ID.fullmatch(source) is not None and suffix_of(source) not in FORMATS and not Path(source).exists()


def is_saved(source: str | Path) -> bool:
    """True for a folder that ``Dataset.save_to_disk`` of the datasets library wrote."""
    return all((Path(source) / name).is_file() for name in _SAVED)


def _expand(source: str, split: str) -> list[str]:
    if is_url(source):
        return _expand_url(source)
    path = Path(source)
    try:
        if is_hub_id(source):
            return [source]
        folder = path.is_dir()
    except OSError as error:  # a name that is too long, a link to itself
        raise DataError(f"{source}: not a usable path ({error.strerror}); expected data; check the spelling") from error
    if not source:  # else the current directory
        raise DataError("the path of the data is empty; expected a file, directory or hub id; check the variable it "
                        "comes from")  # fmt: skip
    if folder:
        files = sorted(_inside(path, split, itertools.count(1), path))
        if not files:
            raise DataError(
                f"{source}: no data in this directory; expected files ending in {suffixes()}, or what "
                f"Dataset.save_to_disk writes ({', '.join(_SAVED)} and Arrow files); check the path"
            )
        return files
    if not path.is_file():
        raise DataError(f"{source}: no such file or directory; expected data; check the spelling, or give a hub id "
                        "like owner/name")  # fmt: skip
    if suffix_of(path) not in FORMATS:
        remedy = "unpack it" if path.suffix.lower() in _ARCHIVES else "convert it to one of these"
        raise DataError(f"{source}: unknown extension {suffix_of(path)!r}; expected one of {suffixes()}; {remedy}")
    return [_readable(source)]


def _expand_url(url: str) -> list[str]:
    try:
        listed = listing(url)
    except UserError as error:
        raise DataError(str(error)) from error
    if not listed:
        raise DataError(f"{url}: no such object or folder; expected data; check the spelling")
    files = [file for file in listed if suffix_of(file) in FORMATS]
    if not files:
        raise DataError(f"{url}: no data there; expected files ending in {suffixes()}; check the path")
    return files


def _local(source: str) -> str:
    """A path for ``source``, which is no hub id: its own, or that of its copy."""
    if not is_url(source):
        return source
    try:
        return str(fetch(source, default_cache_dir() / "remote"))
    except UserError as error:
        raise DataError(str(error)) from error


def _iter_url(url: str, wanted: Wanted) -> Iterator[Item]:
    copy = _local(url)
    try:
        yield from FORMATS[suffix_of(url)].read(copy, wanted)
    except DataError as error:
        raise DataError(str(error).replace(copy, url)) from error


def _inside(folder: Path, split: str, seen: Iterator[int], top: Path) -> Iterator[str]:
    """The sources in a directory and those below it, hidden ones left out. ``seen`` counts what lies below ``top``."""
    if is_saved(folder):
        yield str(folder)
    elif (folder / _SAVED_SPLITS).is_file():
        yield str(_split_of(folder, split))
    else:
        entries = _entries(folder)
        if any((folder / name).is_file() for name in _SAVED) and any(path.suffix == ".arrow" for path in entries):
            missing = next(name for name in _SAVED if not (folder / name).is_file())
            raise DataError(f"{folder}: a folder of Dataset.save_to_disk without {missing}; expected both of "
                            f"{', '.join(_SAVED)}; it may be incomplete: copy it again")  # fmt: skip
        for path in entries:
            if next(seen) > MAX_ENTRIES:
                raise DataError(f"{top}: more than {MAX_ENTRIES} files and folders; expected a directory of data; "
                                "name the files, or a directory further down")  # fmt: skip
            if path.name.startswith("."):
                continue
            if path.is_dir():
                # Links may lead in a circle.
                yield from () if path.is_symlink() else _inside(path, split, seen, top)
            elif suffix_of(path) in FORMATS and path.is_file():
                yield _readable(str(path))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}); expected a readable directory; check its permissions"
        ) from error


def _split_of(folder: Path, split: str) -> Path:
    """The folder of one split of a saved DatasetDict."""
    folders = sorted(path for path in folder.iterdir() if is_saved(path))
    chosen = [path for path in folders if path.name == split] or folders
    if len(chosen) != 1:
        names = ", ".join(str(path) for path in folders) or "none"
        raise DataError(f"{folder}: a saved DatasetDict without a split {split!r} (its splits: {names}); expected "
                        "one; give the path of the split's folder")  # fmt: skip
    return chosen[0]


def _readable(source: str) -> str:
    path = Path(source)
    if printable(source) != source:  # bytes that are not UTF-8; no report could name the file
        raise DataError(f"{printable(source)}: the name is not in UTF-8; expected a name that is; rename it")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(
            f"{source}: cannot be read ({error.strerror}); expected a readable file; check its permissions"
        ) from error
    if path.stat().st_size == 0:
        raise DataError(f"{source}: the file is empty; expected at least one record; check how it was written")
    return source


def source_name(source: str) -> str:
    """What ``source`` of a record defaults to: the stem of the file, the name of the folder or of the hub data set."""
    if is_hub_id(source):
        return source.split("/")[1].split(":")[0]
    return Path(source).name if Path(source).is_dir() else stem_of(source)


def fills_nulls(source: str) -> bool:
    """Whether the source is a table, where every object of a column has the fields of all of them."""
    return is_hub_id(source) or Path(source).is_dir() or suffix_of(source) == ".parquet"


def iter_source(source: str, split: str, revision: str | None = None, wanted: Wanted = None) -> Iterator[Item]:
    """The records of one file, saved data set or hub id (of that split and revision) in order.

    Args:
      wanted: places in the order of the records, from 0 and ascending; the values of others may be None, and those
        behind the last may be left out. None: all.
    """
    if is_hub_id(source) or Path(source).is_dir():
        return _iter_rows(_load(source, split, revision), wanted)
    if is_url(source):
        return _iter_url(source, wanted)
    return FORMATS[suffix_of(source)].read(source, wanted)


def count_records(source: str) -> int | None:
    """How many records a file or saved data set holds; None where that cannot be told without decoding them."""
    if Path(source).is_dir():
        return len(_load_saved(source))
    return None if is_hub_id(source) else FORMATS[suffix_of(source)].count(_local(source))


def unpacked_size(source: str) -> int:
    """Size of the content of a file or URL, decompressed."""
    return unpacked_bytes(_local(source))


def divide(sources: Sequence[str], split: str, count: int) -> list[list[tuple[int, range | None]]]:
    """For each of ``count`` readers what it reads: positions in ``sources``, and of each the places of the records that
    are its own (None: all of them). In the order of the readers that is every record once, in order.

    About as many bytes for each: a source is cut where ranges of it can be read (plain JSON lines, Parquet, saved and
    hub data sets), and else goes to one reader whole.
    """
    sizes = [_size(source, split) for source in sources]
    total, begin = sum(sizes), 0
    shares: list[list[tuple[int, range | None]]] = [[] for _ in range(count)]
    bounds = [total * k // count for k in range(count + 1)]
    for number, (source, size) in enumerate(zip(sources, sizes)):
        owners = [k for k in range(count) if bounds[k] < begin + size and begin < bounds[k + 1]]
        records = (_records_by_range(source, split) or 0) if len(owners) > 1 else 0
        if records:
            places = [records * min(max(bound - begin, 0), size) // size for bound in bounds]
            for k in owners:
                shares[k].append((number, range(places[k], places[k + 1])))
        else:
            shares[owners[0]].append((number, None))
        begin += size
    return shares


def _size(source: str, split: str) -> int:
    if is_hub_id(source) or Path(source).is_dir():
        return max(1, _load(source, split).data.nbytes)
    return Path(_local(source)).stat().st_size


def _records_by_range(source: str, split: str) -> int | None:
    """How many records the source holds; None where ranges of it cannot be read, and where it is damaged: whoever reads
    it says so."""
    if is_hub_id(source) or Path(source).is_dir():
        return len(_load(source, split))
    kind = FORMATS[suffix_of(source)]
    try:
        return kind.count(_local(source)) if kind.by_range else None
    except (OSError, ValueError, DataError):
        return None


def source_signature(source: str, split: str) -> list[Any]:
    """What changes when the records of the source do: the source, the split of hub data, and the content of the files
    (large ones: path, size and time)."""
    if is_hub_id(source):
        # The prepared files, whose paths hold the revision.
        return [source, split, *(file["filename"] for file in _load_hub(source, split).cache_files)]
    if is_url(source):
        try:
            return [source, *identity(source)]
        except UserError as error:
            raise DataError(str(error)) from error
    path = Path(source)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [source, *(part for file in files for part in file_signature(file))]


def _iter_rows(dataset: Any, wanted: Wanted) -> Iterator[Item]:
    """Rows of a data set of the datasets library, a block at a time."""
    row = 0
    if isinstance(wanted, range):
        yield from ((row, None) for row in range(1, wanted.start + 1))
        row, dataset = wanted.start, dataset.select(wanted)
    elif wanted is not None:
        chosen = frozenset(wanted)
        yield from ((row, dataset[row - 1] if row - 1 in chosen else None) for row in range(1, len(dataset) + 1))
        return
    for block in dataset.iter(_ROWS):
        for values in zip(*block.values()):
            row += 1
            yield row, dict(zip(block, values))


def _load(source: str, split: str, revision: str | None = None) -> Any:
    return _load_hub(source, split, revision) if is_hub_id(source) else _load_saved(source)


def _load_saved(source: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(source)
    except Exception as error:  # the library raises a dozen unrelated types
        raise DataError(
            f"{source}: not a readable folder of Dataset.save_to_disk ({_reason(error)}); expected its Arrow files; it "
            "may be incomplete: copy it again, or write the data with Dataset.to_parquet"
        ) from error


def _load_hub(source: str, split: str, revision: str | None = None) -> Any:
    import datasets

    name, _, config = source.partition(":")
    try:
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        return datasets.load_dataset(name, config or None, split=split, **options)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(
            f"{source}: no such file here, and the hub did not give its split {split!r} ({_reason(error)}); expected "
            "data; check the spelling, the split and the connection, or download the data and give the path of the "
            "files"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
