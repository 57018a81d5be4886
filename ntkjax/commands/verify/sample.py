"""The examples whose kernels ``ntkjax verify`` computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ntkjax.commands.verify.config import VerifyConfig
from ntkjax.data import TokenisedDataset, concat
from ntkjax.errors import ConfigError, UserError
from ntkjax.models import LanguageModel
from ntkjax.pipeline.load import Loaded, load_data
from ntkjax.rng import numpy_rng


@dataclasses.dataclass(frozen=True)
class Sample:
    """The examples of the kernel matrices: ``tokens``, the first ``domain`` of which are the domain, and the data that
    they and the warm-up come from."""

    tokens: TokenisedDataset
    domain: int
    sources: Mapping[str, Loaded]

    def part(self, count: int) -> np.ndarray:
        """``count`` rows of the sample with about the same share of domain examples, those first."""
        if count >= len(self.tokens):
            return np.arange(len(self.tokens))
        domain = min(max(1, round(count * self.domain / len(self.tokens))), count - 4)
        return np.concatenate([np.arange(domain), np.arange(self.domain, self.domain + count - domain)])


def draw_sample(config: VerifyConfig, model: LanguageModel) -> Sample:
    """n examples: the domain's first, then those to score, drawn from ``config.seed``.

    Raises:
      DataError: bad records. UserError: fewer examples than asked for.
    """
    pool = load_data(config.data, model, config.reading)
    domain = load_data(config.domain, model, config.reading) if config.domain else None
    wanted = config.domain_count
    scored = config.n - wanted
    rng = numpy_rng(config.seed, "verify", "sample")
    if domain is None:
        _enough(pool, config.n, config.data, "n")
        rows = rng.choice(len(pool), config.n, replace=False)
        return Sample(pool.tokens.subset(rows), wanted, {"data": pool})
    _enough(domain, wanted, config.domain, "n_domain")
    _enough(pool, scored, config.data, "n minus n_domain")
    first = domain.tokens.subset(rng.choice(len(domain), wanted, replace=False))
    second = pool.tokens.subset(rng.choice(len(pool), scored, replace=False))
    return Sample(concat(first, second), wanted, {"data": pool, "domain": domain})


def _enough(loaded: Loaded, wanted: int, paths: tuple[str, ...], name: str) -> None:
    if len(loaded) < wanted:
        raise UserError(
            f"{', '.join(paths)}: {len(loaded)} examples, fewer than the {wanted} asked for ({name}); "
            "lower n or n_domain, or give more data"
        )


def check_sizes(config: VerifyConfig, model: LanguageModel) -> None:
    """Refuse what the model is too small for, before anything is computed."""
    width = model.config.hidden_size
    if max(config.m) > width:
        raise ConfigError(f"m: {max(config.m)} is more than the model's width {width}; give at most {width}")
