# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Ablations by vmap: a grid is one program
#
# How much should elastic weight consolidation hold on to the past, and does the answer depend on the
# learning rate? A learner is built inside the traced function, so its hyperparameters may be traced: a
# grid of strengths, rates and seeds compiles once and runs as one program. Takes about a minute.
#
# Open this file as a notebook with jupytext (`jupytext --to ipynb notebooks/ablations.py`).

# %%
import os
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from cl_jax import chain, learner, streams
from cl_jax.methods.heads.task_head import task_head
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.metrics import summary
from cl_jax.models.mlp import mlp
from cl_jax.sweep import compile_groups, grid, sweep

SMOKE = bool(os.environ.get('CL_JAX_SMOKE'))  # set by the tests: fewer steps and cells

# %% [markdown]
# ## The cells
#
# Task-incremental Split Fashion-MNIST: the task is told, and each has its own part of the output layer.

# %%
train, test = streams.dataset('fashion_mnist_small')
plan = streams.Plan(batch=20, iterations=10 if SMOKE else 120)
stream = streams.put(streams.split(train, test, 'task', 5, plan=plan))

COEFS = (0.0, 1e2) if SMOKE else (0.0, 1.0, 1e1, 1e2, 1e3)
RATES = (0.05,) if SMOKE else (0.02, 0.05, 0.1, 0.2)
SEEDS = 1 if SMOKE else 3


def build(cell, weights):
  heads = task_head(stream.task_classes, stream.classes)
  method = chain(ewc=ewc(cell['coef'], labels='empirical'), heads=heads)
  return learner(mlp((100,), stream.classes), optax.sgd(cell['lr']), method)


cells = [cell for cell in grid({'coef': COEFS, 'lr': RATES}) for _ in range(SEEDS)]
keys = [jax.random.fold_in(jax.random.key(0), i % SEEDS) for i in range(len(cells))]
print(f'{len(cells)} runs, {len(compile_groups(cells))} program')

# %% [markdown]
# ## One call

# %%
start = time.perf_counter()
found = sweep(build, cells, jax.numpy.stack(keys), stream)
print(
  f'{time.perf_counter() - start:.1f} s with compiling, {len(cells)} runs of {stream.tasks} tasks'
)

# %%
measures = [summary(record.R, record.start) for _, record in found]
shape = len(COEFS), len(RATES), SEEDS
table = {
  k: np.array([m[k] for m in measures]).reshape(shape)
  for k in ('acc', 'forgetting', 'learning_acc')
}
best = np.unravel_index(table['acc'].mean(-1).argmax(), shape[:2])
print(
  f'best accuracy {table["acc"].mean(-1).max():.3f} with coef {COEFS[best[0]]:g} and rate {RATES[best[1]]:g}'
)

# %% [markdown]
# ## What it says
#
# Left what is remembered, right what is learnt: a stronger hold costs the ability to learn, and a larger
# rate breaks it earlier. A table of only the best cell would hide both.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout='constrained', sharey=True)
titles = ('accuracy at the end', 'forgetting', 'accuracy on the task just learnt')
for axis, (name, values), title in zip(axes, table.items(), titles, strict=True):
  mean = 100 * values.mean(-1)
  image = axis.imshow(mean, cmap='viridis_r' if name == 'forgetting' else 'viridis', aspect='auto')
  middle = (mean.min() + mean.max()) / 2
  for (i, j), value in np.ndenumerate(mean):
    dark = (value < middle) != (name == 'forgetting')
    axis.text(j, i, f'{value:.1f}', ha='center', va='center', color='white' if dark else 'black')
  axis.set(title=f'{title}, %', xlabel='learning rate')
  axis.set_xticks(range(len(RATES)), [f'{r:g}' for r in RATES])
  axis.set_yticks(range(len(COEFS)), [f'{c:g}' for c in COEFS])
axes[0].set_ylabel("EWC's coefficient")
plt.show()

# %% [markdown]
# Choosing the best cell by these figures would use the test data of all tasks, the future ones included.
# The continual hyperparameter framework of De Lange et al. chooses task by task on validation data of the
# current one: `python -m experiments.framework`, and [docs/sweeps.md](../docs/sweeps.md) for grids from
# the command line.
