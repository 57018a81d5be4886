# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Is the Jacobian-free kernel any good?
#
# The empirical NTK between two examples is a $V \times V$ matrix, and what one wants of it is its trace,
# $k(x, x') = \sum_k \langle \nabla f_k(x), \nabla f_k(x') \rangle$: $V$ backward passes per example. NTK-Selector
# replaces it by the gradient of the *sum* of the logits, one backward pass, on the argument that gradients of different
# outputs are nearly orthogonal. Here we compute both, exactly, on a small real model, and look.

# %%
import logging
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import ntkjax
from ntkjax.assets import tiny_lm_path
from ntkjax.assets.planted import write_planted_task
from ntkjax.data import concat, read_records, tokenise
from ntkjax.ntk import directions, gradient_features, kernel_matrix, spearman, top_n_overlap
from ntkjax.ntk.kernels import head_spectrum
from ntkjax.ntk.outputs import fold_head
from ntkjax.ntk.sketch import RademacherSketch

logging.getLogger("transformers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

model = ntkjax.load_lm(str(tiny_lm_path()))
paths = write_planted_task(Path(tempfile.mkdtemp()), 7, pool_size=120, domain_size=16)
read = lambda name: tokenise(read_records([str(paths[name])]), model.tokenizer, max_length=64)
domain, pool = read("train"), read("pool")
M, N = 8, 40
x = concat(domain.subset(np.arange(M)), pool.subset(np.arange(N)))
x = x.collate(range(M + N), rows=M + N, length=int(x.lengths.max()))
W = np.asarray(model.head_fn({}))
print(f"V = {W.shape[0]}, D = {W.shape[1]}; {M} domain and {N} pool examples")

# %% [markdown]
# The parameters are a LoRA adapter after a short warm-up, as in the method itself.

# %%
train = ntkjax.TrainConfig(epochs=4, learning_rate=2e-3, max_buckets=1)
theta = ntkjax.fit(model.nll_fn, model.lora, domain, train, seed=0, progress=False).params


def one_direction(u: np.ndarray) -> np.ndarray:
    """<grad u.h(x_i), grad u.h(x_j)> between domain and pool [M, N], for a direction u [D] of the hidden state."""
    return kernel_matrix(directions(model.hidden_fn, u[None]), theta, x)[:M, M:]


# %% [markdown]
# The head is linear, $f = W h$, so every kernel of the logits is a sum of *one-direction* kernels of the hidden state.
# With $W^\top W = \sum_i s_i^2 u_i u_i^\top$ the exact trace is
# $\sum_i s_i^2 \langle \nabla u_i h, \nabla u_i h' \rangle$: $D$ backward passes, not $V$. The centred trace uses $W$
# without its mean row; it is the one that can change the loss, since softmax does not see a shift common to all logits.
# And *that shift is the direction which `sum_logits` probes*.

# %%
parts = {}
for name, centred in (("trace", False), ("centred trace", True)):
    values, vectors = head_spectrum(W, centred=centred)
    parts[name] = np.array([one_direction(u) for u in (vectors * np.sqrt(values)).T.astype(np.float32)])
K = {name: found.sum(axis=0) for name, found in parts.items()}
K["sum_logits"] = one_direction(np.asarray(fold_head(W)))
K["loss"] = kernel_matrix(model.nll_fn, theta, x)[:M, M:]

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 2.2), layout="constrained")
for axis, (name, matrix) in zip(axes, K.items(), strict=True):
    axis.imshow(matrix / np.abs(matrix).max(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axis.set(title=name, xticks=[], yticks=[], xlabel="pool examples")
axes[0].set(ylabel="domain")
figure.suptitle("The kernel between domain and pool, each scaled to its largest entry", fontsize=10)
plt.show()

# %% [markdown]
# ## The sum of the logits is not the trace
#
# If gradients of different outputs were orthogonal, `sum_logits` would equal the trace. The ratio says by how much it
# does not; the rank correlations say whether that matters for the order of the entries, and of the scores
# $s_j = \frac1M \sum_i k(x_i, x_j)$ that decide what is selected.

# %%
scores = {name: matrix.mean(axis=0) for name, matrix in K.items()}
print(f"sum_logits / trace, median over pairs: {np.median(K['sum_logits'] / K['trace']):.0f}\n")
print(f"{'Spearman with the exact':26s}{'trace: entries':>16s}{'scores':>8s}{'centred: entries':>18s}{'scores':>8s}")
for name in ("sum_logits", "loss"):
    entries, ranks = ([spearman(k[name], k[exact]) for exact in ("trace", "centred trace")] for k in (K, scores))
    print(f"{name:26s}{entries[0]:16.2f}{ranks[0]:8.2f}{entries[1]:18.2f}{ranks[1]:8.2f}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
for axis, name in zip(axes, ("trace", "sum_logits", "loss"), strict=True):
    axis.scatter(K["centred trace"], K[name], s=6, alpha=0.5, linewidths=0)
    axis.set(xlabel="exact centred trace", ylabel=name, title=f"Spearman {spearman(K[name], K['centred trace']):.2f}")
    axis.ticklabel_format(scilimits=(-2, 2))
plt.show()

# %% [markdown]
# ## How many directions are enough?
#
# Keep the $m$ leading eigen-directions (`spectral:m`), or average $m$ random probes of the logits (`hutchinson:m`): the
# cost is $m$ backward passes either way. The last panel projects `sum_logits` gradients to $K$ numbers, as the paper
# does; drawing the projection again shows how much of the ranking is its noise.

# %%
sizes = np.array([1, 2, 4, 8, 16, 32, 64])
rng = np.random.default_rng(0)
probes = [
    [one_direction(np.asarray(fold_head(W, rng.choice([-1.0, 1.0], len(W))))) for _ in range(16)] for _ in range(3)
]
agreement = lambda matrices, exact: [
    spearman(sum(matrices[:m]).mean(axis=0), scores[exact]) for m in sizes if m <= len(matrices)
]

figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.6), layout="constrained")
for name, colour in (("trace", "tab:blue"), ("centred trace", "tab:orange")):
    axes[0].plot(sizes, agreement(parts[name], name), "o-", color=colour, label=f"spectral:m against {name}")
found = np.array([agreement(draw, "trace") for draw in probes])
axes[0].errorbar(
    sizes[:5], found.mean(0), found.std(0), fmt="s--", color="0.5", capsize=2, label="hutchinson:m against trace"
)
level = spearman(scores["sum_logits"], scores["centred trace"])
axes[0].axhline(level, color="tab:red", linewidth=1, linestyle=":", label="sum_logits against centred trace")
axes[0].set(xscale="log", xlabel="m, backward passes per example", ylabel="Spearman of the scores")
axes[0].legend(frameon=False, fontsize=8, loc="lower right")

output = directions(model.hidden_fn, np.asarray(fold_head(W))[None])
widths = [64, 256, 1024]


def sketched(width: int, seed: int) -> np.ndarray:
    """Scores of sum_logits through a Rademacher sketch to ``width`` numbers."""
    features = gradient_features(output, theta, [x], RademacherSketch(width, seed), rows=M + N)
    return (features[:M] @ features[M:].T).mean(axis=0)


twice = [[sketched(width, seed) for seed in (0, 1)] for width in widths]
axes[1].plot(
    widths,
    [spearman(a, scores["sum_logits"]) for a, _ in twice],
    "o-",
    color="tab:green",
    label="sketched against exact",
)
axes[1].plot(widths, [spearman(a, b) for a, b in twice], "s--", color="0.5", label="sketched, drawn twice")
axes[1].set(xscale="log", xlabel="K, numbers kept of each gradient", ylim=(0, 1.02), title="sum_logits, sketched")
axes[1].legend(frameon=False, fontsize=8, loc="lower right")
plt.show()

# %% [markdown]
# ## What it does to the selection

# %%
top = 10
print(f"overlap of the best {top} of {N} with the exact centred kernel's (chance {top / N:.2f}):")
chosen = {"spectral:8, centred": parts["centred trace"][:8].sum(0).mean(0), "hutchinson:8": sum(probes[0][:8]).mean(0)}
for name, s in (scores | chosen).items():
    print(f"  {name:22s}{top_n_overlap(s, scores['centred trace'], top):.2f}")

# %% [markdown]
# One small model, a few dozen examples, one seed: a picture, not a result. `ntkjax verify` measures all of this with
# intervals and seeds on any checkpoint, and `experiments/` holds what it found.
