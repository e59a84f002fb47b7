"""Partial fine-tuning: the lower layers of a stack stay as they are."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.masks import path_name, paths
from cl_jax.types import Method


def partial(lowest: int = 1, stack: str = 'backbone/layers/.*') -> Method:
  """Trains the layers of a stack from `lowest` on; those below keep their weights, bit for bit.

  Layers are stacked in one array a weight, so that patterns of paths (`learner(frozen=...)`) cannot tell them
  apart. What momentum, Adam or weight decay would do to the lower ones is undone after every step. The
  gradient is cut off below layer `lowest`: for all weights of lower layers and for what lies before them
  (embeddings, positions), whatever `stack` matches; of these, weight decay still moves those that it does not
  match. Gradients are computed all the same: this saves no time and no bytes of optimiser state; 'last N' of
  `cl_jax.sparse` saves both.

  Args:
    lowest: index of the first layer that is trained, counted from 0.
    stack: regular expression, matched against the whole path of a trained parameter [layers, ...].

  State: none.
  """

  def chosen(params):
    return {p: a for p, a in paths(params).items() if re.fullmatch(stack, p)}

  def init(key, params, batch, fwd):
    found = chosen(params)
    if not found:
      raise UserError(f'partial stack {stack!r} matches no parameter that is trained')
    path, a = next(iter(found.items()))
    if a.ndim < 1 or lowest >= a.shape[0]:
      raise UserError(f'partial lowest={lowest}: {path} has {a.shape[0] if a.ndim else 0} layers')
    return {}, ()

  def wrap(s, apply):
    def cut(variables, batch, tap, train):
      def stop(name, h, layer=0):
        h = tap(name, h, layer)
        return jnp.where(layer < lowest, jax.lax.stop_gradient(h), h) if name == 'block' else h

      return apply(variables, batch, stop, train)

    return cut

  def after(s, params, step, key):
    own = chosen(params)

    def keep(path, old, new):
      if path_name(path) not in own:
        return new
      lower = (jnp.arange(new.shape[0]) < lowest).reshape(-1, *[1] * (new.ndim - 1))
      return jnp.where(lower, old, new)

    return jax.tree_util.tree_map_with_path(keep, step.params, params), s

  return Method(init=init, wrap=wrap, after=after)
