"""What the methods with bottleneck adapters share: where a transformer takes them, and how they enter.

Adapters of all layers are one array per weight, with leading axes: [..., layers, d, r].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cl_jax import sparse
from cl_jax.errors import UserError
from cl_jax.lowrank import bounds
from cl_jax.types import Array, Batch, Forward, Tree, overlay


def sites(
  name: str, at: tuple[str, ...], params: Tree, batch: Batch, fwd: Forward
) -> tuple[int, int]:
  """(layers, width) of the residual stream at the taps `at`.

  Raises:
    UserError: the network has no such taps in a stack of layers; `name` says which method asks.
  """
  widths: dict[str, int] = {}

  def look(tap: str, h: Array, layer: Array | int = 0) -> Array:
    widths[tap] = h.shape[-1]
    return h

  jax.eval_shape(lambda p, b: fwd(p, b, look), params, batch)
  depth = sparse.layers(overlay(fwd.frozen, params))
  missing = [tap for tap in at if tap not in widths]
  if missing or not depth:
    raise UserError(
      f'{name} needs the taps {", ".join(at)} of a transformer (vit, bert, decoder, clip); '
      f'this network has {", ".join(sorted(widths)) or "none"}'
    )
  return depth, widths[at[0]]


def draw(key: Array, lead: tuple[int, ...], d: int, rank: int) -> Tree:
  """Adapters {'down': {'w': f32[*lead, d, r], 'b'}, 'up': {'w': f32[*lead, r, d], 'b'}}, 0 as functions."""
  return {
    'down': {'w': bounds(key, (*lead, d, rank)), 'b': jnp.zeros((*lead, rank))},
    'up': {'w': jnp.zeros((*lead, rank, d)), 'b': jnp.zeros((*lead, d))},
  }


def bottleneck(p: Tree, h: Array, layer: Array | int, activation: Callable) -> Array:
  """up(activation(down(h))) by the weights of one layer, in the dtype of h."""
  down, up = jax.tree.map(lambda a: a[layer].astype(h.dtype), (p['down'], p['up']))
  return activation(h @ down['w'] + down['b']) @ up['w'] + up['b']


def in_series(p: Tree, tap: Callable) -> Callable:
  """The tap that adds to h at every place in `p` the adapter of h, and then is `tap`."""

  def adapted(name: str, h: Array, layer: Array | int = 0) -> Array:
    if name in p:
      gelu = lambda a: jax.nn.gelu(a, approximate=False)  # noqa: E731
      h = h + bottleneck(p[name], h, layer, gelu)
    return tap(name, h, layer)

  return adapted


def in_parallel(p: Tree, scale: Array | float, tap: Callable) -> Callable:
  """The tap that adds to the feed-forward output `scale` times the adapter of what that block reads."""
  middle: list[Array] = []  # from one tap to the other, within the trace of one layer

  def adapted(name: str, h: Array, layer: Array | int = 0) -> Array:
    if name == 'feedforward':
      h = h + (scale * bottleneck(p, middle.pop(), layer, jax.nn.relu)).astype(h.dtype)
    h = tap(name, h, layer)
    if name == 'middle':
      middle.append(h)
    return h

  return adapted
