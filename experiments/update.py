"""`config.update`: the network of a configuration with the parts that are trained apart from the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import sparse
from cl_jax.errors import UserError
from cl_jax.loop import host_feed
from cl_jax.types import Batch, Model, Stream, Tree, overlay

Make = Callable[[Tree], Model]
FULL: dict[str, Any] = {'parts': (), 'channels': 'first'}


def rules(config: Mapping[str, Any]) -> sparse.Rules:
  """() where everything is trained, as in artefacts of earlier versions, which have no such field."""
  return config.get('update', FULL)['parts']


def network(
  config: Mapping[str, Any], make: Make, pretrained: Tree, first: Batch, stream: Stream
) -> Make:
  """(weights) -> the sparse model; weights are {'frozen', 'initial'} of the sparse one.

  Args:
    config: resolved.
    make: of the plain model.
    pretrained: {'backbone': its weights}, or {}.
    first: a batch.
    stream: of the first seed, whose first task a choice by gradients looks at.
  """
  own = rules(config)
  try:
    orders = _orders(config, make({'frozen': {}, 'initial': pretrained}), first, stream)
  except UserError as error:
    raise UserError(f'config.update.parts: {error}') from error

  def made(weights: Tree) -> Model:
    if pretrained:
      backbone = sparse.whole(overlay(weights['frozen'], weights['initial']), orders)
      weights = {'frozen': {}, 'initial': {'backbone': backbone['backbone']}}
    return sparse.sparse(make(weights), own, orders)

  return made


def _orders(config: Mapping[str, Any], model: Model, first: Batch, stream: Stream) -> sparse.Orders:
  """Which channels, the same for all runs; from the initial weights of seed 0, or the pretrained ones."""
  own, choice = rules(config), config['update']['channels']
  shapes, _ = jax.eval_shape(model.init, jax.random.key(0), first)
  kinds = {part.kind for part in sparse.parts(shapes, own).values()}
  if not kinds & {'in', 'out'} or choice == 'first':
    return {}
  params, stats = jax.jit(model.init)(jax.random.key(0), first)
  if choice == 'magnitude':
    return sparse.order(jax.tree.map(jnp.square, params), own)
  batches = host_feed(stream)(0, np.asarray(stream.ends[0]))
  return sparse.order(sparse.squared_gradients(model, params, stats, batches), own)
