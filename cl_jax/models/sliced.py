"""Weights of which a part is trained, in the place of arrays: some channels, or the last layers of a stack.

Nothing is put together before it is used: a product with the trained part and one with the frozen rest cost
as many multiply-adds as one with both, and the gradient of the rest is never asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.models.quantised import matrix, operator
from cl_jax.types import Array, Tree


@partial(
  jax.tree_util.register_dataclass,
  data_fields=['own', 'rest', 'order', 'inverse'],
  meta_fields=['axis'],
)
@dataclasses.dataclass(frozen=True)
class Sliced:
  """A weight [..., in, out] of which some channels are trained.

  Attributes:
    own: the trained channels, [..., in, k] or [..., k, out].
    rest: the others, an array or a quantised weight.
    order: i32[..., channels], the channels of `own` and then those of `rest`; () where they are in their own
      order. One more axis in front for a stack of layers, which `scan` slices.
    inverse: i32 of the same shape, the place of each channel in `order`; ().
    axis: 'out' or 'in'.
  """

  own: Any
  rest: Any
  order: Any
  inverse: Any
  axis: str

  def __rmatmul__(self, x: Array) -> Array:
    return self.product(lambda x, w: x @ operator(w), x)

  def product(self, f: Callable[[Array, Any], Array], x: Array) -> Array:
    """f(x, weight) for an f that is linear in both and mixes no channels, as products and filters are."""
    if self.axis == 'out':
      y = jnp.concatenate([f(x, self.own), f(x, self.rest)], -1)
      return y if isinstance(self.inverse, tuple) else arranged(y, self.inverse, self.order)
    if not isinstance(self.order, tuple):
      x = arranged(x, self.order, self.inverse)
    k = x.shape[-1] - matrix(self.rest).shape[-2]
    return f(x[..., :k], self.own) + f(x[..., k:], self.rest)


@jax.custom_vjp
def arranged(a: Array, order: Array, inverse: Array) -> Array:
  """a[..., order], whose gradient is a gather again and not a scatter, which is slow."""
  del inverse
  return a.at[..., order].get(mode='promise_in_bounds', unique_indices=True)


arranged.defvjp(
  lambda a, order, inverse: (arranged(a, order, inverse), (order, inverse)),
  lambda saved, g: (arranged(g, saved[1], saved[0]), None, None),
)


class Upper(NamedTuple):
  """A weight [layers, ...] of a stack whose last layers are trained.

  Attributes:
    lower: [below, ...], frozen; an array or a quantised weight.
    upper: [layers - below, ...], trained.
  """

  lower: Any
  upper: Any


def depth(a: Any) -> int:
  """The layers of a leaf of a stack."""
  return sum(map(depth, a)) if isinstance(a, Upper) else jax.tree.leaves(a)[0].shape[0]


def segments(p: Tree) -> list[tuple[int, Tree]]:
  """(first layer, weights) of the parts of a stack that have the same layers trained, from below.

  Every leaf of the weights is [layers of the part, ...]; those that are no `Upper` are cut alike.
  """
  is_upper = lambda a: isinstance(a, Upper)  # noqa: E731
  below = lambda a: jnp.shape(jax.tree.leaves(a.lower)[0])[0]  # noqa: E731
  nodes = jax.tree.leaves(p, is_leaf=is_upper)
  cuts = sorted({below(a) for a in nodes if is_upper(a)})
  if not cuts:
    return [(0, p)]

  def between(a: Any, low: int, high: int | None) -> Any:
    if not is_upper(a):
      return a[low:high] if jnp.ndim(a) else a
    first = below(a)
    if low >= first:
      return a.upper[low - first : None if high is None else high - first]
    return jax.tree.map(lambda a: a[low:high], a.lower)

  bounds = zip([0, *cuts], [*cuts, None], strict=True)
  return [
    (low, jax.tree.map(partial(between, low=low, high=high), p, is_leaf=is_upper))
    for low, high in bounds
  ]
