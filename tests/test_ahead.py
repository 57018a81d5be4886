"""Programs compiled ahead are those that the passes ask for, and nothing depends on whether they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from ntkjax.ahead import Ahead, Program, compiled_ahead, worthwhile


def program(name: str, size: int, begun: threading.Event | None = None) -> Program:
    def lower() -> jax.stages.Lowered:
        if begun is not None:
            begun.set()
        return jax.jit(lambda x: x + size).lower(jax.ShapeDtypeStruct((size,), jnp.float32))

    return Program(name, lower)


def test_it_waits_for_the_programs_of_one_name_and_tells_nobody_what_went_wrong() -> None:
    let_go, order = threading.Event(), []

    def fails() -> jax.stages.Lowered:
        let_go.wait()
        order.append("failed")
        raise ValueError("no such program")

    with compiled_ahead(lambda: [Program("scores", fails)], threads=1) as ahead:
        ahead.wait("another name")
        assert not order
        let_go.set()
        ahead.wait("scores")
        assert order == ["failed"]


def test_what_cannot_be_asked_is_told_nobody() -> None:
    def asked() -> Iterator[Program]:
        yield program("step", 3)
        raise ValueError("no batches")

    with compiled_ahead(asked, threads=1) as ahead:
        ahead.wait("step")


def test_what_has_not_begun_when_the_block_ends_is_not_compiled() -> None:
    let_go, late = threading.Event(), threading.Event()

    def slow() -> jax.stages.Lowered:
        let_go.wait()
        return program("slow", 5).lower()

    with compiled_ahead(lambda: [Program("slow", slow), program("late", 7, late)], threads=1) as ahead:
        pass
    let_go.set()
    ahead.wait("slow")
    ahead.wait("late")
    assert not late.is_set()


def test_without_threads_nothing_is_asked() -> None:
    with compiled_ahead(lambda: pytest.fail("asked"), threads=0) as ahead:
        ahead.wait("anything")
    Ahead().wait("anything")


def test_a_cpu_compiles_nothing_ahead() -> None:
    assert worthwhile(None) == 0
