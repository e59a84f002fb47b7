"""Networks cut at a hidden activation: memory that holds what comes out there instead of inputs.

Below the cut the network is fixed from the first boundary on: it runs without a backward pass and with the
norm statistics of then, and what a memory holds enters right above it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from cl_jax.errors import UserError
from cl_jax.masks import nest, paths
from cl_jax.types import Array, Batch, Forward, Tree, no_tap, overlay


class Joined(NamedTuple):
  """The inputs of a batch whose last rows enter at the cut; its labels and weights cover all rows."""

  x: Tree  # [B, ...], as the stream stores them
  held: Tree  # every leaf [R, ...], as the memory stores them


def join(batch: Batch, drawn: Batch) -> Batch:
  """The batch with the rows of a memory after its own."""
  rest = jax.tree.map(
    lambda a, b: jnp.concatenate([a, b]), batch._replace(x=()), drawn._replace(x=())
  )
  return rest._replace(x=Joined(batch.x, drawn.x))


def at_cut(apply: Callable, variables: Tree, batch: Batch, name: str, tap=no_tap) -> Array:
  """The activation [B, ...] of the tap `name`, outside training.

  Raises:
    UserError: there is no such tap, or it belongs to a stack of layers that run as one loop.
  """
  seen: dict[str, Array | None] = {}

  def find(n, h, layer=0):
    h = tap(n, h, layer)
    seen[n] = h if isinstance(layer, int) else None
    return h

  apply(variables, batch, find, False)
  found = seen.get(name)
  if found is None:
    there = sorted(n for n, h in seen.items() if h is not None)
    loop = ' (the layers of a stack run as one loop)' if name in seen else ''
    raise UserError(
      f'the network cannot be cut at {name!r}{loop}: it can be at {", ".join(there) or "no tap"}, '
      'or below the head by config.cache_features'
    )
  return found


def below(apply: Callable, variables: Tree, batch: Batch, name: str) -> set[str]:
  """Paths of the variables that the activation `name` depends on."""
  jaxpr = jax.make_jaxpr(lambda v: at_cut(apply, v, batch, name))(variables).jaxpr
  _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return {path for path, u in zip(paths(variables), used, strict=True) if u}


def begin(fwd: Forward, params: Tree, batch: Batch, name: str) -> tuple[Any, Tree]:
  """(shape and dtype of the activation `name`, a bool[] per parameter: whether it lies below)."""
  variables = overlay(fwd.frozen, fwd.stats, params)
  h = jax.eval_shape(lambda v: at_cut(fwd.apply, v, batch, name), variables)
  under = below(fwd.apply, variables, batch, name)
  return h, nest({p: jnp.bool_(p in under) for p in paths(params)})


def hold(under: Tree, fixed: Array, old: Tree, new: Tree) -> Tree:
  """The new parameters, the old ones where `under` once the part below is `fixed`."""
  return jax.tree.map(lambda u, a, b: jnp.where(u & fixed, a, b), under, old, new)


def cut(
  apply: Callable,
  method: str,
  name: str,
  fixed: Array,
  keep: Callable[[Array], Tree] = lambda h: h,
  restore: Callable[[Tree], Array] = lambda kept: kept,
) -> Callable:
  """`apply` cut at the tap `name`; it takes batches with and without `Joined` inputs.

  Args:
    apply: a `Model.apply`.
    method: the name under which `aux` gets the activations h of the stream's rows.
    name: of the tap.
    fixed: bool[]: below the cut nothing is trained any more, and h becomes restore(keep(h)).
    keep: [B, ...] activations as a memory stores them.
    restore: its inverse, or nearly so.
  """

  def run(variables, batch, tap, train):
    joined = isinstance(batch.x, Joined)
    own = batch._replace(x=batch.x.x) if joined else batch
    held = batch.x.held if joined else None

    def enter(h):
      return h if held is None else jnp.concatenate([h, restore(held).astype(h.dtype)])

    def replaced(change):
      return lambda n, h, layer=0: change(tap(n, h, layer)) if n == name else tap(n, h, layer)

    def noted(out, h):
      return out._replace(aux={**out.aux, method: h})

    def free(variables):
      seen = []

      def change(h):
        seen.append(h)
        return enter(h)

      out = apply(variables, own, replaced(change), train)
      return noted(out, seen[0])

    def settled(variables):
      h = jax.lax.stop_gradient(at_cut(apply, variables, own, name, tap))
      above = enter(restore(keep(h)).astype(h.dtype))
      out = apply(variables, own, replaced(lambda _: above), train)
      old, still = paths(variables), below(apply, variables, first_row(own), name)
      stats = {p: old[p] if p in still else a for p, a in paths(out.stats).items()}
      return noted(out._replace(stats=nest(stats)), h)

    return jax.lax.cond(fixed, settled, free, variables)

  return run


def first_row(batch: Batch) -> Batch:
  return jax.tree.map(lambda a: a[:1], batch)
