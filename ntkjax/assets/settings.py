"""The hyper-parameters of ``ntkjax demo``: tuned once for the tiny model, with what they give written down."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo's comparison; every method that fine-tunes uses the same ones."""

    pool_size: int = 2400
    domain_size: int = 96
    dev_size: int = 90
    test_size: int = 300
    n: int = 240
    """Auxiliary examples each method chooses from the pool."""
    epochs: float = 8
    learning_rate: float = 2e-3
    batch_size: int = 16
    lora_rank: int = 16
    lora_alpha: float = 32.0
    warmup_epochs: float = 4
    """Epochs of LoRA on the domain alone before the pool is scored."""
    max_length: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)


DEMO = DemoSettings()
"""What `ntkjax demo` runs with."""
