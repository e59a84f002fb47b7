"""The contract that every model keeps, whatever its architecture."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.models import bert, clip, layers, vit
from cl_jax.models.cnn import cnn
from cl_jax.models.decoder import Config, decoder
from cl_jax.models.mlp import mlp
from cl_jax.models.resnet import resnet
from cl_jax.types import Batch, no_tap, overlay
from tests.compiling import quick

pytestmark = pytest.mark.usefixtures('quickly')

B, CLASSES = 6, 5


def images(*shape: int) -> Batch:
  x = jnp.asarray(np.random.default_rng(7).integers(0, 256, (B, *shape), np.uint8))
  return Batch(x, jnp.asarray(np.arange(B) % CLASSES), jnp.ones(B), jnp.zeros(B, jnp.int32))


def sentences() -> Batch:
  mask = jnp.asarray(np.arange(7) < np.array([[7], [3], [5], [1], [6], [4]]))
  tokens = jnp.asarray(np.random.default_rng(8).integers(0, 30, (B, 7), np.int32))
  return images(1)._replace(x={'tokens': tokens, 'mask': mask})


CLIP = clip.Config(8, 4, 3, 8, 2, 2, 12, projection=6)
CASES = {
  'clip': (clip.clip(CLIP, CLASSES, init=0.5), images(8, 8, 3)),
  'mlp': (mlp((8, 7), CLASSES, mean=0.1, std=0.3), images(6, 6)),
  'bert': (bert.bert(bert.Config(30, 8, 2, 2, 12, 10, 2), CLASSES, init=0.5), sentences()),
  'decoder': (decoder(Config(30, 8, 2, 2, 1, 12, 10), CLASSES, init=0.5), sentences()),
  'gpt': (
    decoder(
      Config(30, 8, 2, 2, 2, 12, 10, norm='layer', rope=False, gated=False), CLASSES, init=0.5
    ),
    sentences(),
  ),
  'cnn': (cnn((4, 3), (6,), CLASSES), images(9, 8, 3)),
  'resnet': (resnet(CLASSES, 3, (1, 1)), images(8, 8)),
  'vit': (vit.vit(vit.Config(8, 4, 3, 8, 2, 2, 12), CLASSES, init=0.5), images(8, 8, 3)),
  'linear': (mlp((), CLASSES), images(6, 6, 1)),
}


class Case:
  def __init__(self, name: str):
    self.name = name
    self.model, self.batch = CASES[name]
    self.params, self.stats = quick(self.model.init)(jax.random.key(0), self.batch)
    self.traces = 0

    def forward(params, stats, batch, train):
      self.traces += 1
      return self.model.apply(overlay(stats, params), batch, no_tap, train)

    def loss(params, batch):
      out = self.model.apply(overlay(self.stats, params), batch, no_tap, True)
      return (batch.w * self.model.loss(out, batch)).sum() / batch.w.sum(), out

    self.forward = quick(forward, static_argnums=3)
    self.gradient = quick(jax.grad(loss, has_aux=True))

  def grad(self, batch: Batch):
    return self.gradient(self.params, batch)


@pytest.fixture(scope='module', params=CASES)
def case(request) -> Case:
  return Case(request.param)


def close(got, want, **kwargs):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **kwargs), got, want)


def test_shapes_and_one_trace(case):
  out = case.forward(case.params, case.stats, case.batch, False)
  assert out.logits.shape == (B, CLASSES) and out.logits.dtype == jnp.float32
  assert out.features.shape[0] == B and out.features.dtype == jnp.float32
  np.testing.assert_allclose(
    layers.dense(case.params['head'], out.features), out.logits, rtol=1e-5, atol=1e-5
  )
  assert out.stats == {}
  trained = case.forward(case.params, case.stats, case.batch, True)
  assert jax.tree.structure(trained.stats) == jax.tree.structure(case.stats)
  traces = case.traces
  again = case.batch._replace(x=jax.tree.map(lambda a: a[::-1], case.batch.x))
  case.forward(case.params, case.stats, again, False)
  assert case.traces == traces


def test_params_and_stats_are_f32_and_disjoint(case):
  leaves = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(case.params)]
  stats = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(case.stats)]
  assert not set(leaves) & set(stats)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((case.params, case.stats)))


def test_rows_are_independent_in_evaluation(case):
  whole = case.forward(case.params, case.stats, case.batch, False)
  other = jax.tree.map(lambda a: a.at[1:].set(a[:1]), case.batch.x)
  alone = case.forward(case.params, case.stats, case.batch._replace(x=other), False)
  np.testing.assert_array_equal(alone.logits[0], whole.logits[0])


def test_rows_without_weight_change_nothing(case):
  w = jnp.array([1.0, 2, 1, 1, 0, 0])
  batch = case.batch._replace(w=w)
  other = jax.tree.map(lambda a: a.at[4:].set(a[:2]), batch.x)
  grad, out = case.grad(batch)
  grad2, out2 = case.grad(batch._replace(x=other, y=batch.y.at[4:].set(0)))
  close(grad2, grad, rtol=1e-5, atol=1e-6)
  close(out2.stats, out.stats, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(out2.logits[:4], out.logits[:4], rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient(case):
  grad, _ = case.grad(case.batch)
  for path, g in jax.tree_util.tree_leaves_with_path(grad):
    name = jax.tree_util.keystr(path)
    # A key bias adds the same to all of a query's scores, which the softmax takes away again.
    assert "['k']['b']" in name or jnp.abs(g).max() > 0, name


def test_low_rank_weights_equal_merged_ones(case):
  def low(path, w):
    if path[-1].key != 'w' or w.ndim > 3 or (w.ndim == 3 and 'layers' not in str(path)):
      return w
    k_a, k_b = jax.random.split(jax.random.fold_in(jax.random.key(3), w.size))
    a = 0.1 * jax.random.normal(k_a, (*w.shape[:-1], 2))
    b = 0.1 * jax.random.normal(k_b, (*w.shape[:-2], 2, w.shape[-1]))
    return layers.LowRank(w, a, b, jnp.full(w.shape[:-2], 0.5))

  adapted = jax.tree_util.tree_map_with_path(low, case.params)
  is_low = lambda p: isinstance(p, layers.LowRank)  # noqa: E731
  merged = jax.tree.map(lambda p: p.merge() if is_low(p) else p, adapted, is_leaf=is_low)
  got = case.forward(adapted, case.stats, case.batch, False)
  want = case.forward(merged, case.stats, case.batch, False)
  plain = case.forward(case.params, case.stats, case.batch, False)
  np.testing.assert_allclose(got.logits, want.logits, rtol=1e-4, atol=1e-4)
  assert jnp.abs(got.logits - plain.logits).max() > 1e-3


def test_taps_see_and_change_the_activations(case):
  seen = {}

  def look(name, h, layer=0):
    seen[name] = h.shape
    return h

  def silence(name, h, layer=0):
    return h if name == 'embed' else jnp.zeros_like(h)

  variables = overlay(case.stats, case.params)
  jax.eval_shape(lambda v: case.model.apply(v, case.batch, look, False), variables)
  assert (not seen) == (case.name == 'linear')
  assert all(shape[0] == B for shape in seen.values())
  if seen:
    out = quick(lambda v: case.model.apply(v, case.batch, silence, False))(variables)
    assert jnp.ptp(out.logits, axis=0).max() < 1e-5  # what is left does not depend on the input
