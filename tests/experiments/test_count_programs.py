"""The script that counts compiled programs."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "count_programs.py"


def test_every_shape_of_a_function_is_a_program(load_file, monkeypatch):
    script = load_file(SCRIPT)
    monkeypatch.setattr(script, "LARGE", 0.0)

    def command(arguments):
        assert arguments == ["doctor", "--n", "2"]

        def twice(x):
            return 2 * jnp.cos(x) + x

        fn = jax.jit(twice)
        for size in (3, 5, 3):
            fn(jnp.ones(size, jnp.float32))
        return 7

    monkeypatch.setattr(script, "main", command)
    found, code = script.count(["doctor", "--n", "2"])
    assert code == 7 and len(found.seconds["twice"]) == 2
    table = {row["function"]: row["programs"] for row in script.rows(found)}
    assert table["twice"] == 2 and table["all, small ones too"] >= 2
