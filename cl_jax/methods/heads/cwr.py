"""CWR*: the output layer is consolidated class by class."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.types import Array, Method


class CWRState(NamedTuple):
  consolidated: Array  # f32[D + 1, C], weights and, in the last row, biases
  past: Array  # f32[C], rows of finished tasks
  now: Array  # f32[C], rows of the current one, those from a memory included


def cwr() -> Method:
  """Averages each class's outgoing weights over the tasks it occurred in, after a shift to mean 0.

  At a boundary, for every class c that was trained on: w_c is shifted by the mean of all such classes'
  weights, cw_c <- (cw_c * p + w_c) / (p + 1) with p = sqrt(past_c / now_c). Training goes on from cw_c,
  classes that have not occurred from 0.

  Lomonaco, Maltoni & Pellegrini 2020 (CVPR workshop), algorithm 2, which is part of AR1*; official code
  vlomonaco/ar1-pytorch. Deviations: counts are of rows trained on, not of examples (the same where tasks
  have equal epochs); the bias is one more weight (there: none); the first task begins at the network's
  initial weights, not at 0; classes that do not occur in the coming task begin at cw_c too, not at 0,
  since a learner does not know what comes.

  Needs the boundary. State: 4 (D + 1) + 8 bytes per class.
  """

  def init(key, params, batch, fwd):
    if set(params.get('head', {})) != {'w', 'b'}:
      raise UserError('cwr needs a trained output layer "head" of a weight w and a bias b')
    d, classes = params['head']['w'].shape
    none = jnp.zeros(classes)
    return {}, CWRState(jnp.zeros((d + 1, classes)), none, none)

  def grads(s, g, params, batch, grad_fn):
    return g, s._replace(now=s.now.at[batch.y].add((batch.w > 0).astype(s.now.dtype)))

  def boundary(s, params, batches, fwd, key):
    layer = jnp.concatenate([params['head']['w'], params['head']['b'][None]])
    trained = s.now > 0
    count = jnp.maximum(trained.sum(), 1) * layer.shape[0]
    shifted = layer - jnp.sum(jnp.where(trained, layer, 0)) / count
    p = jnp.sqrt(s.past / jnp.maximum(s.now, 1))
    merged = (s.consolidated * p + shifted) / (p + 1)
    kept = jnp.where(trained, merged, s.consolidated)  # 0 where a class has never occurred
    new = {**params, 'head': {'w': kept[:-1], 'b': kept[-1]}}
    return new, CWRState(kept, s.past + s.now, jnp.zeros_like(s.now))

  return Method(init=init, grads=grads, boundary=boundary, needs=('boundary',))
