"""What the low-rank methods share: which weights they adapt, and a slot of factors for every task.

Slots are stacked on a leading axis of tasks: a [T, ..., d_in, r] and b [T, ..., r, d_out], where `...` is the
axis of a stack of layers, if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.masks import matches, nest, path_name, paths
from cl_jax.models.layers import LowRank
from cl_jax.models.quantised import dequantise_tree, is_stored, matrix
from cl_jax.sparse import REST
from cl_jax.types import Array, Forward, Method, Tree, overlay


def select(name: str, targets: str, params: Tree, fwd: Forward) -> dict[str, jax.ShapeDtypeStruct]:
  """The weight matrices whose whole path matches `targets`, trained or frozen, [..., d_in, d_out] by path.

  Weights in few bits count as the matrices that they stand for.

  Raises:
    UserError: there is none, or a part of one is trained (`sparse`); `name` says whose argument it was.
  """
  known = paths(overlay(fwd.frozen, params), is_stored)
  try:
    shapes = {p: matrix(a) for p, a in known.items() if matches(targets, p)}
  except UserError as error:
    raise UserError(f'{name} targets: {error}') from error
  found = {p: a for p, a in shapes.items() if a.ndim >= 2}
  if not found:
    raise UserError(f'{name} targets {targets!r} match no weight matrix of the model')
  apart = {p.split('/', 2)[-1] for p in known if p.startswith(f'{REST}/')}
  cut = [p for p in found if p in apart or p.startswith(f'{REST}/')]
  if cut:
    raise UserError(
      f'{name} targets {targets!r} match {cut[0]!r}, of which config.update.parts trains a part: adapters '
      "need whole weights, 'all' or 'none'"
    )
  return found


def put(
  variables: Tree, branch: str, make: Callable[[Array | LowRank, dict[str, Array]], object]
) -> Tree:
  """The model's variables without `branch`, and with make(weight, leaves of the branch) where it has leaves.

  A weight that another method has replaced by an operator already is handed on as that operator.
  """
  own: dict[str, dict[str, Array]] = {}
  for path, leaf in paths(variables[branch]).items():
    place, _, name = path.rpartition('/')
    own.setdefault(place, {})[name] = leaf
  rest = {k: v for k, v in variables.items() if k != branch}
  leaves = paths(rest, lambda a: is_stored(a) or hasattr(a, '__rmatmul__'))
  return nest(leaves | {place: make(leaves[place], of) for place, of in own.items()})


def bounds(key: Array, shape: tuple[int, ...]) -> Array:
  """Down projections f32[..., d_in, r], U(+-1/sqrt(d_in)): Kaiming-uniform with a = sqrt(5), as LoRA's."""
  bound = shape[-2] ** -0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def operator(w: Array | LowRank, a: Array, b: Array, scale: Array | float = 1.0) -> LowRank:
  """w + scale * sum over tasks of a_i b_i, as one product of T r columns."""
  tasks, *stack, d_in, r = a.shape
  a = jnp.moveaxis(a, 0, -2).reshape(*stack, d_in, tasks * r)
  b = jnp.moveaxis(b, 0, -3).reshape(*stack, tasks * r, b.shape[-1])
  return LowRank(w, a, b, jnp.full(stack, scale))  # an axis per stacked layer, for the scan


def here(t: Array, a: Array) -> Array:
  """bool[T, 1, ...] beside a [T, ...]: the slot of task t; none where t is T or more."""
  return (jnp.arange(a.shape[0]) == t).reshape(-1, *[1] * (a.ndim - 1))


def train_only(t: Array, a: Array) -> Array:
  """`a` [T, ...] as it is, with a gradient for slot t alone."""
  return jnp.where(here(t, a), a, jax.lax.stop_gradient(a))


def keep(old: Tree, new: Tree, free: Callable[[str, Array], Array]) -> Tree:
  """`new` where free(name of the leaf, leaf), else `old`, bit for bit: no momentum or decay moves it."""

  def one(path, a, b):
    return jnp.where(free(path_name(path).rpartition('/')[2], b), b, a)

  return jax.tree_util.tree_map_with_path(one, old, new)


def drawn(
  key: Array,
  weights: Mapping[str, jax.ShapeDtypeStruct],
  make: Callable[[Array, tuple[int, ...], int, int], dict[str, Array]],
) -> Tree:
  """The branch of parameters with the leaves make(key, stack, d_in, d_out) at every weight."""
  leaves = {}
  for (path, w), k in zip(weights.items(), jax.random.split(key, len(weights)), strict=True):
    *stack, d_in, d_out = w.shape
    leaves |= {f'{path}/{n}': a for n, a in make(k, tuple(stack), d_in, d_out).items()}
  return nest(leaves)


def merged(method: Method, s: Tree, variables: Tree) -> Tree:
  """Plain variables that compute what `method` makes of them, its branch of parameters folded in.

  Args:
    method: one whose `wrap` puts low-rank operators in the place of weights and does nothing else: lora,
      olora, sdlora, inflora, or a chain of them.
    s: its state.
    variables: parameters over frozen weights, the method's branch among them.

  Returns:
    The same tree without that branch, and with arrays in the place of weights in few bits: nothing to add at
    inference, and a base for the next stage. It is new: `variables` keeps its bits and goes on as the network
    before the merge, which nothing has to be subtracted for. What the two compute differs by the rounding of
    f32 alone, as x (w + a b) does from x w + (x a) b.

  Raises:
    UserError: the method's `wrap` does something else.
  """
  try:
    adapted = method.wrap(s, lambda v, batch, tap, train: v)(variables, None, None, False)
  except (AttributeError, TypeError) as error:  # it reads inputs or outputs, and here are none
    raise UserError(
      'a method here does more than put low-rank terms beside weights, so that no weights can stand for it: '
      'merge runs of lora, olora, sdlora or inflora'
    ) from error
  is_operator = lambda a: isinstance(a, LowRank)  # noqa: E731
  whole = jax.tree.map(lambda a: a.merge() if is_operator(a) else a, adapted, is_leaf=is_operator)
  return dequantise_tree(whole)
