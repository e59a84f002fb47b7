"""Partial fine-tuning: what lies below keeps its bits, and what lies above learns as it would alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.compose import chain
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.methods.isolation.partial import partial
from cl_jax.models.mlp import mlp
from cl_jax.models.vit import Config, vit
from cl_jax.types import Batch, no_tap
from tests.compiling import compiled, quick

MODEL = vit(Config(4, 2, 1, 8, 3, 2, 12), 3, init=0.4)


def batch(seed: int = 0) -> Batch:
  x = jax.random.normal(jax.random.key(seed), (6, 4, 4, 1))
  return Batch(x, jnp.arange(6) % 3, jnp.ones(6), jnp.full(6, -1))


@pytest.mark.parametrize(
  'tx',
  [optax.adamw(1e-2, weight_decay=0.1), optax.sgd(0.1, momentum=0.9)],
  ids=['adamw', 'momentum'],
)
def test_lower_layers_keep_their_bits(tx):
  L = compiled(learner(MODEL, tx, chain(partial=partial(2))))
  first = state = L.init(jax.random.key(0), batch())
  for i in range(4):
    state, _ = L.step(state, batch(i))
  old, new = (s.params['backbone']['layers'] for s in (first, state))
  for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
    np.testing.assert_array_equal(a[:2], b[:2])
  assert (old['up']['w'][2] != new['up']['w'][2]).any()
  assert (first.params['head']['w'] != state.params['head']['w']).any()


def test_one_step_equals_a_gradient_by_the_upper_layers_alone():
  """With plain SGD: the gradient of a network of which the lower layers are constants."""
  L = compiled(
    learner(MODEL, optax.sgd(0.1), chain(partial=partial(1, stack='backbone/layers/.*')))
  )
  state = L.init(jax.random.key(0), batch())
  new, _ = L.step(state, batch())
  stack = state.params['backbone']['layers']
  lower = jax.tree.map(lambda a: a[:1], stack)

  def loss(upper):
    layers = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), lower, upper)
    params = {**state.params, 'backbone': {**state.params['backbone'], 'layers': layers}}
    return MODEL.loss(MODEL.apply(params, batch(), no_tap, True), batch()).mean()

  upper = jax.tree.map(lambda a: a[1:], stack)
  want = jax.tree.map(lambda a, g: a - 0.1 * g, upper, quick(jax.grad(loss))(upper))
  got = jax.tree.map(lambda a: a[1:], new.params['backbone']['layers'])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_networks_without_the_layers_are_refused():
  L = learner(mlp((4,), 3), optax.sgd(0.1), chain(partial=partial(1)))
  with pytest.raises(UserError, match='matches no parameter that is trained'):
    L.init(jax.random.key(0), batch())
  L = learner(MODEL, optax.sgd(0.1), chain(partial=partial(3)))
  with pytest.raises(UserError, match='partial lowest=3: .* has 3 layers'):
    L.init(jax.random.key(0), batch())
