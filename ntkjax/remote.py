"""Data and run directories in object stores: ``s3://bucket/path``, ``gs://bucket/path``, and what else fsspec knows.

An object is written whole and read whole: it cannot be appended to, renamed or mapped. So a command works in a
directory of this machine, with all the promises of `ntkjax.files` and `ntkjax.store`, and a `Mirror` brings the files
of the URL here first, sends what has changed every minute, and the rest at the end, also where the command fails. Files
are sent in the order in which they were written, marks of rows last, from a moment at which none was being written, so
that marks of what is done never arrive before what they mark: a command that is killed goes on from the URL, on this
machine or another.

Through fsspec, whose `s3fs` and `gcsfs` know the credentials of the environment. tensorstore has drivers for both
stores, but the marks of rows would not be ordered behind them, and all other files would need a second way.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ntkjax.errors import UserError
from ntkjax.files import read_json, write_json, written_file

SECONDS = 60.0
"""Between two times that a mirror sends what has changed: what the loss of a machine costs."""
TRIES = 50
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_IDENTITY = ("size", "ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "created")
_NOT_SENT = re.compile(r"(^|/)\.|\.tmp$|\.orbax-checkpoint-tmp|\.__lock$")
"""Files that exist only while another is written."""
_WHOLE = re.compile(r"(?:.*/)?checkpoints/\d+(?=/)")
"""Folders that appear whole on a disk, by renaming: of a training. Behind the last of its objects one more is sent."""
SENT = ".sent"
_ROW_MARKS = re.compile(r"(^|/)done(\.\d+)?\.bits$")
"""Files of `ntkjax.store` that say which rows are there."""


def is_url(text: str) -> bool:
    """Whether ``text`` begins with a scheme: ``s3://bucket/pool.jsonl``."""
    return _URL.match(text) is not None


def identity(url: str) -> list[str]:
    """What changes when the object does: its size, and of its hash and times those that the store gives.

    Raises:
      UserError: there is no such object, or the store cannot be asked.
    """
    store, path = _store(url)
    with _asked(url):
        return _identity(store.info(path))


def listing(url: str) -> list[str]:
    """URLs of the object ``url`` or, where it is a folder, of all objects below it, sorted; [] where there is neither.

    Raises:
      UserError: the store cannot be asked.
    """
    store, path = _store(url)
    with _asked(url):
        return sorted(url.rstrip("/") + name.removeprefix(path.rstrip("/")) for name in _find(store, path))


def fetch(url: str, folder: Path) -> Path:
    """A copy of the object ``url`` below ``folder``, by its name; made anew where the object has changed.

    Raises:
      UserError: there is no such object, it cannot be read, or there is no room.
    """
    copy = folder / _digest(url, *identity(url)) / url.rsplit("/", 1)[-1]
    if not copy.exists():
        store, path = _store(url)
        with written_file(copy) as work, _asked(url):
            store.get_file(path, str(work))
    return copy


