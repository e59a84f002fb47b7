"""Networks cut at a hidden activation: what lies below is fixed, with its norm statistics, bit for bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax import cut
from cl_jax.compose import chain
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.masks import paths
from cl_jax.methods.heads.cwr import cwr
from cl_jax.methods.heads.seen_head import seen_head
from cl_jax.methods.regularisation.si import si
from cl_jax.methods.replay.latent import latent
from cl_jax.methods.replay.remind import remind
from cl_jax.models.mlp import mlp
from cl_jax.models.resnet import resnet
from cl_jax.models.vit import Config, vit
from cl_jax.types import Batch, overlay
from tests.compiling import compiled

pytestmark = pytest.mark.usefixtures('quickly')


def batch_of(seed, classes=(0, 1, 2), n=12):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(n, 8, 8, 1)), jnp.float32)
  y = jnp.asarray(rng.choice(classes, n), jnp.int32)
  return Batch(x, y, jnp.ones(n), jnp.full(n, -1, jnp.int32))


def test_what_lies_below_a_tap():
  model = resnet(6, 4, (1, 1))
  params, stats = model.init(jax.random.key(0), batch_of(0))
  under = cut.below(model.apply, overlay(stats, params), batch_of(0), 's0b0')
  assert under == {p for p in paths(overlay(stats, params)) if p.split('/')[0] in ('stem', 's0b0')}
  inner = cut.below(model.apply, overlay(stats, params), batch_of(0), 's1b0/conv1')
  assert inner == under | {f's1b0/conv1/{n}' for n in ('w', 'scale', 'bias', 'mean', 'var')}


METHODS = {
  'latent': lambda: chain(latent=latent('s0b0', 20, 6), head=seen_head(6)),
  'ar1': lambda: chain(latent=latent('s0b0', 20, 6), si=si(1.0), cwr=cwr()),
  'remind': lambda: chain(remind=remind('s0b0', 6, 20, 6, 2, 8, 3), head=seen_head(6)),
}


@pytest.mark.parametrize(('name', 'renorm'), [('latent', ()), ('ar1', (1.25, 0.5)), ('remind', ())])
def test_below_the_cut_nothing_moves_after_the_first_task(name, renorm):
  """Under Adam with decay, whose updates are not zero where gradients are: weights and statistics."""
  model = resnet(6, 4, (1, 1), renorm=renorm)
  learn = compiled(learner(model, optax.adamw(0.01, weight_decay=0.1), METHODS[name]()))
  step, end = learn.step, learn.boundary
  state = learn.init(jax.random.key(0), batch_of(0))
  start = paths(overlay(state.stats, state.params))
  for i in range(3):
    state, _ = step(state, batch_of(i))
  first = paths(overlay(state.stats, state.params))
  assert all(not np.array_equal(first[p], start[p]) for p in first)
  state = end(state, jax.tree.map(lambda a: a[None], batch_of(0)))
  fixed = paths(overlay(state.stats, state.params))
  for i in range(3):
    state, loss = step(state, batch_of(i, (3, 4, 5)))
    assert np.isfinite(loss)
  last = paths(overlay(state.stats, state.params))
  for path in last:
    under = path.split('/')[0] in ('stem', 's0b0')
    assert np.array_equal(last[path], fixed[path]) == under, path
  a, b = (learn.predict(state, batch_of(9, n=n)) for n in (12, 5))
  assert np.isfinite(a).all() and np.isfinite(b).all()


def test_rows_of_the_memory_enter_above_the_cut():
  """Their logits are those of the same activations, and no backward pass reaches below once it is fixed."""
  model = mlp((16, 12), 6)
  params, _ = model.init(jax.random.key(0), batch_of(0))
  own, other = batch_of(1), batch_of(2)
  held = cut.at_cut(model.apply, params, other, 'l0')
  joined = cut.join(own, other._replace(x=held))
  for fixed in (False, True):
    apply = cut.cut(model.apply, 'm', 'l0', jnp.bool_(fixed))
    out = apply(params, joined, lambda n, h, layer=0: h, True)
    whole = jnp.concatenate([own.x, other.x])
    expected = model.apply(params, own._replace(x=whole)).logits
    np.testing.assert_allclose(out.logits, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(out.aux['m'], cut.at_cut(model.apply, params, own, 'l0'))

    def total(p, apply=apply):
      out = apply(p, joined, lambda n, h, layer=0: h, True)
      return model.loss(out, joined).sum()

    g = jax.grad(total)(params)
    assert bool((g['l0']['w'] == 0).all()) == fixed and (g['l1']['w'] != 0).any()


def test_where_a_network_cannot_be_cut():
  for model, tap, message in (
    (vit(Config(8, 4, 1, 8, 2, 2, 12), 6), 'mlp', 'the layers of a stack run as one loop.*embed'),
    (mlp((16, 12), 6), 'l7', "cannot be cut at 'l7': it can be at l0, l1"),
  ):
    learn = learner(model, optax.sgd(0.1), latent(tap))
    with pytest.raises(UserError, match=message):
      learn.init(jax.random.key(0), batch_of(0))
  with pytest.raises(UserError, match='codebooks=5 does not divide the 16 channels'):
    learner(mlp((16,), 6), optax.sgd(0.1), remind('l0', 6, codebooks=5)).init(
      jax.random.key(0), batch_of(0)
    )
