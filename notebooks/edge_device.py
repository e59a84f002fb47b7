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
# # Compile for an edge device
#
# A learner, its memory and its training step become one file of freestanding C99: no allocation, no
# library, every byte planned. Here it is written, compiled for this machine, and its training compared
# with JAX bit by bit. Takes half a minute; needs gcc.
#
# Open this file as a notebook with jupytext (`jupytext --to ipynb notebooks/edge_device.py`).

# %%
import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from cl_jax import learner, loop, streams
from cl_jax.edge import ram
from cl_jax.edge.c99 import FLAGS, emit
from cl_jax.edge.learner import flatten
from cl_jax.methods.replay.er import er
from cl_jax.models.mlp import mlp
from cl_jax.streams.take import take

SMOKE = bool(os.environ.get('CL_JAX_SMOKE'))  # set by the tests: fewer steps

# %% [markdown]
# ## The learner, as anywhere else
#
# Experience replay: 100 images of memory, a network 784-32-10.

# %%
train, test = streams.dataset('fashion_mnist_small')
stream = streams.put(
  streams.split(train, test, 'class', 5, plan=streams.Plan(batch=8, iterations=20))
)
made = learner(mlp((32,), stream.classes), optax.sgd(0.05), er(100, 8))
batch = take(stream, stream.index[0, 0], 0)
state = jax.jit(lambda key: loop.strong(made.init(key, batch)))(jax.random.key(0))

# %% [markdown]
# ## One C file
#
# `flatten` makes the step a function over lists of arrays, `emit` compiles its StableHLO to C: operations
# are fused, and one arena holds what lives at the same time.

# %%
flat = flatten(made, state, batch)
program = emit(flat, 'learner')
source = program.files['learner.c']
print(
  f'{len(source.splitlines()):,} lines of C, {program.manifest["macs"]["step"]:,} multiply-adds a step'
)
print(program.files['learner_main.c'])

# %% [markdown]
# ## Where every byte is

# %%
needed = {
  k: n for k, n in ram.needed({**program.manifest, 'outputs': 8 * 10}, ram.STACK).items() if n
}
for name, n in needed.items():
  print(f'{name:10} {n:10,} bytes')
print(f'{"in all":10} {sum(needed.values()):10,} bytes of RAM')

figure, axis = plt.subplots(figsize=(8, 1.6), layout='constrained')
left = 0
for name, n in sorted(needed.items(), key=lambda kv: -kv[1]):
  axis.barh(0, n / 1024, left=left / 1024, label=f'{name} {n / 1024:.1f} KB')
  left += n
axis.set(yticks=(), xlabel='RAM, KB')
axis.legend(ncols=4, frameon=False, loc='lower center', bbox_to_anchor=(0.5, 1.0), fontsize=8)
plt.show()

# %% [markdown]
# ## The same training, on this machine
#
# The state is one struct of the caller. Its table of leaves is in the program, so a few lines fill it and
# read it.


# %%
class Leaf(ctypes.Structure):
  _fields_ = [('name', ctypes.c_char_p), ('type', ctypes.c_char_p),
              ('offset', ctypes.c_size_t), ('bytes', ctypes.c_size_t)]  # fmt: skip


pointer = lambda a: a.ctypes.data_as(ctypes.c_void_p)  # noqa: E731
with tempfile.TemporaryDirectory() as folder:
  for name, text in program.files.items():
    (Path(folder) / name).write_text(text)
  compile_it = ['gcc', *FLAGS, '-shared', '-fPIC', '-o', 'learner.so', 'learner.c']
  subprocess.run(compile_it, cwd=folder, check=True)
  library = ctypes.CDLL(str(Path(folder) / 'learner.so'))
leaves = (Leaf * len(flat.leaves)).in_dll(library, 'learner_leaves')
memory = np.zeros(max(leaf.offset + leaf.bytes for leaf in leaves) + 8, np.uint8)
for leaf, value in zip(leaves, flat.leaves, strict=True):
  memory[leaf.offset : leaf.offset + leaf.bytes] = np.frombuffer(value.tobytes(), np.uint8)

# %%
steps = 10 if SMOKE else 100
step, loss, losses = jax.jit(made.step), np.zeros(1, np.float32), []
for i in range(steps):
  batch = take(stream, stream.index[i * stream.tasks // steps, i % 20], 0)
  state, expected = step(state, batch)
  rows = [np.ascontiguousarray(a) for a in jax.tree.leaves(batch)]
  library.learner_step(pointer(memory), *map(pointer, rows), pointer(loss))
  losses.append((float(expected), float(loss[0])))

# %% [markdown]
# Integers (the memory, its labels and counters, the random key) must be equal bit for bit, floats up to
# rounding.

# %%
now = flatten(made, state, batch).leaves
worst = 0.0
for leaf, want in zip(leaves, now, strict=True):
  got = np.frombuffer(memory[leaf.offset : leaf.offset + leaf.bytes].tobytes(), want.dtype)
  if want.dtype.kind == 'f':
    worst = max(worst, float(np.abs(got - want.ravel()).max()))
  else:
    assert np.array_equal(got, want.ravel()), leaf.name
print(f'{steps} steps: integers equal bit for bit, floats to {worst:.1e}')

# %%
figure, axis = plt.subplots(figsize=(8, 2.8), layout='constrained')
axis.plot([a for a, _ in losses], color='#0072b2', linewidth=3, label='JAX')
axis.plot([b for _, b in losses], color='#e69f00', linewidth=1, label='C99')
axis.set(xlabel='step', ylabel='loss')
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# `python -m experiments.export --config=configs/edge.py:er --target=cortex-m7 --ram=512K
# --out=runs/edge/er` does this for any configuration, `experiments.verify` runs it on emulated devices:
# [docs/edge.md](../docs/edge.md).
