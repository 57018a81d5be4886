"""Rows filled with several examples: first-fit decreasing by its definition, waste, shapes, plans of packed batches."""

from __future__ import annotations

import numpy as np
import pytest

from ntkjax.data import TokenisedDataset
from ntkjax.data.rows import MAX_LENGTHS, fixed_lengths, lay_out
from ntkjax.data.rows import first_fit as packed
from ntkjax.errors import ConfigError


def by_hand(lengths, capacities, slots):
    """First-fit decreasing as its definition has it."""
    rows: list[dict] = []
    where = [-1] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # stable: ties in the given order
        fits = [k for k, row in enumerate(rows) if row["free"] >= lengths[i] and row["left"] > 0]
        if not fits:
            size = min(c for c in capacities if c >= lengths[i])
            rows.append({"free": size, "left": slots, "size": size})
            fits = [len(rows) - 1]
        where[i] = fits[0]
        rows[fits[0]]["free"] -= lengths[i]
        rows[fits[0]]["left"] -= 1
    return where, [row["size"] for row in rows]


def test_first_fit_decreasing_is_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(150):
        lengths = rng.integers(1, rng.integers(3, 70), rng.integers(1, 120))
        capacities, slots = fixed_lengths(int(lengths.max()), 16), int(rng.integers(1, 9))
        where, sizes = packed(lengths, capacities, slots)
        assert (where.tolist(), sizes.tolist()) == by_hand(lengths.tolist(), capacities, slots)


def test_an_example_longer_than_every_row_is_refused():
    with pytest.raises(ConfigError, match="17 tokens does not fit into rows of 16"):
        packed(np.asarray([3, 17]), (8, 16), 4)


@pytest.mark.parametrize(
    ("longest", "expected"),
    [(5, (16,)), (16, (16,)), (17, (16, 32)), (64, (16, 32, 64)), (200, (16, 64, 256)), (5000, (16, 512, 8192))],
)
def test_at_most_three_fixed_lengths_whatever_the_longest(longest, expected):
    assert fixed_lengths(longest, 16) == expected and len(expected) <= MAX_LENGTHS


@pytest.mark.parametrize("shape", ["lognormal", "uniform", "short", "long"])
def test_padding_is_at_most_two_in_a_hundred(shape):
    rng = np.random.default_rng(0)
    lengths = {
        "lognormal": np.clip(rng.lognormal(5.0, 0.7, 20_000), 9, 2048),
        "uniform": rng.integers(8, 1024, 20_000),
        "short": rng.integers(4, 20, 60_000),
        "long": np.clip(rng.lognormal(5.0, 1.0, 20_000), 9, 9000),
    }[shape].astype(np.int32)
    layout, filled = lay_out(lengths, 8192)
    assert 1 - lengths.sum() / sum(batch.rows * batch.length for batch in filled) < 0.02
    assert len({(batch.rows, batch.length, batch.slots) for batch in filled}) == (3 if shape == "long" else 1)
    assert layout.slots == (512 if shape == "short" else 64)  # more only where they save batches
    assert np.array_equal(np.sort(np.concatenate([batch.members for batch in filled])), np.arange(len(lengths)))


def test_shapes_do_not_depend_on_the_data():
    layouts = {lay_out(np.random.default_rng(s).integers(5, 300 * (s + 1), 50 + 400 * s), 8192)[0] for s in range(5)}
    assert len(layouts) == 1
    assert lay_out(np.full(4000, 100), 8192, row_multiple=3)[0].rows == (3,)
    with pytest.raises(ConfigError, match="token_budget is 0"):
        lay_out(np.full(4, 100), 0)


def test_a_large_budget_is_not_spent_on_empty_rows():
    """One row is needed, then five: a batch has the fewest tokens, or the next power of two of the rows."""
    shapes = lambda lengths, budget, **options: {
        (batch.rows, batch.length) for batch in lay_out(np.asarray(lengths), budget, **options)[1]
    }
    assert shapes([40] * 24, 1_000_000) == shapes([40] * 24, 8192) == {(4, 2048)}
    assert shapes([2000] * 5, 1_000_000) == {(8, 2048)} and shapes([2000] * 5, 3 * 2048) == {(3, 2048)}
    assert shapes([2000] * 5, 1_000_000, row_multiple=3) == {(6, 2048)}
    assert shapes([2000] * 5 + [5000], 1_000_000) == {(4, 2048), (1, 8192)}  # the long row takes one of the others
    assert shapes([40] * 24, 1) == {(1, 64)}


