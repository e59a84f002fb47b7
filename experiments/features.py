"""Features of a network that does not change below its head: computed once, learnt from many times."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cl_jax import budget, checkpoint
from cl_jax.errors import UserError
from cl_jax.masks import paths, subtract
from cl_jax.streams import cache
from cl_jax.types import Batch, Forward, Method, Model, Stream, Tree, overlay
from experiments.config import dumps

BATCH = 128
BUCKET = 8  # tokens; sentences are cut to a multiple of it


class Cached(NamedTuple):
  """What learns from features.

  Attributes:
    streams: with features f32[N, D] as inputs, in training and in the tests.
    flops: of the network's pass over one example, as long as the data has it: what is not computed again.
  """

  streams: list[Stream]
  flops: int


def cached(
  config: Mapping[str, Any],
  make: Callable[[Tree], Model],
  weights: dict[str, Tree],
  method: Method,
  streams: list[Stream],
  tell: Callable[[str], None],
) -> Cached:
  """The streams with the network's features in the place of their inputs.

  They are kept as .npy below CL_JAX_CACHE, under a digest of the weights, of the network's arguments and
  of the data. What is kept is what the network computes in inference mode.

  Raises:
    UserError: something below the head is trained, or a method changes it.
  """
  model = make(weights)
  first = batch_of(jax.tree.map(lambda a: np.asarray(a[:1]), streams[0].x))
  params, stats = model.init(jax.random.key(0), first)
  moving = [p for p in paths(subtract(params, weights['frozen'])) if not p.startswith('head/')]
  if moving or stats:
    what = moving[0] if moving else next(iter(paths(stats)))
    raise UserError(
      f'config.cache_features: {what} is not frozen, and features would move with it; freeze '
      'everything below the head (config.freeze), or switch it off'
    )
  _leaves_it_alone(method, model, params, stats, weights['frozen'], first)
  variables = overlay(params, weights['frozen'])
  below = {k: v for k, v in variables.items() if k != 'head'}
  mark = cache.digest(checkpoint.digest(below), dumps(config['model']))
  compute = jax.jit(lambda v, x: model.apply(v, batch_of(x)).features)
  known: dict[tuple[int, ...], np.ndarray] = {}  # by identity: seeds share arrays that are equal

  def of(x: Tree, what: str) -> np.ndarray:
    key = cache.digest(mark, checkpoint.digest(x))
    return cache.cached(
      ('features', f'{config["model"]["name"]}-{key[:24]}'),
      lambda: {'features': extract(compute, variables, x, what, tell)},
      f'features of {what}',
    )['features']

  def train_features(s: Stream) -> np.ndarray:
    return of(s.x, 'the training data')

  def test_features(s: Stream) -> np.ndarray:
    real = np.asarray(s.test.w) > 0
    found = of(jax.tree.map(lambda a: a[real], s.test.x), 'the test data')
    whole = np.zeros((*real.shape, found.shape[-1]), np.float32)
    whole[real] = found
    return whole

  def once(arrays: Tree, make: Callable[[Stream], np.ndarray], s: Stream) -> np.ndarray:
    # Of text, masks may be the same where tokens are not.
    key = (*map(id, jax.tree.leaves(arrays)),)
    if key not in known:
      known[key] = make(s)
    return known[key]

  out = []
  for s in streams:
    x = once(s.x, train_features, s)
    test = once((s.test.x, s.test.w), test_features, s)
    out.append(dataclasses.replace(s, x=x, test=s.test._replace(x=test)))
  return Cached(out, budget.flops(compute, variables, first.x))


def batch_of(x: Tree) -> Batch:
  """Inputs as a batch whose labels nobody reads."""
  n = jax.tree.leaves(x)[0].shape[0]
  zeros: Any = np.zeros(n, np.int32)
  w: Any = np.ones(n, np.float32)
  return Batch(x, zeros, w, zeros - 1)


def extract(compute: Callable, variables: Tree, x: Tree, what: str, tell) -> np.ndarray:
  """f32[N, D]; sentences of similar length together and without the padding that none of them needs."""
  n = jax.tree.leaves(x)[0].shape[0]
  lengths = x['mask'].sum(-1) if isinstance(x, dict) and set(x) == {'tokens', 'mask'} else None
  order = np.arange(n) if lengths is None else np.argsort(lengths, kind='stable')
  features, said = None, 0
  for lo in range(0, n, BATCH):
    rows = order[
      np.minimum(np.arange(lo, lo + BATCH), n - 1)
    ]  # one shape for all: the last repeats
    part = jax.tree.map(lambda a, rows=rows: np.asarray(a[rows]), x)
    if lengths is not None:
      longest = max(int(lengths[rows].max()), 1)
      part = jax.tree.map(lambda a, to=-(-longest // BUCKET) * BUCKET: a[:, :to], part)
    found = np.asarray(compute(variables, part), np.float32)
    if features is None:
      features = np.empty((n, found.shape[-1]), np.float32)
    features[rows] = found
    if lo >= said:
      tell(f'computing the features of {what}, once: {lo} of {n}')
      said += max(n // 4, 1)
  assert features is not None
  if not np.isfinite(features).all():
    row = int(np.argmin(np.isfinite(features).all(axis=1)))
    raise UserError(f'the features of {what} have NaN or infinity in row {row}; look at the data')
  return features


def _leaves_it_alone(
  method: Method, model: Model, params: Tree, stats: Tree, frozen: Tree, first: Batch
) -> None:
  """Raises UserError for a method that adds parameters or changes activations below the head."""
  fwd = Forward(model.apply, frozen, stats)
  trained = subtract(params, frozen)
  added, s = jax.eval_shape(lambda: method.init(jax.random.key(0), trained, first, fwd))
  touched = list(added)

  def tap(name: str, h: Any, layer: Any = 0) -> Any:
    return h

  def probe(variables, batch, inner, train):
    if inner is not tap:
      touched.append('activations')
    return model.apply(variables, batch, inner, train)

  if not touched:
    jax.eval_shape(lambda s: method.wrap(s, probe)(overlay(params, frozen), first, tap, False), s)
  if touched:
    raise UserError(
      f'config.cache_features: a method changes the network below its head ({touched[0]}), so that '
      'features cannot be kept; switch it off'
    )
