"""Model families: one file each, and one line here."""

from __future__ import annotations

from ntkjax.errors import CheckpointError
from ntkjax.models.families.base import Family
from ntkjax.models.families.gemma2 import GEMMA2
from ntkjax.models.families.gemma3 import GEMMA3
from ntkjax.models.families.gpt2 import GPT2
from ntkjax.models.families.gpt_neox import GPT_NEOX
from ntkjax.models.families.granite import GRANITE
from ntkjax.models.families.llama import LLAMA
from ntkjax.models.families.mixtral import MIXTRAL
from ntkjax.models.families.olmo2 import OLMO2
from ntkjax.models.families.olmo3 import OLMO3
from ntkjax.models.families.phi3 import PHI3
from ntkjax.models.families.qwen2 import QWEN2
from ntkjax.models.families.qwen3 import QWEN3
from ntkjax.models.families.qwen3_moe import QWEN3_MOE
from ntkjax.models.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA,
        QWEN2,
        QWEN3,
        GPT2,
        SMOLLM3,
        OLMO2,
        OLMO3,
        GEMMA2,
        GEMMA3,
        PHI3,
        GPT_NEOX,
        GRANITE,
        MIXTRAL,
        QWEN3_MOE,
    )
}


def family_of(name: str) -> Family:
    """The family of that name; CheckpointError for a name that FAMILIES lacks."""
    if name not in FAMILIES:
        raise CheckpointError(f"family {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def linear_aliases(alias: str) -> tuple[str, ...]:
    """Linear layers ("attention/q") that some family's checkpoints call ``alias``: "q_proj", "attn.c_proj"."""
    names: dict[str, None] = {}
    for family in FAMILIES.values():
        for path, tensor in family.tensors.items():
            if path.startswith("layers/") and (tensor == alias or tensor.endswith(f".{alias}")):
                names[path.removeprefix("layers/")] = None
    return tuple(names)
