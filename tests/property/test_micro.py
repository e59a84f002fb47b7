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
from cl_jax.methods.replay.er import er
from cl_jax.models.mlp import mlp
from cl_jax.types import Batch

MODEL = mlp((8,), 4)


def batch(seed: int, rows: int = 8) -> Batch:
  x = jax.random.normal(jax.random.key(seed), (rows, 6))
  w = jnp.ones(rows).at[jnp.array([1, 4, 6])].set(0.0)  # padding that falls unevenly
  return Batch(x, jnp.arange(rows) % 4, w, jnp.full(rows, -1))


def test_a_step_equals_that_of_the_whole_batch():
  """With rehearsed rows, padding, a penalty and memory: parameters, loss, and what memory was given."""
  method = chain(er=er(capacity=20, draw=4), ewc=ewc(30.0))
  whole, parts = (learner(MODEL, optax.sgd(0.1), method, micro_batches=n) for n in (1, 4))
  state = jax.jit(whole.init)(jax.random.key(0), batch(0))
  other = state
  steps = jax.jit(whole.step), jax.jit(parts.step)
  boundary = jax.jit(whole.boundary)
  for i in range(3):
    (state, loss), (other, again) = steps[0](state, batch(i)), steps[1](other, batch(i))
    np.testing.assert_allclose(loss, again, rtol=1e-5)
    if i == 0:
      state, other = (
        boundary(s, jax.tree.map(lambda a: a[None], batch(9))) for s in (state, other)
      )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # noqa: E731
  jax.tree.map(close, (state.params, state.method), (other.params, other.method))


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
