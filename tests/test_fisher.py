"""The closed form of the Fisher diagonal against one gradient per example, where parameters are stacked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax import fisher
from cl_jax.masks import paths
from cl_jax.models.bert import Config, bert
from cl_jax.models.mlp import mlp
from cl_jax.types import Batch, Forward

pytestmark = pytest.mark.usefixtures('quickly')


@pytest.fixture(scope='module')
def sentences():
  """(fwd with frozen embeddings, the other parameters, 2 batches of 3 sentences, one of them padding)."""
  model = bert(Config(vocabulary=11, d=8, depth=2, heads=2, ffn=12, positions=6), 4, init=0.4)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, 11, (2, 3, 5)), jnp.int32)
  mask = jnp.arange(5) < jnp.asarray(rng.integers(2, 6, (2, 3)))[..., None]
  y = jnp.asarray(rng.integers(0, 4, (2, 3)), jnp.int32)
  batches = Batch({'tokens': tokens, 'mask': mask}, y, jnp.ones((2, 3)).at[1, 2].set(0), y)
  params, _ = model.init(jax.random.key(0), jax.tree.map(lambda a: a[0], batches))
  embed = params['backbone'].pop('embed')
  return Forward(model.apply, {'backbone': {'embed': embed}}, {}), params, batches


@pytest.mark.parametrize('labels', ['empirical', 'exact'])
def test_a_stack_of_transformer_layers(labels, sentences, monkeypatch):
  """Weights of tokens, biases, scales of norms, stacked over layers: all by one backward pass a batch."""
  fwd, params, batches = sentences
  assert fisher.is_dense(fwd, params, jax.tree.map(lambda a: a[0], batches))
  diagonal = lambda: fisher.diagonal(fwd, params, batches, jax.random.key(1), labels)  # noqa: E731
  closed = paths(diagonal())
  monkeypatch.setattr(fisher, 'is_dense', lambda *a: False)
  for path, rows in paths(diagonal()).items():
    # The bias of the keys moves no score, so its gradient is rounding alone: hence the absolute part.
    np.testing.assert_allclose(closed[path], rows, rtol=2e-4, atol=1e-9, err_msg=path)


def test_what_enters_in_another_way_is_not_taken_for_dense(sentences):
  fwd, params, batches = sentences
  first = jax.tree.map(lambda a: a[0], batches)
  whole = {**params, 'backbone': {**params['backbone'], **fwd.frozen['backbone']}}
  assert not fisher.is_dense(
    fwd._replace(frozen={}), whole, first
  )  # rows of an embedding are looked up
  model = mlp((), 3)
  tied = Forward(
    lambda v, b, tap, train: model.apply({'head': twice(v['head'])}, b, tap, train), {}, {}
  )
  x = Batch(jnp.ones((2, 3)), first.y[:2], first.w[:2], first.y[:2])
  assert not fisher.is_dense(tied, {'head': {'w': jnp.ones((3, 3)), 'b': jnp.ones(3)}}, x)


def twice(p):
  return {'w': p['w'] + p['w'], 'b': p['b']}
