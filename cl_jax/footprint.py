"""Memory of a training step of a Llama over many devices, before there are any: shapes and a formula.

What is kept (weights, gradients, the optimiser's moments) is exact: `jax.eval_shape` of the learner's own
`init`, each leaf divided as `cl_jax.shard.rule` divides it. What a step needs besides is a formula, in bytes,
for u tokens on a device (its rows times the length L):

  kept       depth * u * d * a           the input of every layer, which `remat` keeps and nothing else;
                                         without it, depth * (ALL * work + u * d * a)
and the largest of three stages, which follow one after the other:
  logits     LOGITS * u * V * 4
  unembed    2 * u * V * 4 + 2 * V * d * 4
  layer      work + GATHERED * w + V * d * 4
with
  work       SCORES * rows * heads * L^2 * 4 + (HIDDEN * ffn + WIDE * d) * u * a
  a, V, w    bytes of an activation; vocabulary; one layer's weights, whole: they are gathered before they are
             used, and their gradient is there whole before it is cut.

LOGITS ... ALL are how many such arrays XLA keeps at once, read from steps that it compiled for a CPU; a test
holds the formula to its figures, and `measured` asks for them. A GPU's compiler fuses more and needs less,
above all of logits and scores. For activations in 16 bits the formula is not checked: a CPU computes in 32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from cl_jax import budget, shard
from cl_jax.learner import learner
from cl_jax.masks import path_name
from cl_jax.models import causal
from cl_jax.models.decoder import decoder
from cl_jax.types import Batch, Learner, Model, Tree

# Llama 3.2 1B and Llama 3.1 8B, 70B, as their config.json says.
LLAMA = causal.Config(
  vocabulary=128256, positions=131072, theta=5e5, scaling=(8.0, 1.0, 4.0, 8192.0), kv_heads=8
)
SHAPES = {
  'smollm2-135m': causal.Config(),
  'llama-1b': LLAMA._replace(d=2048, depth=16, heads=32, ffn=8192),
  'llama-8b': LLAMA._replace(d=4096, depth=32, heads=32, ffn=14336, tied=False),
  'llama-70b': LLAMA._replace(d=8192, depth=80, heads=64, ffn=28672, tied=False),
}

LOGITS, GATHERED, SCORES, HIDDEN, WIDE = 4, 2, 3, 4, 4
ALL = 1.3  # of what a layer works with, kept for the backward pass


class Step(NamedTuple):
  """What is trained, and how.

  Attributes:
    config: shape of the model.
    rows, length: examples on each device, and their tokens.
    optimiser: a function of optax of a learning rate.
    mode: see `cl_jax.shard`.
    remat, dtype: of `decoder`.
    small: see `shard.Cut`.
  """

  config: causal.Config
  rows: int = 1
  length: int = 2048
  optimiser: str = 'adamw'
  mode: str = 'fsdp'
  remat: bool = True
  dtype: str = 'float32'
  small: int = shard.SMALL


class Footprint(NamedTuple):
  """Bytes on each device at the peak of a step."""

  parameters: int
  optimiser: int
  gradients: int
  batch: int
  kept: int
  stage: int
  largest: str

  @property
  def total(self) -> int:
    return sum(self[:-1])


def footprint(step: Step, n: int) -> Footprint:
  """Of one device of n."""
  c, made = step.config, learner(_model(step), _optimiser(step))
  state = jax.eval_shape(made.init, jax.random.key(0), _batch(step, n))
  own = lambda tree: part(tree, n if step.mode == 'fsdp' else 1, step.small)  # noqa: E731
  weights = own(state.params)
  u, a = step.rows * step.length, jnp.dtype(step.dtype).itemsize
  logits, table = 4 * u * c.vocabulary, 4 * c.vocabulary * c.d
  work = SCORES * step.rows * c.heads * step.length**2 * 4 + (HIDDEN * c.ffn + WIDE * c.d) * u * a
  layer = budget.tree_bytes(state.params['backbone']['layers']) // c.depth
  stages = {
    'logits': LOGITS * logits,
    'unembedding': 2 * logits + 2 * table,
    'one layer': work + GATHERED * layer + table,
  }
  largest = max(stages, key=lambda name: stages[name])
  return Footprint(
    weights,
    own(state.opt),
    weights,
    budget.tree_bytes(_batch(step, n)),
    c.depth * (u * c.d * a + (0 if step.remat else round(ALL * work))),
    stages[largest],
    largest,
  )


def parameters(step: Step) -> int:
  """How many the whole model has."""
  state = jax.eval_shape(_model(step).init, jax.random.key(0), _batch(step, 1))[0]
  return sum(a.size for a in jax.tree.leaves(state))


def part(tree: Tree, n: int, small: int) -> int:
  """Bytes of a tree on one of n devices, by the leaf rule."""
  total = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    floats = jnp.issubdtype(leaf.dtype, jnp.floating)
    cut = floats and shard.axis(path_name(path), leaf.shape, n, small) is not None
    total += budget.tree_bytes(leaf) // (n if cut else 1)
  return total


def fewest(step: Step, size: float, most: int = 1 << 14) -> int | None:
  """The least power of two of devices of `size` bytes on which the step fits; None where none does."""
  n = 1
  while n <= most:
    if footprint(step, n).total <= size:
      return n
    n *= 2
  return None


def measured(step: Step, devices: Any = None) -> budget.Peak:
  """What XLA says of the same step, compiled for these devices (all there are); nothing is allocated."""
  cut = shard.over(devices, step.mode, step.small)
  made: Learner = shard.placed(learner(shard.sharded(_model(step), cut), _optimiser(step)), cut)
  batch = _lying(_batch(step, cut.n), cut.whole)
  state = jax.eval_shape(made.init, jax.random.key(0), batch)
  return budget.compiled(made.step, _lying(state, shard.rule(cut, state)), batch, donate=(0,))


def _lying(tree: Tree, where: Any) -> Any:
  struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
  if isinstance(where, NamedSharding):
    return jax.tree.map(lambda a: struct(a, where), tree)
  return jax.tree.map(struct, tree, where)


def _model(step: Step) -> Model:
  return decoder(step.config, 0, output='tokens', remat=step.remat, dtype=jnp.dtype(step.dtype))


def _optimiser(step: Step) -> optax.GradientTransformation:
  return getattr(optax, step.optimiser)(1e-3)


def _batch(step: Step, n: int) -> Batch:
  """Shapes of a step's batch, which lies whole on every device until it is cut."""
  b = n * step.rows
  struct: Any = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
  i32, f32 = np.int32, np.float32
  x = {'tokens': struct(i32, b, step.length)}
  x |= {name: struct(np.bool_, b, step.length) for name in ('mask', 'learn')}
  return Batch(x, struct(i32, b), struct(f32, b), struct(i32, b))
