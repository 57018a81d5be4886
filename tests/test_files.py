"""Files appear whole or not at all: a full disk, a kill or a folder without permission leaves the old content."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ntkjax import files
from ntkjax.errors import CheckpointError, DataError, UserError


def write_table(path: Path, text: str) -> None:
    with files.written_file(path) as work:
        pq.write_table(pa.table({"text": [text]}), work)


WRITERS = {
    "bytes": lambda path, text: files.write_bytes(path, text.encode()),
    "text": files.write_text,
    "json": files.write_json,
    "lines": lambda path, text: files.write_lines(path, [text]),
    "jsonl": lambda path, text: files.write_jsonl(path, [text]),
    "npz": lambda path, text: files.write_npz(path, {"a/b": np.array(text)}),
    "compressed": lambda path, text: files.write_npz(path, {"a/b": np.array(text)}, compressed=True),
    "library": write_table,
}
READERS = {
    "bytes": lambda path: path.read_bytes().decode(),
    "text": lambda path: path.read_text(encoding="utf-8"),
    "json": files.read_json,
    "lines": lambda path: path.read_text(encoding="utf-8").removesuffix("\n"),
    "jsonl": files.read_json,
    "npz": lambda path: str(np.load(path)["a/b"]),
    "compressed": lambda path: str(np.load(path)["a/b"]),
    "library": lambda path: pq.read_table(path)["text"][0].as_py(),
}
every_writer = pytest.mark.parametrize("kind", WRITERS)


@every_writer
def test_what_is_written_is_read_back_with_the_mode_of_other_files(tmp_path, kind):
    path, before = tmp_path / "deep" / "file", os.umask(0o027)
    try:
        WRITERS[kind](path, "größe")
        WRITERS[kind](path, "grün")
    finally:
        os.umask(before)
    assert READERS[kind](path) == "grün"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@every_writer
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, kind, full_disk):
    path = tmp_path / "file"
    WRITERS[kind](path, "old")
    with full_disk(), pytest.raises(UserError, match=r"/file: cannot be written \(No space left .*Free some space"):
        WRITERS[kind](path, "new")
    assert READERS[kind](path) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


# Killed at the last moment at which the old file is still there: everything is written, nothing is renamed.
KILLED = """
import os, signal, sys
from pathlib import Path
from ntkjax import files
Path.replace = Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "file":
    files.write_text(sys.argv[1], "new")
else:
    with files.written_folder(sys.argv[1]) as work:
        (work / "a").write_text("new")
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_between_writing_and_renaming_leaves_the_old_one(tmp_path, kind):
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    content = path / "a" if kind == "folder" else path
    content.write_text("old")
    root = str(Path(__file__).resolve().parents[1])
    code = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), kind], env=os.environ | {"PYTHONPATH": root}
    ).returncode
    assert code == -signal.SIGKILL
    assert content.read_text() == "old"
    left = {entry.name for entry in tmp_path.iterdir()} - {kind}
    assert len(left) == 1 and left.pop().startswith(f".{kind}.")


@every_writer
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path, kind):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\).*permissions"):
        WRITERS[kind](tmp_path / "file", "new")
    with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
        WRITERS[kind](tmp_path / "deep" / "file", "new")
    tmp_path.chmod(0o700)
    assert list(tmp_path.iterdir()) == []


@every_writer
def test_a_file_that_the_system_refuses_to_make_is_named(tmp_path, kind, monkeypatch):
    """The same for whoever may write anywhere: the system call refuses."""
    WRITERS[kind](tmp_path / "file", "old")

    def refuse(path, *rest):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(UserError, match=r"/file: cannot be written \(Permission denied\).*permissions"):
            WRITERS[kind](tmp_path / "file", "new")
    assert READERS[kind](tmp_path / "file") == "old"


@every_writer
def test_a_path_below_a_file_is_an_error_that_names_it(tmp_path, kind):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match=r"/file(/below)?: cannot be written"):
        WRITERS[kind](tmp_path / "file" / "below", "new")
    assert (tmp_path / "file").read_text() == "precious"


def test_an_error_while_the_content_is_made_is_raised_as_it_is(tmp_path):
    path = files.write_text(tmp_path / "file", "old")

    def lines():
        yield "new"
        raise DataError("data.jsonl:3: not a record")

    with pytest.raises(DataError, match="not a record"):
        files.write_lines(path, lines())
    with pytest.raises(FileNotFoundError), files.written_file(path):
        (tmp_path / "another").read_text()
    with pytest.raises(TypeError):
        files.write_json(path, object())
    with pytest.raises(ValueError, match="Out of range"):
        files.write_jsonl(path, [1.0, float("nan")], allow_nan=False)
    with pytest.raises(ValueError, match="allow_pickle"):
        files.write_npz(path, {"a": np.array([object()])})
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_error_keeps_its_cause_and_takes_the_class_asked_for(tmp_path, full_disk):
    with (
        full_disk(),
        pytest.raises(CheckpointError) as caught,
        files.written_file(tmp_path / "f", error=CheckpointError),
    ):
        pass
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC


