"""The search for a target where PMET's code ends it: step by step, one request at a time."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.editing import rows, target
from cl_jax.editing.rows import Requests, Rows
from cl_jax.editing.target import Recipe
from cl_jax.models import causal
from cl_jax.models.causal import Config
from tests.compiling import quick

CONFIG = Config(40, 16, 3, 4, 2, 24, 32)
SITES = ('attention', 'feedforward')
LAYER = 1
RECIPE = Recipe(steps=20, rate=0.3, clamp=4.0, kl=0.1, decay=0.1, eased=0.1)


@pytest.fixture(scope='module')
def requests() -> Requests:
  r = np.random.default_rng(0)
  token = lambda n: r.integers(0, 40, n).tolist()  # noqa: E731
  flat = rows.layout([(token(4), 3, token(1 + i // 2 % 2)) for i in range(8)])
  rewrite = Rows(*(a.reshape(4, 2, -1) for a in flat))
  return Requests(rewrite, rows.layout([(token(3), 1, []) for _ in range(4)]))


@quick
def value(p, recipe: Recipe, delta, fixed, weight):
  one = partial(target.loss, CONFIG, p, LAYER, recipe)
  return jax.value_and_grad(one, has_aux=True)(delta, fixed, weight)


def searched(p, request, recipe: Recipe):
  """(deltas, loss, log p, iterations, whether it was eased) of one request, by the rules of compute_zs.py."""
  fixed = target._prepare(CONFIG, p, request, LAYER, SITES)
  tx = optax.adam(recipe.rate)
  delta = jax.tree.map(jnp.zeros_like, fixed.start)
  opt, weight, eased = tx.init(delta), 1.0, False
  for i in range(recipe.steps):
    (lost, seen), g = value(p, recipe, delta, fixed, weight)
    if lost < recipe.stop:
      break
    weight = recipe.eased if seen.said else 1.0
    eased = eased or bool(seen.said)
    if seen.said and seen.divergence <= recipe.calm:
      break
    if i == recipe.steps - 1:
      break
    update, opt = tx.update(g, opt)
    delta = jax.tree.map(jnp.add, delta, update)
    for site in SITES:
      bound = recipe.clamp * jnp.linalg.norm(fixed.start[site])
      delta[site] *= jnp.minimum(1, bound / jnp.linalg.norm(delta[site]))
  return delta, lost, seen.log_p, i + 1, eased


@pytest.mark.parametrize('calm', [0.1, 0.0])
def test_a_target_that_is_said_counts_less_and_ends_the_search(requests, quickly, calm):
  p = causal.draw(jax.random.key(0), CONFIG, 0.3)
  recipe = RECIPE._replace(calm=calm)
  found = target.optimise(CONFIG, p, requests, LAYER, SITES, recipe, 4)
  ended = []
  for n in range(4):
    one = jax.tree.map(lambda a, n=n: a[n], requests)
    delta, lost, log_p, *how = searched(p, one, recipe)
    for site in SITES:
      np.testing.assert_allclose(found.delta[site][n], delta[site], atol=2e-4)
    np.testing.assert_allclose(found.loss[n], lost, atol=2e-4)
    np.testing.assert_allclose(found.log_p[n], log_p, atol=2e-4)
    ended.append(tuple(how))
  # Where a divergence is small enough the search ends, else it goes on to the end with a weaker loss.
  eased = [steps for steps, eased in ended if eased]
  assert eased
  assert all((steps < recipe.steps) == (calm > 0) for steps in eased), ended
