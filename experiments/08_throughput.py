"""Question: how many examples a second do ntkjax and the tools people use today score, on the same machine and model?

Command:  make peers        (once: a virtual environment each for torch, TRAK, dattri and bergson, under build/peers)
          python experiments/08_throughput.py --model ../shared/models/cot-lm-7m --data ../shared/data
          python experiments/08_throughput.py            (the embedded model, a few minutes: does it all run?)
Hardware: CPU, nothing else running; ``taskset`` decides the cores, and every worker gets as many threads.
Runtime:  10 minutes at most on 4 quiet cores: rounds stop when --minutes are over (at least one is finished).
Expect:   experiments/README.md, "Against what people use today".

One checkpoint, one LoRA adapter (r = 16 on all linear layers, written by `save_adapter` and read by PEFT), one padded
length, the same examples. Each tool runs in a process of its own that loads and compiles once (experiments/peers); in
every round each makes one pass over its examples, one after the other, and a ratio is taken within a round. Slow tools
get fewer examples, in one batch: their sketches cost mostly what drawing the signs costs, once a batch, so one large
batch is to their advantage. Before that all compute the kernel of a few examples, and must agree with ours.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import script

from ntkjax.assets import tiny_lm_path, write_planted_task
from ntkjax.data import TokenisedDataset, read_records, tokenise
from ntkjax.errors import UserError
from ntkjax.models import LanguageModel, LoraConfig, load_lm, save_adapter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))
import throughput_report as report  # noqa: E402
from worker_protocol import Worker, WorkerError  # noqa: E402

SKETCHES = {
    "rademacher": ("ntkjax.ntk.sketch", "RademacherSketch"),
    "sparse": ("ntkjax.ntk.sparse", "SparseSketch"),
    "kronecker": ("ntkjax.ntk.kronecker", "KroneckerSketch"),
}
PEERS = {
    "torch": ("scores", "gradients"),
    "trak": ("features", "gradients"),
    "dattri": ("features", "gradients"),
    "bergson": ("dense", "per_module", "gradients"),
}
DENSE = ("torch scores", "trak features", "dattri features", "bergson dense")
AGREE = 1e-3  # relative Frobenius distance of two exact kernels in float32; what differs by more is something else


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Measure examples per second of ntkjax and its peers, and write ratios, a table and a plot."""

    model: str | None = None
    """A checkpoint in Hugging Face format; the embedded model by default."""
    data: Path | None = None
    """Folder with finance/ and pool/, for a checkpoint."""
    length: int | None = None
    """Padded length in tokens; by default 128, 32 for the embedded model."""
    size: int = 8192
    """K, the numbers that a sketch keeps."""
    score_rows: int = 512
    """Pool examples in one pass of ntkjax's scores."""
    feature_rows: int = 256
    """Pool examples in one pass of ntkjax's sketched features."""
    gradient_rows: int = 128
    """Pool examples in one pass of ntkjax's gradients."""
    peer_rows: int = 32
    """Pool examples in one pass of a peer."""
    peer_batch: int = 32
    """Examples in a batch of a peer: for 32 plain torch needed 3.5 GiB and TRAK 4.4."""
    token_budget: int = 2048
    """Tokens in a batch of ntkjax: on a CPU less than the default of `select`, so that caches hold the activations."""
    devices: int = 2
    """Simulated devices that ntkjax spreads the batches of scores over: while one computes what is no matrix product,
    the cores have the other's. (A sketch would draw its signs on each.)"""
    microbatch: int = 16
    """Rows that ntkjax differentiates at a time for features."""
    memory_mib: int = 512
    """Gradients that ntkjax gathers before one application of a dense sketch."""
    checked: int = 8
    """Examples whose kernels are compared."""
    rounds: int = 5
    minutes: float = 10.0
    """No round starts that would probably end later than this."""
    only: tuple[str, ...] = ()
    """Peers to run; all of them by default."""
    run: Path = Path("runs/08_throughput")
    bench: Path | None = None
    """File for the ratios; build/bench.json for a checkpoint, for the embedded model one beside its results."""
    results: Path = HERE / "results" / "08_throughput"

    @property
    def name(self) -> str:
        """What the results are filed under."""
        return "embedded" if self.model is None else Path(self.model).resolve().name


def sketches() -> dict[str, tuple[str, str]]:
    """Those of `SKETCHES` that this version of ntkjax has."""
    return {name: where for name, where in SKETCHES.items() if importlib.util.find_spec(where[0])}