# -- folders --


def fill(path: Path, names: dict[str, str], **options) -> None:
    with files.written_folder(path, **options) as work:
        for name, text in names.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)


def content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def test_a_folder_is_replaced_as_a_whole_or_file_by_file(tmp_path):
    path = tmp_path / "deep" / "folder"
    fill(path, {"a": "1", "b/c": "1"})
    assert content(path) == {"a": "1", "b/c": "1"}
    fill(path, {"a": "2", "part-1": "2"})
    assert content(path) == {"a": "2", "part-1": "2"}
    fill(path, {"b/c": "3", "part-2": "3"}, keep=True, stale=("part-*",))
    assert content(path) == {"a": "2", "b/c": "3", "part-2": "3"}
    assert [entry.name for entry in path.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("keep", [False, True])
def test_a_folder_that_cannot_be_written_is_as_it_was(tmp_path, keep, full_disk):
    path = tmp_path / "folder"
    fill(path, {"a": "old", "b": "old"})
    with full_disk(), pytest.raises(UserError, match=r"folder.*: cannot be written \(No space left"):
        fill(path, {"a": "new"}, keep=keep)
    with pytest.raises(ValueError, match="stop"), files.written_folder(path, keep=keep) as work:
        (work / "a").write_text("new")
        raise ValueError("stop")
    assert content(path) == {"a": "old", "b": "old"} and [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_folder_whose_second_rename_fails_is_put_back(tmp_path, monkeypatch):
    path, rename = tmp_path / "folder", Path.rename
    fill(path, {"a": "old"})

    def refuse(source, target):
        if Path(target) == path and source.joinpath("b").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"folder: cannot be written \(Input/output error\)"):
        fill(path, {"b": "new"})
    assert content(path) == {"a": "old"} and [entry.name for entry in tmp_path.iterdir()] == ["folder"]


# -- reading --


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, r"f\.json: not found; ask again"),
        (b"{}\n\n{,}", r"f\.json:3: not valid JSON \(.+\); ask again"),
        (b"", r"f\.json:1: not valid JSON \(.+\); ask again"),
        (b'"\xff"', r"f\.json: not text in UTF-8 \(.+\); ask again"),
    ],
)
def test_json_that_cannot_be_read_names_the_file_and_the_remedy(tmp_path, written, message):
    if written is not None:
        (tmp_path / "f.json").write_bytes(written)
    with pytest.raises(DataError, match=message):
        files.read_json(tmp_path / "f.json", remedy="ask again", error=DataError)
    with pytest.raises(UserError, match=r"f\.json: cannot be read \(Is a directory\); remove it, or"):
        (tmp_path / "g" / "f.json").mkdir(parents=True)
        files.read_json(tmp_path / "g" / "f.json")


def test_a_log_drops_the_line_that_a_kill_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    files.append_json_line(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2')
    files.append_json_line(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    path.write_text('{"cut')
    files.drop_partial_line(path)
    assert path.read_text() == ""


# -- one place --


@pytest.mark.parametrize(
    ("damage", "message"), [("broken\n", "log.jsonl:2: not valid JSON"), ("3\n", "log.jsonl:2: expected a JSON object")]
)
def test_a_damaged_line_of_a_log_is_named(tmp_path, damage, message):
    path = tmp_path / "log.jsonl"
    assert files.read_json_lines(path) == []
    path.write_text('{"step": 1}\n{"step"')
    assert files.read_json_lines(path) == [{"step": 1}] and path.read_text() == '{"step": 1}\n'
    path.write_text('{"step": 1}\n' + damage)
    with pytest.raises(UserError, match=message):
        files.read_json_lines(path)


def test_no_other_module_renames_files_or_makes_temporary_ones():
    """`data/cache.py` publishes folders that several processes may build at once, of which the first counts, and
    `data/ingest.py` names a file within such a folder.
    """
    package = Path(files.__file__).parent
    spelled = ("os.replace(", "os.rename(", ".rename(", "mkstemp", "NamedTemporaryFile", "mkdtemp", "savez")
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in spelled)
    }
    assert found == {"files.py", "data/cache.py", "data/ingest.py"}
