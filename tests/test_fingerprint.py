"""Digests stand in names and manifests on disk: their values are those that earlier versions wrote."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from ntkjax.fingerprint import digest, tree_digest, weights_fingerprint

TREE = {"a": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.array([1, -1], np.int8)}


def test_digests_are_those_that_stand_on_disk():
    assert digest("a", 1, {"b": [2.5, None], "ü": True}) == "9befb910d2accf35e56ecc9e79ae4df5"
    assert digest() == "7ebb3c7c2a87b1a2f8a7ed729ecb040d"
    assert tree_digest(TREE) == "a3154a777341e70f"
    on_device = {"a": {"w": jnp.asarray(TREE["a"]["w"])}, "b": jnp.asarray(TREE["b"])}
    assert weights_fingerprint(on_device) == "73ce9219182cf632"


def test_a_digest_of_settings_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len({digest(1), digest("1"), digest(1.0), digest([1]), digest(1, 1), digest(None), digest(True)}) == 7
    assert len(digest("\ud800")) == 32  # half a surrogate pair, which UTF-8 does not hold


def test_a_digest_of_arrays_sees_paths_shapes_types_and_every_bit():
    w, base = TREE["b"], tree_digest({"a": TREE["b"]})
    others = [{"b": w}, {"a": w[None]}, {"a": w.astype(np.int16)}, {"a": w.view(np.uint8)}, {"a": w, "b": w}, {}]
    others += [{"a": np.array([0.0])}, {"a": np.array([-0.0])}]
    assert len({base, *map(tree_digest, others)}) == 1 + len(others)
    assert tree_digest({"a": jnp.asarray(w)}) == base
