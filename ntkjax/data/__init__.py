"""Text in, padded batches out: read and validate records, render prompts, tokenise, bucket by length."""

from ntkjax.data.batches import BatchPlan, PlannedBatch, TokenisedDataset, concat, plan_batches
from ntkjax.data.buckets import bucket_lengths, epoch_batches, round_up
from ntkjax.data.cache import default_cache_dir
from ntkjax.data.encode import tokenise, tokenizer_digest
from ntkjax.data.prompts import Rendered, end_token, pad_token, render, render_prompt
from ntkjax.data.records import Example, Records, concat_records, read_records

__all__ = [
    "BatchPlan",
    "Example",
    "PlannedBatch",
    "Records",
    "Rendered",
    "TokenisedDataset",
    "bucket_lengths",
    "concat",
    "concat_records",
    "default_cache_dir",
    "end_token",
    "epoch_batches",
    "pad_token",
    "plan_batches",
    "read_records",
    "render",
    "render_prompt",
    "round_up",
    "tokenise",
    "tokenizer_digest",
]