def dataset(count: int = 60, longest: int = 40, seed: int = 0) -> TokenisedDataset:
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(1, 99, rng.integers(2, longest + 1)).tolist() for _ in range(count)]
    return TokenisedDataset.from_sequences(tokens, [int(rng.integers(1, len(row))) for row in tokens], pad_id=7)


def test_every_example_lies_whole_in_its_slot():
    data, seen = dataset(), []
    plan = data.batches(token_budget=128, packing=True)
    for batch in plan:
        rows, length = batch.tokens.shape
        slots = len(batch.index) // rows
        assert batch.segments is None and batch.examples.shape == batch.positions.shape == (rows, length)
        for row in range(rows):
            own = batch.examples[row]
            real = own[own >= 0]
            assert np.all(np.diff(real) >= 0) and np.all(own[len(real) :] == -1)  # ascending, padding behind them all
            assert np.all(batch.tokens[row][own < 0] == 7) and not batch.response_mask[row][own < 0].any()
            assert batch.positions[row][own < 0].tolist() == list(range(int((own < 0).sum())))
            for slot in range(slots):
                i, here = int(batch.index[row * slots + slot]), own == slot
                assert batch.lengths[row * slots + slot] == here.sum()
                if i < 0:
                    assert not here.any()
                    continue
                seen.append(i)
                assert batch.tokens[row][here].tolist() == data.tokens(i)[0].tolist()
                assert batch.response_mask[row][here].tolist() == data.trained(i).tolist()
                assert batch.positions[row][here].tolist() == list(range(int(data.lengths[i])))
    assert sorted(seen) == list(range(60))
    assert len(plan.shapes) == 1 and plan.examples == 60
    assert plan.padding_waste == 1 - data.lengths.sum() / (len(plan) * plan.shapes[0][0] * plan.shapes[0][1])


def test_a_plan_knows_its_examples_one_a_row():
    data = dataset().packed(True)
    plan = data.batches(token_budget=128, indices=np.arange(5, 40))
    assert plan.padded is not None and plan.padded.padded is None
    for part in (plan, plan.padded):
        assert sorted(i for batch in part for i in batch.index.tolist() if i >= 0) == list(range(5, 40))
    assert plan.padded[0].examples is None and plan[0].examples is not None
    assert data.batches(token_budget=128, packing=False).padded is None


def test_a_part_of_a_plan_has_the_shapes_of_the_whole():
    data = dataset(200)
    plan, wanted = data.batches(token_budget=128, packing=True), np.zeros(200, bool)
    wanted[3:30] = True
    part = plan.only(wanted)
    assert set(part.shapes) <= set(plan.shapes) and part.padded is not None and len(part) < len(plan)
    for found in (part, part.padded):
        assert sorted(i for batch in found for i in batch.index.tolist() if i >= 0) == list(range(3, 30))
        assert {len(batch.index) for batch in found} <= {len(batch.index) for batch in (*plan, *plan.padded)}
    assert len(plan.only(np.zeros(200, bool))) == 0
    done = np.zeros(200, bool)
    done[plan.planned[0].indices] = True
    left = plan.without(done)
    assert len(left) == len(plan) - 1 and np.array_equal(left[0].index, plan[1].index)
    assert left.padded is not None and all(not done[b.indices].all() for b in left.padded.planned)


def test_longer_examples_get_longer_rows():
    data = TokenisedDataset.from_sequences([[1] * 100, [2] * 500] + [[3] * 20] * 30, [1] * 32)
    plan = data.batches(token_budget=64, packing=True)
    assert plan.shapes == ((1, 512), (1, 256), (1, 64)) or plan.shapes == ((1, 512), (1, 256))
    assert sorted(i for batch in plan for i in batch.index.tolist() if i >= 0) == list(range(32))


def test_nothing_to_pack():
    plan = dataset(5).batches(token_budget=64, indices=[], packing=True)
    assert (len(plan), list(plan), plan.padding_waste) == (0, [], 0.0)


def test_rows_that_cannot_hold_their_examples_are_refused():
    with pytest.raises(ConfigError, match="expected enough rows, tokens and slots"):
        dataset().collate_rows([0, 1, 2], [0, 0, 0], rows=1, length=256, slots=2)
