"""Batches: every example once, padded as promised, the same again; views keep tokens and records together."""

from __future__ import annotations

import json
import threading

import jax
import numpy as np
import pytest

from ntkjax.data import TokenisedDataset, concat, read_records, tokenise
from ntkjax.errors import ConfigError
from ntkjax.parallel import make_mesh
from ntkjax.types import predict_mask


def random_dataset(rng, n, longest=60, pad_id=0):
    lengths = rng.integers(2, longest, size=n)
    tokens = [rng.integers(1, 100, size=k).tolist() for k in lengths]
    starts = [int(rng.integers(1, k)) for k in lengths]
    return TokenisedDataset.from_sequences(tokens, starts, pad_id=pad_id), tokens, starts


@pytest.mark.parametrize("seed", range(25))
def test_plans(seed):
    rng = np.random.default_rng(seed)
    n, budget, multiple = int(rng.integers(1, 120)), int(rng.integers(8, 600)), int(rng.choice([1, 1, 4]))
    data, tokens, starts = random_dataset(rng, n, pad_id=7)
    indices = rng.permutation(n)[: rng.integers(1, n + 1)]
    plan = data.batches(token_budget=budget, indices=indices, max_buckets=4, row_multiple=multiple)
    seen, real, cells = [], 0, 0
    for k, batch in enumerate(plan):
        rows, length = batch.tokens.shape
        assert (rows, length) in plan.shapes
        assert length % 8 == 0 and rows % multiple == 0
        assert rows * length <= budget or rows == multiple
        assert batch.tokens.dtype == batch.lengths.dtype == batch.index.dtype == np.int32
        cells += rows * length
        for row, i in enumerate(batch.index):
            if i < 0:
                assert batch.lengths[row] == 1 and not batch.response_mask[row].any()
                assert (batch.tokens[row] == 7).all()
                continue
            seen.append(int(i))
            size = len(tokens[i])
            real += size
            assert batch.tokens[row].tolist() == tokens[i] + [7] * (length - size)
            assert batch.response_mask[row].tolist() == [starts[i] <= t < size for t in range(length)]
            assert batch.lengths[row] == size
        alone = plan[k]
        assert np.array_equal(alone.tokens, batch.tokens) and np.array_equal(alone.index, batch.index)
        assert (np.asarray(predict_mask(batch)).sum(1) == batch.response_mask.sum(1)).all()
    assert sorted(seen) == sorted(indices.tolist())
    assert k + 1 == len(plan)
    assert plan.examples == len(indices)
    assert plan.padded_tokens == cells
    assert plan.padding_waste == pytest.approx(1 - real / cells)
    assert len(plan.shapes) <= 4


def test_iteration_is_repeatable_and_lengths_fall():
    data, *_ = random_dataset(np.random.default_rng(0), 300)
    plan = data.batches(token_budget=256)
    first, second = ([b.index.tolist() for b in plan] for _ in range(2))
    assert first == second
    sizes = [batch.tokens.shape[1] for batch in plan]
    assert sizes == sorted(sizes, reverse=True)
    assert len(plan.shapes) > 1


def test_a_long_example_gets_a_batch_of_its_own():
    data = TokenisedDataset.from_sequences([[1] * 500] + [[1, 2]] * 20, [1] * 21)
    plan = data.batches(token_budget=64)
    assert plan.shapes == ((1, 504), (7, 8))
    assert plan[0].index.tolist() == [0]


def test_a_bucket_must_pay_for_itself():
    data = TokenisedDataset.from_sequences([[1] * 8] * 4 + [[1] * 40], [1] * 5)
    assert data.batches(token_budget=1024).shapes == ((5, 40),)
    assert data.batches(token_budget=64).shapes == ((1, 40), (4, 8))


def test_rows_are_evened_out():
    data = TokenisedDataset.from_sequences([[1] * 8] * 130, [1] * 130)
    plan = data.batches(token_budget=1024)
    assert plan.shapes == ((65, 8),)
    assert plan.padding_waste == 0.0


def test_stopping_early_leaves_no_thread():
    data, *_ = random_dataset(np.random.default_rng(0), 200)
    iterator = iter(data.batches(token_budget=64))
    next(iterator)
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_nothing_to_batch():
    data, *_ = random_dataset(np.random.default_rng(0), 5)
    plan = data.batches(token_budget=64, indices=[])
    assert (len(plan), list(plan), plan.shapes, plan.padding_waste) == (0, [], (), 0.0)


