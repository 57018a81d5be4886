"""Which rows an epoch holds: nothing left out, the domain's share reached, the same on every call."""

from __future__ import annotations

import numpy as np
import pytest

from ntkjax.errors import ConfigError
from ntkjax.training import EpochPlan, mixture_indices


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("domain_size", [1, 7, 60])
def test_domain_reaches_its_share_and_nothing_is_lost(share, domain_size):
    total, domain = 100, np.arange(3, 3 + domain_size)
    rows = mixture_indices(total, domain, share, seed=0, epoch=2)
    counts = np.bincount(rows, minlength=total)
    is_domain = np.isin(np.arange(total), domain)
    assert (counts[~is_domain] == 1).all()
    assert counts[is_domain].min() >= 1 and np.ptp(counts[is_domain]) <= 1
    reached = counts[is_domain].sum()
    assert reached / len(rows) >= share
    # One domain row fewer would miss the share, unless nothing was repeated at all.
    assert (reached - 1) / (len(rows) - 1) < share or reached == domain_size


def test_same_epoch_same_rows_other_epoch_other_repeats():
    draw = lambda epoch, seed=0: mixture_indices(50, np.arange(20), 0.5, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(draw(1), draw(1))
    assert len(draw(1)) == len(draw(2))
    assert not np.array_equal(draw(1), draw(2))
    assert not np.array_equal(draw(1), draw(1, seed=1))


def test_no_share_takes_every_row_once():
    np.testing.assert_array_equal(mixture_indices(5, np.array([1]), None, seed=0, epoch=0), np.arange(5))


@pytest.mark.parametrize("domain", [[], [-1, 2], [2, 10]])
def test_share_without_usable_domain_rows_is_refused(domain):
    with pytest.raises(ConfigError, match="domain_share"):
        mixture_indices(10, np.array(domain, np.int64), 0.5, seed=0, epoch=0)


def test_plan_gives_any_step_without_those_before_it():
    lengths = np.random.default_rng(0).integers(3, 40, size=37)
    plan = EpochPlan(lengths, batch_size=5, seed=4, domain=np.arange(6), domain_share=0.4)
    everything = list(plan.batches(0, 3 * plan.steps_per_epoch + 2))
    assert len(everything) == 3 * plan.steps_per_epoch + 2
    for first in (1, plan.steps_per_epoch, 2 * plan.steps_per_epoch + 3):
        later = list(plan.batches(first, len(everything)))
        assert len(later) == len(everything) - first
        for a, b in zip(later, everything[first:]):
            np.testing.assert_array_equal(a, b)
    epoch = np.concatenate(everything[: plan.steps_per_epoch])
    assert set(epoch) == set(range(37)) and max(map(len, everything)) == 5