def texts(config: Throughput, folder: Path) -> tuple[str, Path, Path]:
    """(model, pool, domain) of a checkpoint, or of the embedded model's generated task."""
    if config.model is None:
        task = write_planted_task(folder / "data", 7)
        return str(tiny_lm_path()), task["pool"], task["train"]
    if config.data is None:
        raise UserError("--model needs --data: the folder with finance/ and pool/")
    return config.model, config.data / "pool" / "cot-01.jsonl", config.data / "finance" / "train.jsonl"


def adapter(model: LanguageModel) -> Any:
    """A fresh adapter whose B is drawn as well: at B = 0 half of all gradients would vanish."""
    rng = np.random.default_rng(0)
    drawn = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape), leaf.dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: drawn(leaf) if path[-1].key == "lora_b" else leaf, model.lora
    )


def padded(data: TokenisedDataset, rows: int, length: int, prefix: str) -> dict[str, np.ndarray]:
    """The first ``rows`` examples that fill more than half of ``length``; repeated where there are too few."""
    long = np.flatnonzero(data.lengths > length // 2)
    if not len(long):
        raise UserError(f"no example is longer than {length // 2} tokens: choose a smaller --length")
    batch = data.collate(np.resize(long, rows), length=length)
    chosen = data.subset(np.resize(long, rows))
    return {f"{prefix}_tokens": np.asarray(batch.tokens), f"{prefix}_lengths": chosen.lengths,
            f"{prefix}_starts": chosen.response_starts}  # fmt: skip


def prepare(config: Throughput, folder: Path) -> dict[str, Any]:
    """Write adapter, examples and task.json for the workers; what task.json holds."""
    folder.mkdir(parents=True, exist_ok=True)
    path, pool_text, domain_text = texts(config, folder)
    model = load_lm(path, lora=LoraConfig(rank=16))
    length = config.length or (32 if config.model is None else 128)
    read = lambda text: tokenise(read_records([str(text)]), model.tokenizer, max_length=length)
    rows = max(config.score_rows, config.feature_rows, config.gradient_rows, config.peer_rows, config.checked)
    held = padded(read(pool_text), rows, length, "pool") | padded(read(domain_text), config.checked, length, "domain")
    save_adapter(folder / "adapter", model, adapter(model))
    np.savez(folder / "examples.npz", **held)
    names = [f"features-{name}" for name in sketches()]
    task = {
        "model": str(Path(path).resolve()), "adapter": str((folder / "adapter").resolve()),
        "examples": str((folder / "examples.npz").resolve()), "length": length, "size": config.size,
        "threads": len(os.sched_getaffinity(0)), "checked": config.checked, "devices": config.devices,
        "batch": max(config.devices, config.token_budget // length),
        "microbatch": config.microbatch, "memory_budget": config.memory_mib << 20, "sketches": sketches(),
        "our_rows": {"scores": config.score_rows, "gradients": config.gradient_rows}
        | dict.fromkeys(names, config.feature_rows),
        "peer_rows": config.peer_rows, "peer_batch": config.peer_batch,
        "parameters": int(sum(leaf.size for leaf in jax.tree.leaves(model.lora))),
        "padding": float(1 - held["pool_lengths"].mean() / length),
    }  # fmt: skip
    (folder / "task.json").write_text(json.dumps(task, indent=2) + "\n")
    return task


def commands(config: Throughput, task: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """Variant ("trak features") -> the command of its worker."""
    file = str(folder / "task.json")
    workers = {
        f"ntkjax {variant}": [sys.executable, str(HERE / "peers" / "run_ntkjax.py"), file, variant]
        for variant in task["our_rows"]
    }
    for peer, variants in PEERS.items():
        if not config.only or peer in config.only:
            python = HERE.parent / "build" / "peers" / peer / "bin" / "python"
            script = str(HERE / "peers" / f"run_{peer}.py")
            workers |= {f"{peer} {variant}": [str(python), script, file, variant] for variant in variants}
    return workers


def environment(task: dict[str, Any]) -> dict[str, str]:
    """The same threads for everyone, nothing from a hub, quiet libraries."""
    threads = str(task["threads"])
    return os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads,
                         "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1",
                         "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": "",
                         "XLA_FLAGS": f"--xla_force_host_platform_device_count={task['devices']}"}  # fmt: skip


class Field:
    """The workers in a run, and what became of each."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.facts: dict[str, dict[str, Any]] = {}  # note, versions, rows, peak
        self.seconds: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.failed: dict[str, str] = {}

    def start(self, chosen: dict[str, list[str]], env: dict[str, str], logs: Path) -> None:
        """Start all, then wait until each is ready."""
        for name, command in chosen.items():
            try:
                self.workers[name] = Worker(command, log=logs / f"{name.replace(' ', '-')}.log", env=env)
            except WorkerError as error:
                self.fail(name, f"{error}\nnot installed? `make peers` says why")
        for name, worker in list(self.workers.items()):
            try:
                self.facts[name], self.seconds[name], self.cpu[name] = worker.ready(timeout=600), [], []
            except WorkerError as error:
                self.workers.pop(name).close()
                self.fail(name, str(error))

    def ask(self, name: str, what: str, **more: Any) -> dict | None:
        """One answer, or None if the worker has failed by now."""
        try:
            return self.workers[name].ask(what, timeout=900, **more)
        except WorkerError as error:
            self.workers.pop(name).close()
            self.fail(name, str(error))
            return None

    def fail(self, name: str, why: str) -> None:
        """Note that ``name`` gives no result."""
        self.seconds.pop(name, None)
        self.failed[name] = why.strip()
        print(f"{name}: FAILED: {why.strip().splitlines()[-1]}", flush=True)

    def close(self) -> None:
        """End all."""
        for worker in self.workers.values():
            worker.close()


def agreement(field: Field, folder: Path) -> dict[str, dict[str, float]]:
    """Every variant's kernel of the few examples against ours; one that differs is taken out of the run."""
    held: dict[str, dict[str, np.ndarray]] = {}
    for name in list(field.workers):
        path = (folder / f"check-{name.replace(' ', '-')}.npz").resolve()
        if field.ask(name, "check", out=str(path)):
            with np.load(path) as file:
                held[name] = dict(file)
    ours = held["ntkjax scores"]
    distances = {name: report.compare_kernels(evidence, ours) for name, evidence in held.items()}
    for name, row in distances.items():
        print(f"{name:28s} " + "  ".join(f"{key} {value:.2e}" for key, value in row.items()), flush=True)
        worst = max(row.get("kernel", 0.0), row.get("scores", 0.0))
        if not worst <= AGREE:
            field.workers.pop(name).close()
            field.fail(name, f"its kernel or scores differ from ours by {worst:.2e}: not the same gradients")
    return distances


def rounds(field: Field, config: Throughput, began: float) -> int:
    """Interleaved passes of all workers until the rounds or the minutes are over; how many rounds there were."""
    for name in [n for n in field.workers if n.startswith("ntkjax")]:
        field.ask(name, "run")  # compiles
    longest = 0.0
    for number in range(config.rounds):
        started = time.monotonic()
        if number and started - began + longest > 60 * config.minutes:
            return number
        for name in list(field.workers):
            answer = field.ask(name, "run")
            if answer:
                field.seconds[name].append(answer["seconds"])
                field.facts[name]["rows"] = answer["rows"]
                field.cpu[name].append(answer["cpu"])
                print(f"{name:28s} {answer['rows'] / answer['seconds']:9.3f} examples/s", flush=True)
        longest = max(longest, time.monotonic() - started)
        print(f"round {number + 1}: {time.monotonic() - started:.0f} s", flush=True)
    return config.rounds


def measure(config: Throughput, task: dict[str, Any], folder: Path) -> tuple[Field, dict, int]:
    """Start the workers, compare, time; (the field, agreement, rounds)."""
    field, began, env = Field(), time.monotonic(), environment(task)
    try:
        field.start(commands(config, task, folder), env, folder / "logs")
        agreed = agreement(field, folder)
        done = rounds(field, config, began)
        for name in list(field.workers):
            answer = field.ask(name, "memory")
            if answer:
                field.facts[name]["peak"] = answer["peak"]
    finally:
        field.close()
    return field, agreed, done


def main(config: Throughput) -> None:
    """Measure, print and write."""
    folder = config.run / config.name
    task = prepare(config, folder)
    field, agreed, done = measure(config, task, folder)
    rates = {n: [field.facts[n]["rows"] / s for s in seconds] for n, seconds in field.seconds.items() if seconds}
    busy = {n: [field.facts[n]["rows"] / s for s in field.cpu[n]] for n in rates}
    gradients = tuple(f"{peer} gradients" for peer in PEERS)
    ratios = report.ratios(rates, dense=DENSE, gradients=gradients)
    for name, ratio in ratios.items():
        print(f"{name:44s} {ratio['median']:7.2f}   [{ratio['low']:.2f}, {ratio['high']:.2f}]  {ratio['against']}")
    kept = config.results / config.name
    argv = ["python", "experiments/08_throughput.py", *sys.argv[1:]]
    report.write(kept, report.Run(argv, task, done, rates, busy, field.facts, agreed, field.failed, ratios, DENSE))
    bench = config.bench or (kept / "bench.json" if config.model is None else Path("build/bench.json"))
    report.merge_bench(bench, ratios)
    print(f"written: {kept}, {bench}")


if __name__ == "__main__":
    script.start(main, Throughput)
