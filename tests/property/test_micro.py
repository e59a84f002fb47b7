"""Micro-batches: the step of the whole batch up to rounding, with the activations of a part."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import budget
from cl_jax.compose import chain
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.replay.der import der
from cl_jax.methods.replay.er import er
from cl_jax.methods.replay.latent import latent
from cl_jax.models.layers import batch_norm, dense, dense_init
from cl_jax.models.mlp import mlp
from cl_jax.types import Batch, Model, Out, no_tap, overlay
from tests.compiling import quick

MODEL = mlp((8,), 4)


def batch(seed: int, rows: int = 8) -> Batch:
  x = jax.random.normal(jax.random.key(seed), (rows, 6))
  w = jnp.ones(rows).at[jnp.array([1, 4, 6])].set(0.0)  # padding that falls unevenly
  return Batch(x, jnp.arange(rows) % 4, w, jnp.full(rows, -1))


METHODS = {
  'er with ewc': chain(er=er(capacity=20, draw=4), ewc=ewc(30.0)),
  'der': der(capacity=20, draw=4, alpha=1.0),  # keeps the logits of each row
  'latent': latent('l0', capacity=20, draw=4),  # rows that enter inside the network
}


@pytest.mark.parametrize('name', METHODS)
def test_a_step_equals_that_of_the_whole_batch(name):
  """With rehearsed rows, padding, a penalty and memory: parameters, loss, and what memory was given."""
  method = METHODS[name]
  whole, parts = (learner(MODEL, optax.sgd(0.1), method, micro_batches=n) for n in (1, 4))
  state = quick(whole.init)(jax.random.key(0), batch(0))
  other = state
  steps = quick(whole.step), quick(parts.step)
  boundary = quick(whole.boundary)
  for i in range(3):
    (state, loss), (other, again) = steps[0](state, batch(i)), steps[1](other, batch(i))
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    if i == 0:
      state, other = (
        boundary(s, jax.tree.map(lambda a: a[None], batch(9))) for s in (state, other)
      )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
  jax.tree.map(close, (state.params, state.method), (other.params, other.method))


def test_norm_statistics_are_the_mean_of_those_of_the_parts():
  """By the weight of each, rows i, i + n, ...; not those of the whole batch."""

  def init(key, batch):
    params = {
      'norm': {'scale': jnp.ones(6), 'bias': jnp.zeros(6)},
      'head': dense_init(key, 6, 4, 'he'),
    }
    return params, {'norm': {'mean': jnp.zeros(6), 'var': jnp.ones(6)}}

  def apply(variables, batch, tap=no_tap, train=False):
    h, stats = batch_norm(variables['norm'], batch.x, batch.w, train)
    return Out(dense(variables['head'], h), h, {'norm': stats} if train else {})

  model, rows = Model(init, apply, MODEL.loss), batch(0)
  L = learner(model, optax.sgd(0.1), micro_batches=2)
  state = quick(L.init)(jax.random.key(0), rows)
  got = quick(L.step)(state, rows)[0]
  variables = overlay(state.stats, state.params)
  each = [jax.tree.map(lambda a, i=i: a[i::2], rows) for i in (0, 1)]
  assert [float(b.w.sum()) for b in each] == [2.0, 3.0]
  run = quick(lambda b: model.apply(variables, b, train=True).stats)
  stats, other = [run(b) for b in each], run(rows)
  share = [float(b.w.sum() / rows.w.sum()) for b in each]
  want = jax.tree.map(lambda a, b: share[0] * a + share[1] * b, *stats)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got.stats, want)
  assert jnp.abs(got.stats['norm']['var'] - other['norm']['var']).max() > 1e-3


def test_the_parts_run_one_after_the_other():
  """As many multiply-adds, and the temporary memory of a part."""
  model, rows = budget.scoped(mlp((512, 512), 4)), 256
  example = batch(0, rows)

  def made(n):
    L = learner(model, optax.sgd(0.1), micro_batches=n)
    state = jax.eval_shape(L.init, jax.random.key(0), example)
    return budget.macs(L.step, state, example), budget.compiled(L.step, state, example).temporary

  (one, full), (parts, small) = made(1), made(8)
  assert parts == one
  assert (
    small - 4 * 2 * 512 * 512 < full / 3
  )  # beside the sum of the gradients and one of its terms


def test_rows_that_cannot_be_shared_out_are_named():
  L = learner(MODEL, optax.sgd(0.1), er(capacity=20, draw=3), micro_batches=4)
  state = jax.eval_shape(L.init, jax.random.key(0), batch(0))
  with pytest.raises(UserError, match='micro_batches=4 must divide .* there are 11'):
    jax.eval_shape(L.step, state, batch(0))
