"""The decisions of the continual hyperparameter framework, with trainings that are scripted."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.framework import (
  Patience,
  Search,
  best_rate,
  candidates,
  decayed,
  until_no_better,
)


def test_the_best_rate():
  assert best_rate((0.1, 0.01, 0.001), (0.5, 0.9, 0.9)) == (0.01, 0.9)
  assert best_rate((0.1, 0.01), (math.nan, 0.2)) == (0.01, 0.2)
  assert best_rate((0.1, 0.01), (math.nan, math.nan)) == (0.1, 0.0)


def test_rates_of_the_first_task():
  search = Search(rates=(1.0,), first_rates=(3.0, 2.0))
  assert search.rates_of(0) == (3.0, 2.0, 1.0) and search.rates_of(1) == (1.0,)


def test_one_hyperparameter_is_halved_until_enough_is_kept():
  tried = []

  def trial(stability):
    tried.append(stability['coef'])
    return (0.9 if stability['coef'] <= 100 else 0.7), f'model at {stability["coef"]}'

  choice, model = decayed(trial, {'coef': 400.0}, 0.01, 0.95, Search(drop=0.2, decay=0.5))
  assert tried == [400.0, 200.0, 100.0] and model == 'model at 100.0'  # the goal is 0.76
  assert choice.stability == choice.base == {'coef': 100.0}
  assert choice.attempts == 3 and choice.met and choice.accuracy == 0.9


def test_the_last_model_is_kept_when_nothing_helps():
  choice, model = decayed(
    lambda s: (math.nan, s['coef']), {'coef': 1.0}, 0.01, 0.9, Search(attempts=4)
  )
  assert not choice.met and choice.attempts == 4 and model == 0.125 == choice.stability['coef']


def test_a_method_without_stability_is_trained_once():
  choice, _ = decayed(lambda s: (0.1, None), {}, 0.01, 0.9, Search())
  assert choice.attempts == 1 and not choice.met and choice.stability == {}


def test_of_several_each_is_decayed_alone_then_all():
  found = candidates({'a': 8.0, 'b': 4.0}, 0.5)
  first = [next(found)[0] for _ in range(7)]
  assert [(c['a'], c['b']) for c in first] == [
    (8, 4), (4, 4), (8, 2), (4, 2), (2, 2), (4, 1), (2, 1),
  ]  # fmt: skip


def test_those_that_belong_together_are_decayed_as_one():
  found = candidates({'a': 8.0, 'b': 4.0}, 0.5, (('a', 'b'), ('elsewhere',)))
  assert [tuple(next(found)[0].values()) for _ in range(3)] == [(8, 4), (4, 2), (2, 1)]
  found = candidates({'a': 8.0, 'b': 4.0, 'c': 2.0}, 0.5, (('a', 'c'),))
  tried = [tuple(next(found)[0].values()) for _ in range(4)]
  assert tried == [(8, 4, 2), (4, 4, 1), (8, 2, 2), (4, 2, 1)]


@pytest.mark.parametrize('drop', [0.0, 0.2])
def test_the_goal_is_inclusive(drop):
  choice, _ = decayed(lambda s: ((1 - drop) * 0.5, None), {'c': 1.0}, 0.1, 0.5, Search(drop=drop))
  assert choice.met and choice.attempts == 1


@pytest.mark.parametrize('seed', range(4))
def test_training_ends_when_it_is_no_better(seed):
  """Against the survey's loop in Python: which epoch is kept, how many are trained, at which rates."""
  rng, epochs = np.random.default_rng(seed), 30
  accuracy = np.cumsum(rng.normal(0.01, 0.05, epochs)).astype(np.float32)
  accuracy[rng.integers(0, epochs, 3)] = np.nan
  patience = Patience(2, 4, 0.1)

  count, rate, best, top, rates = 0, 1.0, -1, -1.0, []
  for epoch in range(epochs):
    if count > patience.stop:
      break
    if count == patience.lower:
      rate *= patience.factor
    rates.append(rate)
    if accuracy[epoch] > top:
      best, top, count = epoch, accuracy[epoch], 0
    else:
      count += 1

  def train(model, epoch, scale):
    _, seen = model
    return epoch, seen.at[epoch].set(scale)

  def run():
    start = (jnp.int32(-1), jnp.full(epochs, jnp.nan))
    measure = lambda model: jnp.asarray(accuracy)[model[0]]  # noqa: E731
    return until_no_better(train, measure, start, epochs, patience)

  (kept, seen), done = jax.jit(run)()
  assert (int(kept), int(done)) == (best, len(rates))
  np.testing.assert_allclose(seen[: best + 1], rates[: best + 1], rtol=1e-6)
  assert np.isnan(seen[best + 1 :]).all()


def test_a_model_without_an_accuracy_comes_back_as_it_was():
  train = lambda model, epoch, scale: model + 1  # noqa: E731
  model, done = until_no_better(
    train, lambda model: jnp.float32(jnp.nan), jnp.int32(7), 20, Patience(1, 2, 0.5)
  )
  assert (int(model), int(done)) == (7, 3)
