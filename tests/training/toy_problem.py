"""A bigram language model and a small dataset, for the tests of training; as a script, one run of ``fit``.

python toy_problem.py OUT [--die-at-collate K] [--die-in-save K] [--result FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np

from ntkjax.data import TokenisedDataset
from ntkjax.types import predict_mask

VOCAB = 11


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bigram:
    """nll of p(next | token) = softmax(base[token] + table[token] + bias): base is frozen."""

    base: jax.Array

    def __call__(self, params, batch):
        table = self.base + params["table"]["kernel"].astype(self.base.dtype)
        bias = params["table"]["bias"].astype(self.base.dtype)
        logits = table[jnp.asarray(batch.tokens)] + bias[None, None, :]
        logp = jax.nn.log_softmax(logits)[:, :-1]
        got = jnp.take_along_axis(logp, jnp.asarray(batch.tokens)[:, 1:, None], axis=2)[..., 0]
        mask = predict_mask(batch)[:, :-1]
        count = jnp.maximum(jnp.sum(mask, axis=1), 1)
        return -jnp.sum(jnp.where(mask, got, jnp.zeros_like(got)), axis=1) / count.astype(got.dtype)


class Dying:
    """A dataset that kills its process with SIGKILL at the nth batch it is asked for."""

    def __init__(self, data, nth):
        self.data, self.left = data, nth
        # Plain attributes: from Python 3.12 on a protocol does not see what __getattr__ would find.
        self.lengths, self.response_lengths = data.lengths, data.response_lengths
        self.ids, self.fingerprint = data.ids, data.fingerprint

    def collate(self, indices, *, rows, length):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.data.collate(indices, rows=rows, length=length)


def make_data(n, seed, name="toy", longest=24):
    """Sequences in which the next token is mostly 3 t + 1 mod VOCAB."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        length = int(rng.integers(5, longest))
        tokens = [int(rng.integers(VOCAB))]
        while len(tokens) < length:
            tokens.append((3 * tokens[-1] + 1) % VOCAB if rng.random() < 0.9 else int(rng.integers(VOCAB)))
        rows.append((tokens, int(rng.integers(1, length - 1))))
    return TokenisedDataset.from_sequences(*zip(*rows), ids=[f"{name}-{i}" for i in range(n)])


def make_model(seed=0):
    """(nll_fn, params)."""
    rng = np.random.default_rng(seed)
    params = {
        "table": {
            "kernel": jnp.asarray(rng.normal(size=(VOCAB, VOCAB)) * 0.1, jnp.float32),
            "bias": jnp.asarray(rng.normal(size=VOCAB) * 0.1, jnp.float32),
        }
    }
    return Bigram(jnp.asarray(rng.normal(size=(VOCAB, VOCAB)) * 0.3, jnp.float32)), params


def main():
    from ntkjax.training import TrainConfig, checkpoint, fit

    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--die-at-collate", type=int, default=0)
    parser.add_argument("--die-in-save", type=int, default=0)
    parser.add_argument("--result", default="")
    args = parser.parse_args()
    if args.die_in_save:
        die_in_save(checkpoint, args.die_in_save)
    nll_fn, params = make_model()
    train, dev = make_data(40, 1), make_data(12, 2, "dev")
    config = TrainConfig(
        steps=14, batch_size=6, accumulation=2, learning_rate=0.05, weight_decay=0.01, clip_norm=0.3,
        eval_every=4, save_every=3, domain_share=0.4, max_buckets=1,
    )  # fmt: skip
    train = Dying(train, args.die_at_collate) if args.die_at_collate else train
    result = fit(nll_fn, params, train, config, seed=3, dev=dev, domain=np.arange(5), out_dir=args.out, progress=False)
    if args.result:
        leaves = jax.tree.leaves((result.params, result.opt_state))
        np.savez(args.result, *leaves, steps=result.steps, best=result.best_step, clipped=result.clipped_steps)


def die_in_save(checkpoint, nth):
    """SIGKILL while the nth checkpoint is being written: its files are there, its commit is not."""
    import threading

    plain, calls = checkpoint.Checkpoints.save, []

    def save(self, step, arrays, progress):
        calls.append(step)
        if len(calls) == nth:

            def watch():
                while not any(p.name.startswith(str(step)) for p in self.folder.iterdir()):
                    pass
                os.kill(os.getpid(), signal.SIGKILL)

            threading.Thread(target=watch, daemon=True).start()
        plain(self, step, arrays, progress)

    checkpoint.Checkpoints.save = save


if __name__ == "__main__":
    main()
