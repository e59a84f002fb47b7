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
from cl_jax.models.vit import Config as ViT
from cl_jax.models.vit import vit
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


def test_a_vit_and_a_sum_over_many_examples_in_bfloat16():
  """Stacks of norms and of weights alike; hundreds of small squares are not lost to 8 bits."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.random((1, 256, 4, 4, 1)), jnp.float32)
  y = jnp.asarray(rng.integers(0, 3, (1, 256)), jnp.int32)
  batches = Batch(x, y, jnp.ones((1, 256)), y)
  first = jax.tree.map(lambda a: a[0], batches)
  sums = []
  for dtype in ('float32', 'bfloat16'):
    model = vit(ViT(4, 2, 1, 8, 2, 2, 12), 3, init=0.4, dtype=dtype)
    params, _ = model.init(jax.random.key(0), first)
    backbone = params['backbone']
    frozen = {k: backbone.pop(k) for k in [*backbone] if k != 'layers'}
    fwd = Forward(model.apply, {'backbone': frozen}, {})
    assert fisher.is_dense(fwd, params, first)
    sums.append(fisher.diagonal(fwd, params, batches, jax.random.key(1), 'empirical'))
  exact, rough = (paths(s['backbone']['layers']) for s in sums)
  for path in (p for p in exact if p.endswith('/w')):
    assert float(rough[path].sum() / exact[path].sum()) == pytest.approx(1, abs=0.01), path


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
