"""The unrolled generator draws what `jax.random` draws, to the bit, and adds nothing to a state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.learner import learner
from cl_jax.models.mlp import mlp
from cl_jax.rng import plain, unrolled
from cl_jax.types import Batch

DRAWS = {
  'bits8': lambda k: jax.random.bits(k, (5,), 'uint8'),
  'bits16': lambda k: jax.random.bits(k, (5,), 'uint16'),
  'bits': lambda k: jax.random.bits(k, (3, 4)),
  'scalar': lambda k: jax.random.bits(k, ()),
  'uniform': lambda k: jax.random.uniform(k, (7,)),
  'normal': lambda k: jax.random.normal(k, (3, 5)),
  'randint': lambda k: jax.random.randint(k, (9,), 0, jnp.arange(1, 10)),
  'permutation': lambda k: jax.random.permutation(k, 11),
  'choice': lambda k: jax.random.choice(k, 9, (4,), replace=False),
  'categorical': lambda k: jax.random.categorical(k, jnp.zeros((3, 4))),
  'split': lambda k: jax.random.key_data(jax.random.split(k, (2, 3))),
  'fold_in': lambda k: jax.random.key_data(jax.random.fold_in(k, 2**32 - 1)),
  'mapped': lambda k: jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(k, i), (2,)))(
    jnp.arange(3)
  ),
}


@pytest.mark.parametrize('name', DRAWS)
@pytest.mark.parametrize('seed', [0, 2**31 - 1])
def test_draws_are_those_of_jax_random(name, seed):
  key = jax.random.fold_in(jax.random.key(seed), 5)  # both words of the key are in use
  np.testing.assert_array_equal(DRAWS[name](unrolled(key)), DRAWS[name](key))


def test_other_generators_are_left_alone():
  key = jax.random.key(0, impl='rbg')
  assert unrolled(key).dtype == key.dtype
  assert plain(key).dtype == key.dtype


def test_a_state_holds_an_ordinary_key():
  batch = Batch(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.zeros(2, jnp.int32))
  key = jax.random.key(1)
  learn = learner(mlp((4,), 2), optax.sgd(0.1))
  state = learn.init(key, batch)
  assert state.key.dtype == key.dtype
  assert learn.step(state, batch)[0].key.dtype == key.dtype
