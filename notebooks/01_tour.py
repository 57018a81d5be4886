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
# # A tour: choose data, look at what was chosen, fine-tune on it
#
# A small domain, a large general pool, a language model. ntkjax finds the pool examples whose gradients point where the
# domain's gradients point. Everything here runs on what ships in the package: a tiny pre-trained model and a
# generated task whose truth is known, so that we can see whether the choice is a good one.

# %%
import json
import logging
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import ntkjax
from ntkjax.assets import tiny_lm_path
from ntkjax.assets.planted import write_planted_task

logging.getLogger("transformers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

work = Path(tempfile.mkdtemp())
paths = {name: str(path) for name, path in write_planted_task(work / "data", 7, pool_size=900, domain_size=64).items()}
truth = json.loads(Path(paths["truth"]).read_text())
print("the domain needs:", ", ".join(truth["useful_skills"]))
print(f"useful pool examples: {100 * truth['useful_share']:.1f}% of {len(truth['skill_of'])}")

# %% [markdown]
# The domain asks for three skills in the language of a shop. The pool holds all skills, each in five other wordings.

# %%
for name in ("train", "pool"):
    row = json.loads(Path(paths[name]).read_text().splitlines()[0])
    print(f"{name:6s} {row['prompt']}\n       -> {row['response']}\n")

# %% [markdown]
# ## Select
#
# `select` warms up a LoRA adapter on the domain, takes the domain's mean gradient, and scores every pool example by one
# forward-mode pass: $s_j = \langle \bar g, g_j \rangle = \frac{d}{d\varepsilon} F(x_j; \theta + \varepsilon \bar g)$.
# No per-example gradient is ever made.

# %%
N = 90
train = {"epochs": 4, "learning_rate": 2e-3, "max_buckets": 1}
options = {
    "model": str(tiny_lm_path()),
    "domain": paths["train"],
    "pool": paths["pool"],
    "n": N,
    "max_length": 64,
    "stage1": "off",
    "warmup": train,
    "progress": False,
}
chosen = {kernel: ntkjax.select(out=str(work / kernel), kernel=kernel, **options) for kernel in ("loss", "sum_logits")}

# %%
ids = list(truth["skill_of"])
useful = np.isin(ids, truth["useful_ids"])
precision = {kernel: float(useful[s.selected].mean()) for kernel, s in chosen.items()}
for kernel, share in precision.items():
    print(f"{kernel:11s} {100 * share:.0f}% of the {N} chosen examples are useful (chance: {100 * useful.mean():.0f}%)")

# %% [markdown]
# ## Is the score about the domain?
#
# Every selection answers that itself. A score that follows response length, or the score that the pool's *own* mean
# gradient gives, says little about the domain.

# %%
keys = ("rank_correlation_with_length", "rank_correlation_with_pool_mean", "negative_share")
print(f"{'':38s}" + "".join(f"{kernel:>12s}" for kernel in chosen))
for key in keys:
    print(f"{key:38s}" + "".join(f"{s.diagnostics[key]:12.2f}" for s in chosen.values()))

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
for axis, (kernel, selection) in zip(axes, chosen.items(), strict=True):
    z = (selection.scores - selection.scores.mean()) / selection.scores.std()
    bins = np.linspace(z.min(), z.max(), 40)
    axis.hist(z[~useful], bins, density=True, color="0.75", label="other skills")
    axis.hist(z[useful], bins, density=True, alpha=0.6, color="tab:orange", label="skills the domain needs")
    axis.axvline(np.sort(z)[-N], color="black", linewidth=1, linestyle="--", label=f"cut: best {N}")
    axis.set(title=f"{kernel} kernel", xlabel="score (standardised)", yticks=[])
axes[0].legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Look at what was chosen

# %%
skills = np.array([truth["skill_of"][i] for i in ids])
offered, picked = Counter(skills), Counter(skills[chosen["loss"].selected])
order = sorted(offered, key=lambda s: picked[s] / offered[s])
figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
colours = ["tab:orange" if s in truth["useful_skills"] else "0.7" for s in order]
axis.barh(order, [100 * picked[s] / offered[s] for s in order], color=colours)
axis.axvline(100 * N / len(ids), color="black", linewidth=1, linestyle="--")
axis.set(xlabel="chosen, % of what the pool offers (dashed: chance)", title="loss kernel; orange: the domain needs it")
axis.tick_params(axis="y", labelsize=8)
plt.show()

# %%
for line in (work / "loss" / "selected.jsonl").read_text().splitlines()[:4]:
    row = json.loads(line)
    print(f"{row['prompt']}\n  -> {row['response']}\n")

# %% [markdown]
# ## Fine-tune and evaluate
#
# Domain alone, and domain with the chosen examples: one seed, a few epochs. `ntkjax adapt` does the whole comparison,
# with random selection, equal steps, several seeds and intervals; with one seed read nothing into small differences.

# %%
arms = {"domain alone": [], "with selected data": [str(work / "loss" / "selected.jsonl")]}
for name, auxiliary in arms.items():
    run = work / name.replace(" ", "-")
    ntkjax.finetune(
        model=str(tiny_lm_path()),
        domain=paths["train"],
        auxiliary=auxiliary,
        out=str(run),
        max_length=64,
        train=train,
        progress=False,
    )
    result = ntkjax.evaluate(
        model=str(tiny_lm_path()),
        adapter=str(run / "adapter"),
        test=paths["test"],
        out=str(run / "evaluation"),
        max_length=64,
        progress=False,
    )
    low, high = result.summary["accuracy_interval"]
    print(f"{name:20s} accuracy {100 * result.summary['accuracy']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]")
