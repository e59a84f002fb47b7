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
# # Write your own method
#
# A method is a few pure functions over its own state. Here one is written from nothing: a *prototype
# anchor*. At the end of every task the mean feature of each of its classes is kept (one row a class, no
# images); later the network is pulled to go on placing the kept prototypes where its output layer finds
# them. Then it is composed with experience replay, and switched on and off inside one compiled program.
# Takes about half a minute.
#
# Open this file as a notebook with jupytext (`jupytext --to ipynb notebooks/your_method.py`).

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

from cl_jax import Method, chain, gated, learner, streams
from cl_jax.methods.replay.er import er
from cl_jax.metrics import accuracy
from cl_jax.models.mlp import mlp
from cl_jax.sweep import sweep

SMOKE = bool(os.environ.get('CL_JAX_SMOKE'))  # set by the tests: fewer steps

# %% [markdown]
# ## The method
#
# Three of the seven hooks are used (`cl_jax.types.Method` has them all, docs/hooks a page for each):
#
# - `init` makes the state: a row of features and a flag for every class;
# - `loss` adds a term to the loss of every step;
# - `boundary` runs when a task has ended, with its examples.
#
# `needs` says what the scenario must tell. A stream without boundaries refuses the method before the
# first step.


# %%
def prototypes(coef, classes):
  """A prototype a class, kept where the output layer finds it: bytes are classes x features x 4."""

  def init(key, params, batch, fwd):
    width = fwd(params, batch).features.shape[-1]
    return {}, {'mean': jnp.zeros((classes, width)), 'known': jnp.zeros(classes)}

  def loss(s, params, batch, out, fwd):
    top = params['head']
    logits = s['mean'] @ top['w'] + top['b']
    wrong = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(classes))
    return coef * (s['known'] * wrong).sum() / jnp.maximum(s['known'].sum(), 1)

  def boundary(s, params, batches, fwd, key):
    def add(total, batch):
      here = jax.nn.one_hot(batch.y, classes) * batch.w[:, None]  # padding has weight 0
      return (total[0] + here.T @ fwd(params, batch).features, total[1] + here.sum(0)), None

    zero = jnp.zeros_like(s['mean']), jnp.zeros_like(s['known'])
    (total, count), _ = jax.lax.scan(add, zero, batches)
    new = count > 0
    mean = jnp.where(new[:, None], total / jnp.maximum(count, 1)[:, None], s['mean'])
    return params, {'mean': mean, 'known': jnp.maximum(s['known'], new)}

  return Method(init=init, loss=loss, boundary=boundary, needs=('boundary',))


# %% [markdown]
# ## An experiment with it
#
# `gated(switch, method)` switches a method by a number that may differ between mapped runs: all four
# combinations, and two seeds of each, are one program.

# %%
train, test = streams.dataset('fashion_mnist_small')
plan = streams.Plan(batch=10, iterations=20 if SMOKE else 240)
stream = streams.put(streams.split(train, test, 'class', 5, plan=plan))


def build(cell, weights):
  method = chain(
    prototypes=gated(cell['prototypes'], prototypes(1.0, stream.classes)),
    er=gated(cell['er'], er(200, 10)),
  )
  return learner(mlp((256,), stream.classes), optax.sgd(0.05), method)


combinations = [(p, r) for p in (0.0, 1.0) for r in (0.0, 1.0)]
cells = [{'prototypes': p, 'er': r} for p, r in combinations for _ in range(2)]
keys = jax.random.split(jax.random.key(0), len(cells))
found = sweep(build, cells, keys, stream)

# %%
names, values = [], []
for i, (p, r) in enumerate(combinations):
  runs = [100 * accuracy(record.R) for _, record in found[2 * i : 2 * i + 2]]
  names.append(' + '.join(n for n, on in (('prototypes', p), ('replay', r)) if on) or 'naive')
  values.append(runs)
  print(f'{names[-1]:21} accuracy {runs[0]:.1f} and {runs[1]:.1f} %')

# %%
figure, axis = plt.subplots(figsize=(6, 2.5), layout='constrained')
for i, pair in enumerate(values):
  axis.plot(pair, [i] * len(pair), 'o', color='#0072b2')
axis.set(
  yticks=range(len(names)), yticklabels=names, xlabel='accuracy after five tasks, %', xlim=(0, 100)
)
axis.grid(axis='x', color='#dddddd')
plt.show()

# %% [markdown]
# Prototypes alone cannot help much here: the features below them move. That is what the figure says, and
# what makes methods that keep features on top of a frozen network (`ncm`, `slda`, `ranpac`) and methods
# that rehearse (`er`) two different answers. CONTRIBUTING.md shows what turns such a sketch into a method
# of the library: a file, a contract test that finds it by itself, a parity test and a configuration.