def test_collate_in_the_order_asked():
    data, tokens, _ = random_dataset(np.random.default_rng(1), 10)
    batch = data.collate([3, 0, 3], rows=5, length=64)
    assert batch.index.tolist() == [3, 0, 3, -1, -1]
    assert batch.tokens.shape == (5, 64)
    assert batch.tokens[1, : len(tokens[0])].tolist() == tokens[0]
    natural = data.collate([3])
    assert natural.tokens.shape == (1, -(-len(tokens[3]) // 8) * 8)
    for bad in ({"rows": 1}, {"length": 8}):
        with pytest.raises(ConfigError, match="cannot hold"):
            data.collate([int(np.argmax(data.lengths)), 0], **bad)


def test_views_and_concatenation(tmp_path, toy_tokenizer):
    rng = np.random.default_rng(2)
    parts = []
    for name in ("f", "g"):
        rows = [
            {"id": f"{name}{i}", "prompt": "p" * rng.integers(1, 9), "response": "r" * rng.integers(1, 9)}
            for i in range(12)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        parts.append(tokenise(read_records(tmp_path / f"{name}.jsonl"), toy_tokenizer))
    first, second = parts
    both = concat(first.subset([4, 1]), concat(second, first))
    assert len(both) == 26
    view = both.subset([0, 2, 14, 25])
    assert list(view.ids) == ["f4", "g0", "f0", "f11"]
    assert list(view.sources) == ["f", "g", "f", "f"]
    for i, name in enumerate(view.ids):
        data = first if name[0] == "f" else second
        tokens, start = data.tokens(int(name[1:]))
        assert np.array_equal(view.tokens(i)[0], tokens) and view.tokens(i)[1] == start
        assert view.records[i] == data.records[int(name[1:])]
        assert toy_tokenizer.decode(tokens[start:-1]) == view.records[i].response
    assert both.report["examples"] == 36  # what the parts' reports counted
    assert both.subset([0, 1]).fingerprint == first.subset([4, 1]).fingerprint != first.subset([1, 4]).fingerprint
    batch = view.collate([2, 3])
    assert batch.tokens[0, : first.lengths[0]].tolist() == first.tokens(0)[0].tolist()


def test_concatenation_refuses_different_tokenisations(tmp_path, toy_tokenizer):
    (tmp_path / "f.jsonl").write_text(json.dumps({"prompt": "p", "response": "r"}))
    records = read_records(tmp_path / "f.jsonl")
    with pytest.raises(ConfigError, match="tokenised differently"):
        concat(tokenise(records, toy_tokenizer), tokenise(records, toy_tokenizer, max_length=16))


def test_sequences_in_memory():
    data = TokenisedDataset.from_sequences([[1, 2, 3], [4, 5]], [1, 1], ids=["a", "b"], sources=["x", "y"])
    assert data.subset([1]).ids == ["b"] and data.subset([1]).sources == ["y"]
    assert concat(data, data.subset([0])).ids == ["a", "b", "a"]
    assert data.fingerprint != data.subset([1, 0]).fingerprint
    assert data.response_lengths.tolist() == [2, 1]
    for start in (0, 3):
        with pytest.raises(ConfigError, match="response_start"):
            TokenisedDataset.from_sequences([[1, 2, 3]], [start])


def test_bad_options():
    data, *_ = random_dataset(np.random.default_rng(0), 5)
    with pytest.raises(ConfigError, match="token_budget is 0"):
        data.batches(token_budget=0)


def test_views_take_masks_and_refuse_what_is_no_position():
    data, *_ = random_dataset(np.random.default_rng(0), 5)
    mask = np.asarray([True, False, False, True, False])
    assert list(data.subset(mask).ids) == ["0", "3"]
    assert list(data.subset([np.int64(-1)]).ids) == ["4"]
    for bad in ([5], [-6], np.asarray([0.5]), mask[:2]):
        with pytest.raises(IndexError):
            data.subset(bad)


def test_a_share_of_a_plan_keeps_its_shapes_and_loses_no_example():
    data = TokenisedDataset.from_sequences([list(range(1, 3 + i % 30)) for i in range(100)], [1] * 100)
    plan = data.batches(token_budget=128, max_buckets=3)
    even = np.arange(100) % 2 == 0
    parts = [plan.only(even), plan.only(~even)]
    for part, rows in zip(parts, (even, ~even)):
        assert set(part.shapes) <= set(plan.shapes)
        assert sorted(int(i) for b in part for i in b.index if i >= 0) == np.flatnonzero(rows).tolist()
    done = np.zeros(100, bool)
    done[plan[0].index[plan[0].index >= 0]] = True
    left = plan.without(done)
    assert len(left) == len(plan) - 1 and (left[0].index == plan[1].index).all()
    done[plan[1].index[0]] = True  # a batch that is done in part is done again
    assert len(plan.without(done)) == len(left)


def test_batches_on_a_mesh_divide_over_its_devices_and_grow_with_them():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    data = TokenisedDataset.from_sequences([[1] * 8] * 9, [1] * 9)
    alone, spread = data.batches(token_budget=16), data.on(mesh).batches(token_budget=16)
    assert alone.shapes == ((2, 8),) and spread.shapes == ((8, 8),)  # 16 tokens a device
    for batch in spread:
        assert {s.data.shape for s in batch.tokens.addressable_shards} == {(2, 8)}
    assert sorted(int(i) for b in spread for i in np.asarray(b.index) if i >= 0) == list(range(9))
