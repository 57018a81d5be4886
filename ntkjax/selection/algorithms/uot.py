"""Unbalanced optimal transport from the domain to the pool (arXiv 2602.14696), by streamed Sinkhorn iterations."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from ntkjax.errors import ConfigError
from ntkjax.selection.base import SelectionProblem
from ntkjax.selection.options import Options, check_least
from ntkjax.selection.parts import Algorithm, Choice, Similarities

TOLERANCE = 1e-9
"""Change of the domain's potentials, relative to uot_epsilon, below which the iterations end."""


@dataclasses.dataclass(frozen=True)
class UotOptions(Options):
    """Options of unbalanced optimal transport (algorithm=uot)."""

    uot_epsilon: float = 0.01
    """eps, the weight of the entropy: small keeps to the nearest pairs, large spreads the mass."""
    uot_domain: float | None = None
    """rho_1, the price of moving more or less than 1/M from a domain example; none: exactly 1/M is moved from each."""
    uot_pool: float = 1e-4
    """rho_2, the price of a pool example getting more or less than 1/N: towards 0 the mass goes wherever it is near."""
    uot_iterations: int = 1000
    """Passes over the pool at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("uot_epsilon", "uot_domain", "uot_pool"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be above 0 and finite, got {value}")
        check_least(self, "uot_iterations")


@dataclasses.dataclass(frozen=True)
class UnbalancedTransport(UotOptions, Algorithm):
    """min over P [M, N] >= 0 of sum_ij P_ij c_ij + eps KL(P | a b^T) + rho_1 KL(P 1 | a) + rho_2 KL(P^T 1 | b),
    c_ij = (1 - s_ij) / 2, a = 1/M, b = 1/N, KL(p | q) = sum p log(p / q) - p + q; score_j = sum_i P_ij; the n highest.

    Solved by Sinkhorn iterations on the dual potentials f [M], g [N], P_ij = a_i b_j exp((f_i + g_j - c_ij) / eps):

        g_j = -eps rho_2 / (rho_2 + eps) log sum_i a_i exp((f_i - c_ij) / eps)
        f_i = -eps rho_1 / (rho_1 + eps) log sum_j b_j exp((g_j - c_ij) / eps)       (rho_1 infinite: the factor is eps)

    g_j follows from f and the similarities of row j alone, so an iteration is one pass over the pool that keeps M
    running sums; g is never held.

    Source: arXiv 2602.14696 (its program: the entropic problem with rho_1 infinite, rho_2 = 1e-4, eps = 0.01, the rows
    ranked by the mass they get); the iterations are those of arXiv 1607.05816 (Chizat et al., "Scaling algorithms for
    unbalanced optimal transport problems"). Ours: a pass that changes no f_i by more than 1e-9 eps is the last.

    Cost: a pass over the similarities for each iteration; the report says how many there were. Those that fit into 1
    GiB (8 M bytes a pool row) are kept, the others made anew from the features in every pass.
    """

    of_cosines: ClassVar[bool] = True

    def __call__(self, similarities: Similarities, problem: SelectionProblem) -> Choice:
        members, rows = similarities.members, len(similarities.rows)
        potential, change, passes, zeros = np.zeros(members), np.inf, 0, 0
        scores, blocks = np.empty(rows), similarities.repeated()
        while change > TOLERANCE * self.uot_epsilon and passes < self.uot_iterations:
            sums, zeros = np.full(members, -np.inf), 0
            for at, similarity, zero in blocks:
                # All in logarithms: at eps = 0.01 exp(-c / eps) runs down to e^-100 = 4e-44, where float32 has no
                # digits left.
                cost = (1 - similarity) / 2 / self.uot_epsilon  # [b, M], in units of eps
                reach = logsumexp(potential / self.uot_epsilon - cost, axis=1) - math.log(members)
                given = -self.uot_pool / (self.uot_pool + self.uot_epsilon) * reach  # g / eps
                # sum_i P_ij = b_j exp(g_j / eps) sum_i a_i exp((f_i - c_ij) / eps), with the f that this pass began
                # with; the last pass moves f by less than the tolerance.
                scores[at] = np.exp(given + reach) / rows
                # log sum_j over the pool, block after block: [b, M] numbers in memory, whatever the pool.
                sums, zeros = np.logaddexp(sums, logsumexp(given[:, None] - cost, axis=0)), zeros + zero
            keep = 1.0 if self.uot_domain is None else self.uot_domain / (self.uot_domain + self.uot_epsilon)
            updated = -self.uot_epsilon * keep * (sums - math.log(rows))
            change, potential, passes = float(np.abs(updated - potential).max()), updated, passes + 1
        report: dict[str, Any] = {
            "uot_iterations": passes,
            "uot_converged": change <= TOLERANCE * self.uot_epsilon,
            "uot_mass": float(scores.sum()),
            "uot_effective_rows": effective(scores),
        }
        if not report["uot_converged"]:
            report["uot_warning"] = (
                f"unbalanced transport did not converge in {passes} passes: a dual potential still moves by "
                f"{change / self.uot_epsilon:.1e} eps; raise --uot-epsilon or --uot-iterations"
            )
        return Choice(scores, zeros=int(np.max(zeros)), report=report)


def effective(mass: Float[np.ndarray, " N"]) -> float:
    """(sum p)^2 / sum p^2: how many rows share the mass, counted as if they had it in equal parts."""
    return float(mass.sum() ** 2 / np.sum(mass**2))
