"""What the transformers share: attention and a stack of layers as one scan.

A stack is a tree whose leaves have a leading axis of layers: it compiles once whatever the depth,
and the adapters and prompts of all layers are one array each.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.models.layers import dense, dense_init
from cl_jax.models.sliced import segments
from cl_jax.types import Array, Batch, Tree, Wire


def norm_init(d: int) -> Tree:
  return {'scale': jnp.ones(d), 'bias': jnp.zeros(d)}


def block_init(key: Array, d: int, ffn: int, init: str | float) -> Tree:
  """The weights of one layer: 'q', 'k', 'v', 'o', 'norm1', 'up', 'down', 'norm2'."""
  shapes = {'q': (d, d), 'k': (d, d), 'v': (d, d), 'o': (d, d), 'up': (d, ffn), 'down': (ffn, d)}
  keys = jax.random.split(key, len(shapes))
  blocks = {
    name: dense_init(k, *shape, init) for k, (name, shape) in zip(keys, shapes.items(), strict=True)
  }
  return blocks | {'norm1': norm_init(d), 'norm2': norm_init(d)}


def init_fn(
  draw: Callable[[Array], Tree], weights: Tree, d: int, classes: int, init: str | float
) -> Callable[[Array, Batch], tuple[Tree, Tree]]:
  """The `Model.init` of a backbone of width d, drawn unless `weights` are given, and a fresh head."""

  def start(key: Array, batch: Batch) -> tuple[Tree, Tree]:
    del batch
    k_backbone, k_head = jax.random.split(key)
    backbone = draw(k_backbone) if weights is None else weights
    return {'backbone': backbone, 'head': dense_init(k_head, d, classes, init)}, {}

  return start


def attention(p: Tree, h: Array, mask: Array | None, heads: int, tap, layer: Array) -> Array:
  """Multi-head self-attention (Vaswani et al. 2017, eq. 1) with scores and softmax in f32.

  The taps 'k' and 'v' may put a prefix before the keys and values, which every query then sees, as far as the
  tap 'scores' [B, heads, queries, keys] lets it.

  Args:
    p: 'q', 'k', 'v', 'o'.
    h: [B, L, D].
    mask: bool[B, L], the positions that may be attended to, or bool[B or 1, L, L], those that each position
      may attend to (which allows no prefix); None for all.
    heads: divides D.
    tap, layer: see `cl_jax.types.Model`.
  """
  b, length, d = h.shape
  if d % heads:
    raise UserError(f'{heads} attention heads do not divide {d} channels')
  k, v = tap('k', dense(p['k'], h), layer), tap('v', dense(p['v'], h), layer)
  q, k, v = (a.reshape(b, -1, heads, d // heads) for a in (dense(p['q'], h), k, v))
  exact = jnp.promote_types(q.dtype, jnp.float32)  # of bfloat16, too, sums are not rounded
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=exact)
  scores = scores.astype(jnp.float32) * (d // heads) ** -0.5
  if mask is not None:
    seen = mask[:, None] if mask.ndim == 3 else extend(mask, k.shape[1])[:, None, None, :]
    scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
  scores = tap('scores', scores, layer)
  share = jax.nn.softmax(scores, -1).astype(h.dtype)
  return dense(p['o'], jnp.einsum('bhqk,bkhd->bqhd', share, v).reshape(b, length, d))


def extend(mask: Array, length: int, value: bool = True) -> Array:
  """The mask bool[B, L] with `value` for positions that a tap has put before: bool[B, length]."""
  before = jnp.full((mask.shape[0], length - mask.shape[1]), value)
  return jnp.concatenate([before, mask], 1)


def wires() -> tuple[Wire, ...]:
  """The layers of a stack whose units a tap can switch off.

  A query's channel is of use where the key's is on. The residual stream belongs to no tap: a norm layer
  mixes its channels, so one that is zero shows in all of them.
  """
  layer = lambda name, *ends: Wire(f'backbone/layers/{name}', *ends)  # noqa: E731
  return (
    layer('q', '', 'k'),
    layer('k', '', 'k'),
    layer('v', '', 'v'),
    layer('o', 'v', ''),
    layer('up', '', 'mlp'),
    layer('down', 'mlp', ''),
  )


def cast(p: Tree, dtype: jnp.dtype) -> Tree:
  """The weights of a layer in the dtype it computes in; norms stay in f32."""

  def to(a: Array) -> Array:
    a = jnp.asarray(a)
    return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

  return {k: v if k.startswith('norm') else jax.tree.map(to, v) for k, v in p.items()}


def stack(
  block: Callable[[Tree, Array, Array], Array], p: Tree, h: Array, remat: bool, unroll: bool = False
) -> Array:
  """Applies `block(p[i], h, i)` for every layer i in turn.

  Args:
    block: (weights of one layer, h, index) -> h.
    p: every leaf [layers, ...]; a scalar (the scale of a `LowRank`) goes to every layer. Where leaves are
      `Upper`, the layers below run in a loop of their own, which keeps nothing for a backward pass.
    h: [B, L, D].
    remat: keep only the input of each layer for the backward pass and compute the rest again.
    unroll: compile the layers one by one instead of one for all.
  """
  for first, part in segments(p):
    h = _run(block, part, h, first, remat, unroll)
  return h


def _run(block, p: Tree, h: Array, first: int, remat: bool, unroll: bool) -> Array:
  layers = max(jnp.shape(a)[0] for a in jax.tree.leaves(p) if jnp.ndim(a))
  p = jax.tree.map(lambda a: a if jnp.ndim(a) else jnp.broadcast_to(a, (layers,)), p)

  def step(h: Array, layer: tuple[Tree, Array]) -> tuple[Array, None]:
    return block(layer[0], h, layer[1]), None

  step = jax.checkpoint(step) if remat else step
  index = first + jnp.arange(layers)
  return jax.lax.scan(step, h, (p, index), unroll=layers if unroll else 1)[0]
