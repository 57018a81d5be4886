"""Algorithms over the similarities of M domain examples and N pool rows, one file each. The table is at the end.

A new algorithm is one file in this folder and one line in the table.
"""

from __future__ import annotations

from typing import Any

from ntkjax.selection.tables import load_table

TABLE = {
    "mean": "mean.Mean",
    "max": "maximum.Maximum",
    "clusters": "clusters.Clusters",
    "round-robin": "round_robin.RoundRobin",
    "doubly-greedy": "maximum.Maximum",  # the same order by another name: see there
    "uot": "uot.UnbalancedTransport",
    "knn-uniform": "knn_uniform.KnnUniform",
    "knn-kde": "knn_kde.KnnKde",
}
"""Name of the algorithm, as ``--algorithm`` takes it: module in this folder and class."""


ALGORITHMS: dict[str, type[Any]] = load_table(__name__, TABLE)
"""Name of the algorithm: its class, a frozen dataclass of its options (`ntkjax.selection.parts.Algorithm`)."""
