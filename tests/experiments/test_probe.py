"""Probes of features: classifiers that are known by hand, and the command on a small network."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments import config, probe, run
from tests.experiments.test_features import FROZEN


def test_what_the_two_classifiers_can_and_cannot_tell_apart():
  rng = np.random.default_rng(0)
  y = rng.integers(0, 3, 300) * 2  # labels 0, 2 and 4
  apart = np.eye(6)[y] + 0.1 * rng.normal(size=(300, 6))
  assert (probe.nearest(apart[:200], y[:200], apart[200:] * 3) == y[200:]).all()
  assert (probe.linear(apart[:200], y[:200], apart[200:] * 3) == y[200:]).all()
  # Two clusters on either side of another class's: their mean is that class's, and no line is needed.
  angle = np.where(y == 0, 0.0, np.where(rng.random(300) < 0.8, 0.5, -0.5))
  x = np.stack([np.cos(angle), np.sin(angle), np.abs(np.sin(angle))], 1)
  labels = (y > 0).astype(int)
  x += 0.02 * rng.normal(size=x.shape)
  assert (probe.linear(x[:200], labels[:200], x[200:]) == labels[200:]).mean() > 0.97
  assert (probe.nearest(x[:200], labels[:200], x[200:]) == labels[200:]).mean() < 0.97


def test_the_objective_is_that_of_logistic_regression_with_c_1():
  """For two classes on a circle: the gradient of the sum of losses balances the weights."""
  rng = np.random.default_rng(1)
  y = np.arange(60) % 2
  x = probe.unit(rng.normal(size=(60, 3)) + y[:, None] * [1.0, 0, 0])
  w, b = probe.fitted(x, y, 2)
  p = np.exp(x @ w + b)
  p = p / p.sum(1, keepdims=True) - np.eye(2)[y]
  np.testing.assert_allclose(x.T @ p + w, 0, atol=1e-2)
  np.testing.assert_allclose(p.sum(0), 0, atol=1e-2)


def test_the_command(call, tmp_path, monkeypatch):
  monkeypatch.setenv('CL_JAX_CACHE', str(tmp_path / 'cache'))
  path = tmp_path / 'c.json'
  path.write_text(json.dumps(config.resolve(FROZEN)))
  done = call(probe.main, f'--config={path}')
  assert done.code == 0, done.err
  head, mean, linear = done.out.splitlines()
  assert head == 'mlp on fashion_mnist_small: 200 examples of 10 classes, 75 to test, 12 features'
  found = [float(row.split()[-2]) for row in (mean, linear)]
  assert all(30 < a <= 100 for a in found)
  joint = call(probe.main, f'--config={path}', '--config.scenario=joint')
  assert joint.code == 0 and joint.out == done.out, joint.err  # all of them are read there too
  seen = []
  monkeypatch.setattr(probe, 'nearest', lambda x, y, test: seen.append((x, test)) or test[:, 0])
  done = call(probe.main, f'--config={path}', '--standardise')
  assert done.code == 0 and done.out.splitlines()[0] == f'{head}, standardised'
  ((x, test),) = seen
  np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
  assert set(x.std(0).round(3)) <= {0, 1} and np.abs(test.mean(0)).max() > 1e-3
  done = call(probe.main, f'--config={path}', '--config.cache_features=False')
  assert done.code == 2 and 'learns from no cached features' in done.line


def test_the_final_network_of_a_run_is_probed(call, tmp_path):
  resolved = config.resolve({**FROZEN, 'cache_features': False, 'freeze': ('l0/.*',)})
  path, place = tmp_path / 'c.json', tmp_path / 'run'
  path.write_text(json.dumps(resolved))
  assert call(run.main, f'--config={path}', f'--workdir={place}').code == 0
  probe.probe(resolved, place, print)
  found = json.loads((place / 'probe.json').read_text())['ncm']
  assert 0.3 < found <= 1 and round(found * 75) == pytest.approx(found * 75)  # of 75 examples


@pytest.mark.parametrize('words', [(), ('--config=nothing.py',)])
def test_mistakes_are_one_line(call, words):
  done = call(probe.main, *words)
  assert (done.code, done.out) == (2, '') and len(done.err.strip().splitlines()) == 1