class Mirror:
    """A directory of this machine that stands for a URL.

    Attributes:
      url: without a slash at its end.
      local: the directory. Beside it lies what was last sent or brought: state.json.
    """

    def __init__(self, url: str, folder: Path):
        """``folder``: where directories of all URLs lie, each below a name made from its URL."""
        self.url = url.rstrip("/")
        self._store, self._path = _store(self.url)
        self.local = folder / _digest(self.url) / self.url.rsplit("/", 1)[-1]
        self._state_file = self.local.parent / "state.json"
        self._lock = threading.Lock()

    def pull(self) -> None:
        """Bring what the URL holds, unless that was sent from here: then the directory is as far, or further.

        Raises:
          UserError: the store cannot be asked or read.
        """
        state, listed = self._state(), self._listed()
        differing = {name for name in {*listed, *state["remote"]} if listed.get(name) != state["remote"].get(name)}
        if differing <= set(state["sending"]):  # a kill while they were being sent
            return
        shutil.rmtree(self.local, ignore_errors=True)
        sent = self._listed(hidden=True)
        with _asked(self.url):
            for name in listed:
                whole = _WHOLE.match(name)
                if whole is not None and f"{whole[0]}/{SENT}" not in sent:  # a kill while it was being sent
                    continue
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                self._store.get_file(f"{self._path}/{name}", str(self.local / name))
        write_json(self._state_file, {"remote": listed, "local": self._files(), "sending": []})

    def probe(self) -> None:
        """Write an object there and remove it: what cannot be written is told before the work, not after it.

        Raises:
          UserError: the store cannot be written.
        """
        name = f"{self._path}/.ntkjax"
        try:
            self._store.pipe_file(name, b"")
        except Exception as error:
            raise UserError(
                f"{self.url}: cannot be written ({_reason(error)}); expected a folder in which objects "
                "may be made; check the address and your rights there, or choose another --out"
            ) from error
        with contextlib.suppress(Exception):  # an empty object that is never listed
            self._store.rm_file(name)

    def push(self) -> bool:
        """Send what has changed, oldest first, then remove what is gone. False where files were being written at this
        moment, and nothing was sent.

        Raises:
          UserError: the store cannot be written.
        """
        with self._lock:
            state, files = self._state(), self._files()
            # Marks of rows last of all: values that were added to a file after them give it a later time than theirs.
            order = lambda name: (_ROW_MARKS.search(name) is not None, files[name][1], name)
            changed = sorted((name for name in files if files[name] != state["local"].get(name)), key=order)
            gone = sorted(state["local"].keys() - files.keys())
            sending = self.local.parent / "sending"
            shutil.rmtree(sending, ignore_errors=True)
            if not changed and not gone:
                return True
            try:
                sending.mkdir(parents=True)
                for number, name in enumerate(changed):  # what is replaced now is still sent as it is
                    os.link(self.local / name, sending / str(number))
            except FileNotFoundError:
                return False
            # A linked inode is not used again, so those that still have their names have had them since.
            if self._files() != files:
                return False
            write_json(self._state_file, state | {"sending": [*changed, *gone]})
            ends = {whole[0]: name for name in changed if (whole := _WHOLE.match(name))}
            with _asked(self.url):
                for number, name in enumerate(changed):
                    self._store.put_file(str(sending / str(number)), f"{self._path}/{name}")
                    if (whole := _WHOLE.match(name)) and ends[whole[0]] == name:
                        self._store.pipe_file(f"{self._path}/{whole[0]}/{SENT}", b"")
                for folder in sorted({whole[0] for name in gone if (whole := _WHOLE.match(name))}):
                    self._store.rm_file(f"{self._path}/{folder}/{SENT}")
                for name in gone:
                    self._store.rm_file(f"{self._path}/{name}")
            write_json(self._state_file, {"remote": self._listed(), "local": files, "sending": []})
            shutil.rmtree(sending)
            return True

    def finish(self) -> None:
        """Send all that has changed. Raises as ``push``, and where files are being written all the time."""
        for _ in range(TRIES):
            if self.push():
                return
            time.sleep(0.1)
        raise UserError(
            f"{self.url}: not all was sent, since files in {self.local} are being written; expected none at the end of "
            "a command; run the same command again, which sends them"
        )

    def named(self, text: str) -> str:
        """``text`` with the URL in the place of the directory."""
        return text.replace(str(self.local), self.url)

    def _state(self) -> dict[str, Any]:
        empty = {"remote": {}, "local": {}, "sending": []}
        return empty | (read_json(self._state_file) if self._state_file.exists() else {})

    def _files(self) -> dict[str, list[int]]:
        """Of every file that is to be sent its size, time of the last change, and inode: of files that are replaced
        within one tick of the clock the times may be equal."""
        files = {}
        for path in self.local.rglob("*"):
            name = path.relative_to(self.local).as_posix()
            with contextlib.suppress(FileNotFoundError):
                if _NOT_SENT.search(name) is None and path.is_file():
                    stat = path.stat()
                    files[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        return files

    def _listed(self, *, hidden: bool = False) -> dict[str, list[str]]:
        with _asked(self.url):
            listed = _find(self._store, self._path)
        prefix = self._path.rstrip("/") + "/"
        names = {path.removeprefix(prefix): _identity(info) for path, info in listed.items() if path.startswith(prefix)}
        return names if hidden else {name: info for name, info in names.items() if _NOT_SENT.search(name) is None}


@contextlib.contextmanager
def mirrored(url: str, folder: Path, *, seconds: float = SECONDS) -> Iterator[Mirror]:
    """A `Mirror` of ``url``, filled from it; what changes in the block is sent every ``seconds`` and when it ends.

    Raises:
      UserError: the store cannot be read or written; of the block, with the URL in the place of the directory.
    """
    mirror, ended = Mirror(url, folder), threading.Event()
    mirror.pull()
    mirror.probe()

    def send() -> None:
        while not ended.wait(seconds):
            try:
                mirror.push()
            except UserError as error:  # the end tries again, and says so
                print(f"warning: {error}", file=sys.stderr)

    thread = threading.Thread(target=send, name="mirror", daemon=True)
    thread.start()
    try:
        yield mirror
    except BaseException as error:
        ended.set()
        thread.join()
        try:
            mirror.finish()
        except UserError as failure:
            print(f"warning: {failure}", file=sys.stderr)
        if isinstance(error, UserError):
            raise type(error)(mirror.named(str(error))) from error
        raise
    ended.set()
    thread.join()
    mirror.finish()


def _store(url: str) -> tuple[Any, str]:
    """The file system of fsspec for ``url``, and the path in it."""
    import fsspec

    scheme, _, rest = url.partition("://")
    if not rest.strip("/"):
        raise UserError(f"{url}: names no folder or object; expected one such as s3://bucket/path")
    options = {"auto_mkdir": True} if scheme in ("file", "local") else {}  # object stores have no folders to make
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        remedy = f"pip install 'ntkjax[{extra}]'" if extra else "install it"
        raise UserError(f"{url}: a package for {scheme}:// is missing ({error}); {remedy}") from error
    except ValueError as error:
        raise UserError(f"{url}: not a URL that fsspec knows ({error}); expected s3://, gs:// or a path") from error


def _find(store: Any, path: str) -> dict[str, dict[str, Any]]:
    store.invalidate_cache()
    try:
        return store.find(path, detail=True)
    except FileNotFoundError:
        return {}


def _identity(info: dict[str, Any]) -> list[str]:
    return [f"{name}={info[name]}" for name in _IDENTITY if info.get(name) is not None]


def _digest(*parts: str) -> str:
    return blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _reason(error: Exception) -> str:
    """Class and first line."""
    return f"{type(error).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


@contextlib.contextmanager
def _asked(url: str) -> Iterator[None]:
    """Errors of a store, which are of a dozen unrelated types, as one of ours."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{url}: not found; expected data or a run there; check the spelling") from error
    except Exception as error:
        raise UserError(
            f"{url}: the store cannot be used ({_reason(error)}); check the address, the credentials "
            "and the connection. What was finished is kept on this machine: run the same command again to go on"
        ) from error
