"""Runs and data in object stores: against a local S3 server where moto is installed, else in fsspec's own stores."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from ntkjax import remote
from ntkjax.cli import main
from ntkjax.commands.base import local_out
from ntkjax.data import read_records
from ntkjax.errors import ConfigError, DataError, UserError
from ntkjax.files import append_json_line, write_text
from ntkjax.models import ModelConfig, init_lm, save_merged
from ntkjax.remote import Mirror, fetch, is_url, listing, mirrored
from ntkjax.store import RowStore

HAS_S3 = all(importlib.util.find_spec(name) for name in ("moto", "s3fs", "flask"))
needs_s3 = pytest.mark.skipif(not HAS_S3, reason="needs s3fs and moto[server]")
STORES = ["memory", "file", pytest.param("s3", marks=needs_s3)]


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def base(request, tmp_path, monkeypatch) -> Iterator[str]:
    """The URL of an empty folder of a store."""
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        url = f"s3://bucket-{tmp_path.name.replace('_', '-').lower()[:50]}"
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(url.removeprefix("s3://"))
    else:
        url = {"memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/store"}[request.param]
    monkeypatch.setenv("NTKJAX_CACHE", str(tmp_path / "cache"))
    yield f"{url}/deep"
    if request.param == "memory":
        fsspec.filesystem("memory").store.clear()


def put(url: str, text: str) -> None:
    store, path = fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if url.startswith("file") else {}))
    store.pipe_file(path, text.encode())


def get(url: str) -> str:
    store, path = fsspec.core.url_to_fs(url)
    return store.cat_file(path).decode()


def names(url: str) -> list[str]:
    return [found.split(f"{url.split('://')[1]}/")[1] for found in listing(url)]


def test_what_a_url_is():
    urls = ["s3://b/k", "gs://b", "memory://x", "file:///x", "S3://b", "s3://"]
    assert all(map(is_url, urls)) and not any(map(is_url, ["owner/name", "a:b", "/x", "C:\\x", "s3:/b", "://x"]))


# -- run directories --


@pytest.mark.parametrize("base", STORES, indirect=True)
def test_a_run_is_sent_and_brought_back_elsewhere(base, tmp_path):
    url, here, there = f"{base}/run", tmp_path / "here", tmp_path / "there"
    with mirrored(url, here) as mirror:
        write_text(mirror.local / "config.yaml", "a: 1\n")
        write_text(mirror.local / "deep" / "er" / "x.txt", "x" * 5)
        append_json_line(mirror.local / "log.jsonl", {"n": 1})
        (mirror.local / ".config.yaml.ab12.tmp").write_text("half")
    assert names(url) == ["config.yaml", "deep/er/x.txt", "log.jsonl"]
    with mirrored(url, there) as mirror:
        assert (mirror.local / "deep" / "er" / "x.txt").read_text() == "x" * 5
        append_json_line(mirror.local / "log.jsonl", {"n": 2})
        (mirror.local / "deep" / "er" / "x.txt").unlink()
    assert names(url) == ["config.yaml", "log.jsonl"] and get(f"{url}/log.jsonl") == '{"n": 1}\n{"n": 2}\n'
    with mirrored(url, here) as mirror:  # another machine has gone further since
        assert (mirror.local / "log.jsonl").read_text().count("\n") == 2 and not (
            mirror.local / "deep/er/x.txt"
        ).exists()
    before = (here / mirror.local.parent.name / "state.json").read_text()
    with mirrored(url, here) as mirror:  # nothing has changed
        write_text(mirror.local / "late.txt", "")
    assert before != (mirror.local.parent / "state.json").read_text() and "late.txt" in names(url)


@pytest.mark.parametrize("base", STORES, indirect=True)
def test_what_a_failed_or_killed_command_did_is_kept(base, tmp_path):
    url = f"{base}/run"
    with pytest.raises(UserError, match=f"{url}/x.txt: bad"), mirrored(url, tmp_path / "a") as mirror:
        write_text(mirror.local / "x.txt", "done")
        raise ConfigError(f"{mirror.local}/x.txt: bad")
    assert get(f"{url}/x.txt") == "done"
    killed = Mirror(url, tmp_path / "a")  # never told to send: what it wrote is in its directory alone
    killed.pull()
    write_text(killed.local / "y.txt", "here")
    with mirrored(url, tmp_path / "a"):
        pass
    assert get(f"{url}/y.txt") == "here"


@pytest.mark.parametrize("base", ["memory"], indirect=True)
def test_a_kill_while_sending_loses_nothing(base, tmp_path, monkeypatch):
    url = f"{base}/run"
    mirror = Mirror(url, tmp_path / "a")
    mirror.pull()
    for k in range(5):
        write_text(mirror.local / f"{k}.txt", str(k))
    put_file, sent = type(mirror._store).put_file, []

    def dying(self: Any, source: str, target: str, **options: Any) -> None:
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(target.rsplit("/", 1)[-1])
        put_file(self, source, target, **options)

    monkeypatch.setattr(type(mirror._store), "put_file", dying)
    with pytest.raises(KeyboardInterrupt):
        mirror.push()
    monkeypatch.setattr(type(mirror._store), "put_file", put_file)
    assert sent == ["0.txt", "1.txt", "2.txt"] == names(url)  # in the order of writing
    with mirrored(url, tmp_path / "a") as again:
        assert len(list(again.local.iterdir())) == 5
    assert len(names(url)) == 5


@pytest.mark.parametrize("base", STORES, indirect=True)
def test_a_checkpoint_that_was_not_sent_whole_is_not_brought(base, tmp_path, monkeypatch):
    from ntkjax.training.loop import CHECKPOINTS

    url, folder = f"{base}/run", f"training/{CHECKPOINTS}"
    mirror = Mirror(url, tmp_path / "a")
    for step in (1, 2):
        for name in ("_METADATA", "d/0", "d/1"):
            write_text(mirror.local / folder / str(step) / name, f"{step} {name}")
        if step == 1:
            mirror.finish()
    put_file, sent = mirror._store.put_file, []

    def dying(source: str, target: str) -> Any:
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(target)
        return put_file(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mirror._store, "put_file", dying)
        mirror.push()
    steps = lambda where: sorted(path.name for path in (where.local / folder).iterdir())
    assert len([name for name in names(url) if "/2/" in name]) == 2
    with mirrored(url, tmp_path / "b") as elsewhere:
        assert steps(elsewhere) == ["1"] and (elsewhere.local / folder / "1" / "d" / "1").read_text() == "1 d/1"
    with mirrored(url, tmp_path / "a") as here:  # what was begun is sent whole
        assert steps(here) == ["1", "2"]
    with mirrored(url, tmp_path / "c") as elsewhere:
        assert steps(elsewhere) == ["1", "2"]
        shutil.rmtree(elsewhere.local / folder / "1")
    assert not [name for name in names(url) if f"{CHECKPOINTS}/1/" in name]


@pytest.mark.slow  # seconds or a minute, as the threads come to run
@pytest.mark.parametrize("base", ["memory"], indirect=True)
def test_marks_never_arrive_before_what_they_mark(base, tmp_path, monkeypatch):
    """A store of rows that grows while it is sent: at any moment the rows marked in the object store are there."""
    monkeypatch.setattr("ntkjax.store._FLUSH_SECONDS", 0.0)
    whole = lambda self, source, target, **_: self.pipe_file(target, Path(source).read_bytes())  # as in object stores
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.put_file", whole)
    url, seen = f"{base}/run", set()
    values = np.random.default_rng(0).normal(size=(400, 30)).astype(np.float32)
    opened = lambda folder: RowStore.open(folder / "rows", rows=400, width=30, dtype="float32", manifest={})
    finished = threading.Event()
    failures: list[BaseException] = []

    def look() -> None:
        try:
            while not finished.is_set():
                copy = tmp_path / f"copy-{len(seen)}"
                store, path = fsspec.core.url_to_fs(url)
                for name in sorted(
                    names(url), key=lambda name: ".bits" not in name
                ):  # marks first, as a kill may leave
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    (copy / name).write_bytes(store.cat_file(f"{path}/{name}"))
                if (copy / "rows" / "done.bits").exists():
                    with opened(copy) as rows:
                        done = np.flatnonzero(rows.done())
                        np.testing.assert_array_equal(rows.read(done), values[done])
                        seen.add(len(done))
                shutil.rmtree(copy, ignore_errors=True)
        except BaseException as error:
            failures.append(error)

    with mirrored(url, tmp_path / "a", seconds=0.01) as mirror:
        watcher = threading.Thread(target=look)
        with opened(mirror.local) as rows:
            watcher.start()
            for row in np.random.default_rng(1).permutation(400):
                rows.write([row], values[[row]])
    finished.set()
    watcher.join()
    assert not failures, failures
    assert len(seen) > 1, "nothing was sent meanwhile: the test has tested nothing"


def test_in_a_job_it_is_refused(monkeypatch):
    config = type("Config", (), {"out": "s3://bucket/run"})()
    monkeypatch.setattr("ntkjax.commands.base.process", lambda: (0, 2))
    with (
        pytest.raises(ConfigError, match="--out s3://bucket/run: the processes of a job share files"),
        local_out(config),
    ):
        pass


def test_what_cannot_be_used_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="nosuch://x/y: not a URL that fsspec knows"):
        Mirror("nosuch://x/y", tmp_path)
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda *a, **k: (_ for _ in ()).throw(ImportError("Install gcsfs")))
    with pytest.raises(
        UserError, match=r"a package for gs:// is missing \(Install gcsfs\); pip install 'ntkjax\[gcs\]'"
    ):
        Mirror("gs://x/y", tmp_path)


@pytest.mark.parametrize("url", ["S3://bucket/run", "s3://", "memory:///"])
def test_what_begins_like_a_url_is_never_a_folder_here(url, tmp_path):
    assert is_url(url)
    with (
        pytest.raises(UserError, match=r"not a URL that fsspec knows|names no folder or object"),
        mirrored(url, tmp_path),
    ):
        pass
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_written_is_said_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot be written .*choose another --out"),
        mirrored(f"file://{tmp_path}/file/run", tmp_path / "cache"),
    ):
        raise AssertionError("the work has begun")


@needs_s3
@pytest.mark.parametrize("base", ["s3"], indirect=True)
def test_a_bucket_that_is_not_there_is_named(base, tmp_path):
    with (
        pytest.raises(UserError, match="s3://no-such-bucket-here/run: "),
        mirrored("s3://no-such-bucket-here/run", tmp_path) as m,
    ):
        write_text(m.local / "x", "")


# -- data --


@pytest.mark.parametrize("base", STORES, indirect=True)
def test_data_of_urls_are_the_data_of_files(base, tmp_path):
    rows = [{"id": f"r{i}", "prompt": f"p{i}", "response": "r"} for i in range(9)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    put(f"{base}/pool/a.jsonl", text)
    put(f"{base}/pool/b.ndjson", text.replace('"id": "r', '"id": "s'))
    put(f"{base}/pool/readme.md", "no data")
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.jsonl").write_text(text)
    (tmp_path / "pool" / "b.ndjson").write_text(text.replace('"id": "r', '"id": "s'))
    there, here = read_records(f"{base}/pool"), read_records(tmp_path / "pool")
    assert list(there) == list(here) and there.fingerprint == here.fingerprint
    assert there.location(10) == f"{base}/pool/b.ndjson:2"
    assert list(there.originals([3])) == [rows[3]]
    put(f"{base}/pool/a.jsonl", json.dumps(rows[0]) + "\n{\n")
    with pytest.raises(DataError, match=f"{base}/pool/a.jsonl:2: not valid JSON"):
        read_records(f"{base}/pool")
    with pytest.raises(DataError, match="the file is gone or has changed"):
        there.originals([3])
    with pytest.raises(DataError, match=f"{base}/none: no such object or folder"):
        read_records(f"{base}/none")
    put(f"{base}/other/x.csv", "a,b")
    with pytest.raises(DataError, match=f"{base}/other: no data there"):
        read_records(f"{base}/other")
    assert fetch(f"{base}/other/x.csv", tmp_path / "copies").read_text() == "a,b"


# -- a command --


@pytest.mark.parametrize("base", STORES, indirect=True)
def test_a_selection_in_a_store_is_that_of_a_directory(base, tmp_path, toy_tokenizer, capsys):
    model = tmp_path / "model"
    config = ModelConfig(
        family="llama", vocab_size=260, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=24,
    )  # fmt: skip
    save_merged(model, init_lm(config, seed=0, tokenizer=toy_tokenizer), {})
    for name, count in (("domain", 4), ("pool", 12)):
        lines = "".join(
            json.dumps({"prompt": f"{name} {i}", "response": "yes " * (i + 1)}) + "\n" for i in range(count)
        )
        put(f"{base}/{name}.jsonl", lines)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    flags = ["--model", str(model), "--n", "3", "--method", "length", "--skip-warmup"]
    given = lambda root: ["--domain", f"{root}/domain.jsonl", "--pool", f"{root}/pool.jsonl", "--out", f"{root}/run"]
    assert main(["select", *flags, *given(str(tmp_path))]) == 0
    capsys.readouterr()
    for machine in ("one", "two"):  # a second one reads the first one's results back
        assert main(["select", *flags, *given(base)]) == 0
        said = capsys.readouterr()
        assert f"selected 3 examples: {base}/run/selected.jsonl" in said.out, machine
        assert ("holds the results of this command" in said.err) == (machine == "two")
        shutil.rmtree(tmp_path / "cache" / "runs")
    own = sorted(
        path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*") if path.is_file()
    )
    assert names(f"{base}/run") == own
    fetched = {name: fetch(f"{base}/run/{name}", tmp_path / "copies") for name in ("scores.parquet", "selected.jsonl")}
    table = pq.read_table(fetched["scores.parquet"])
    mine = pq.read_table(tmp_path / "run" / "scores.parquet")
    assert table.drop_columns(["file"]).equals(mine.drop_columns(["file"]))
    assert table["file"][0].as_py() == f"{base}/pool.jsonl"
    lines = [
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (fetched["selected.jsonl"], tmp_path / "run" / "selected.jsonl")
    ]
    assert [{**row, "file": ""} for row in lines[0]] == [{**row, "file": ""} for row in lines[1]]
    assert Path("s3:").exists() is Path("memory:").exists() is False
    assert remote.SECONDS > 0
