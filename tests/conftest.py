"""Settings and fixtures that every test shares."""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices, so that sharding is tested on any machine; one device remains the default.
# Tests compile many small programs and run each a few times: the compiler's expensive passes do not pay.
_flags = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
)
if version("jaxlib").startswith("0.10."):  # compiles in a third of the time; newer versions abort at the flag
    _flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _flags)
os.environ.setdefault("NTKJAX_PROGRAMS", "off")  # not the user's own: those of the tests are kept apart, below
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook  # noqa: E402

PACKAGE = Path(__file__).resolve().parents[1] / "ntkjax"
# Shapes, dtypes and types are checked in every module that annotates arrays. In the others, which move text and tables,
# the types are for pyright: checking every call took 15% of the time of tests/commands/test_adapting.py.
install_import_hook(
    [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ],
    "beartype.beartype",
)

import jax  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402

from ntkjax.pipeline.programs import processor  # noqa: E402

GIGABYTE = 1 << 30
MAX_REGIONS = 32_000

# Compiled programs are kept from run to run of the suite (`make clean` removes them). The variables are for processes
# that tests start.
_programs: dict[str, str | float] = {
    "jax_compilation_cache_dir": str(PACKAGE.parent / "build" / "test-programs" / processor()),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
if not any(name.upper() in os.environ for name in _programs):
    for name, value in _programs.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)
# Every full collection walks some millions of objects of the libraries: a tenth of the time at Python's own threshold.
gc.set_threshold(50_000)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for the duration of one test: where the mathematics is exact, 1e-10 is asked for."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def full_disk(monkeypatch) -> Callable[[], AbstractContextManager]:
    """``with full_disk():``: no file reaches the disk, as where a file system finds out late that it is full."""

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def full():
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", refuse)
            yield

    return full


@pytest.fixture(scope="session")
def load_file() -> Callable[[Path], ModuleType]:
    """``load_file(path)``: a module outside the package: tests and experiments are none, and names may start with a
    digit. Modules beside it are found, as when it is run."""

    def load(path: Path) -> ModuleType:
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        spec = importlib.util.spec_from_file_location(f"file_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look themselves up there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and checkpoints beside the repository; tests that use it skip where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data").is_dir():
        pytest.skip("no ../shared beside this checkout")
    return path


@pytest.fixture(scope="session")
def _memory() -> dict[str, int]:
    """Bytes that this process held when its compiled programs were last dropped."""
    return {"at_last": psutil.Process().memory_info().rss}


def _mapped_regions() -> int:
    """Regions of memory that this process has mapped; 0 where the system does not tell."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(autouse=True)
def _spare_memory(_memory: dict[str, int]):
    """Compiled programs pile up to gigabytes over the whole suite, and each maps a few regions of the 65,530 that Linux
    allows a process, beyond which the compiler crashes: drop them where this process has grown by one gigabyte or is
    half way there."""
    yield
    if psutil.Process().memory_info().rss > _memory["at_last"] + GIGABYTE or _mapped_regions() > MAX_REGIONS:
        jax.clear_caches()
        _memory["at_last"] = psutil.Process().memory_info().rss


@pytest.fixture(scope="session", autouse=True)
def _data_cache(tmp_path_factory: pytest.TempPathFactory):
    """Prepared data of the tests stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NTKJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_toy_tokenizer(chat: bool = False):
    """One token per byte (4 + its rank in the byte alphabet), ids 0 pad, 1 end, 2 user, 3 assistant."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>")
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
            "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        )
    return tokenizer


@pytest.fixture(scope="session")
def toy_tokenizer():
    """A byte-level tokenizer without a chat template: prompt, line break, response, end token."""
    return make_toy_tokenizer()


@pytest.fixture(scope="session")
def toy_chat_tokenizer():
    """The same tokenizer with a chat template."""
    return make_toy_tokenizer(chat=True)


def pytest_terminal_summary(terminalreporter):
    """The agreement of the exact kernels, backend by backend, as the tests recorded it (from every worker)."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.getreports(outcome)]
    found = [value for r in reports for name, value in getattr(r, "user_properties", ()) if name == "agreement"]
    if not found:
        return
    columns = list(dict.fromkeys(backend for _, backend, _ in found))
    table = {(row, backend): value for row, backend, value in found}
    terminalreporter.section("exact kernels: largest deviation from jax.jacobian, relative to the largest entry")
    terminalreporter.line(" " * 36 + "".join(f"{name.replace('neural-tangents', 'nt'):>20}" for name in columns))
    for row in dict.fromkeys(row for row, _, _ in found):
        cells = [f"{table[row, c]:20.1e}" if (row, c) in table else " " * 19 + "-" for c in columns]
        terminalreporter.line(f"{row:36}" + "".join(cells))
