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
# # A first run: does a network forget, and does replay help?
#
# Ten kinds of clothing arrive two at a time. A small network learns each pair and is then tested on all of
# them. Once it is trained naively; once it also rehearses a few stored images (experience replay, Chaudhry et
# al. 2019).
#
# Open this file as a notebook with jupytext (`jupytext --to ipynb notebooks/first_run.py`).

# %%
import os

import jax
import matplotlib.pyplot as plt
import optax

from cl_jax import Method, learner, run, streams
from cl_jax.methods.replay.er import er
from cl_jax.metrics import summary
from cl_jax.models.mlp import mlp

SMOKE = bool(os.environ.get('CL_JAX_SMOKE'))  # set by the tests: fewer steps

# %% [markdown]
# ## The stream
#
# Five tasks of two classes each, class-incremental: at test time nobody says which task an image is from.

# %%
train, test = streams.dataset('fashion_mnist_small')
plan = streams.Plan(batch=10, iterations=20 if SMOKE else 240)
stream = streams.put(streams.split(train, test, 'class', 5, plan=plan))
print(f'{stream.tasks} tasks of {stream.index.shape[1]} steps; told: {", ".join(stream.told)}')
print(*stream.task_names, sep='\n')

# %% [markdown]
# ## Two learners, each run one compiled program

# %%
model = mlp((256, 256), stream.classes)
methods = {'naive': Method(), 'replay of 200 images': er(200, 10)}
records = {}
for name, method in methods.items():
  build = lambda lr, weights, method=method: learner(model, optax.sgd(lr), method)  # noqa: E731
  state, records[name] = jax.jit(run, static_argnums=0)(build, 0.05, jax.random.key(0), stream)
  measures = summary(records[name].R, records[name].start)
  print(f'{name}: accuracy {measures["acc"]:.3f}, forgetting {measures["forgetting"]:.3f}')

# %% [markdown]
# ## The accuracy matrix
#
# Row t: accuracy on every task after task t was learnt. A naive learner remembers the diagonal only.

# %%
figure, axes = plt.subplots(1, len(records), figsize=(9, 4), layout='constrained')
for axis, (name, record) in zip(axes, records.items(), strict=True):
  image = axis.imshow(record.R, vmin=0, vmax=1, cmap='viridis')
  for t, row in enumerate(record.R.tolist()):
    for i, value in enumerate(row[: t + 1]):
      color = 'white' if value < 0.6 else 'black'
      axis.text(i, t, f'{value:.2f}', ha='center', va='center', color=color)
  axis.set(title=name, xlabel='accuracy on task', ylabel='after task')
figure.colorbar(image, ax=axes)
plt.show()
