"""How well do features tell classes apart? `python -m experiments.probe --config=FILE[:ARG]`.

The configuration must have `cache_features`; its methods are not run. The features of all its training
examples are computed once and kept, and two classifiers learn from all of them, whatever the scenario. The
nearest class mean compares cosines; the linear probe is softmax regression on features of length 1 by
L-BFGS, whose objective is --C times the sum of losses and half the squared norm of the weights. Both are
measured on the test examples. They say how much the features can give a method that leaves them as they are.
--standardise takes the training examples' mean from every feature and divides by their deviation before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from cl_jax import checkpoint, durable
from cl_jax.errors import UserError
from cl_jax.types import Stream, overlay
from experiments import build, cli, config, features, options, run
from experiments.job import blank, spread

PROGRAM = 'experiments.probe'
FILE = 'probe.json'
ITERATIONS = 200  # of L-BFGS at most


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.parser(PROGRAM, __doc__)
  add = parser.add_argument
  add('--config', metavar='FILE[:ARG]', help='as for experiments.run, with --config.FIELD=VALUE')
  add('--data_dir', metavar='DIR', help='where data sets are (default: CL_JAX_DATA)')
  add('--C', type=float, default=1.0, help='the weight of the losses in the linear probe (1)')
  add('--standardise', action='store_true', help='features of mean 0 and variance 1')
  return cli.guarded(PROGRAM, lambda words: command(parser, words), argv)


def command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
  given, left = parser.parse_known_args(argv)
  overrides = options.fields_of(left)
  if given.config is None:
    raise UserError(
      '--config is missing: name a configuration, for example configs/clinc150.py:ncm'
    )
  if not 0 < given.C < 1e9:
    raise UserError(f'--C must be a positive number, not {given.C}')
  resolved, _, sweep = options.overridden(config.load(given.config), overrides)
  if sweep:
    raise UserError('config.sweep holds a grid: take one configuration')
  if not resolved['cache_features']:
    raise UserError(
      f'{given.config} learns from no cached features: --config.cache_features=True, with everything '
      'below the head frozen and no method that changes it'
    )
  cli.devices(1)
  own = {**resolved, 'seeds': tuple(resolved['seeds'])[:1]}
  stream = build.prepare(own, given.data_dir, lambda line: print(line, file=sys.stderr))[0].streams[
    0
  ]
  x, y, test, answers = examples(stream, stream.x, lambda a: a)
  if given.standardise:
    mean, deviation = x.mean(0), x.std(0)
    x, test = ((a - mean) / np.where(deviation > 0, deviation, 1) for a in (x, test))
  how = ', standardised' if given.standardise else ''
  print(
    f'{own["model"].get("pretrained") or own["model"]["name"]} on {own["dataset"]}: {len(x)} examples of '
    f'{len(np.unique(y))} classes, {len(test)} to test, {x.shape[1]} features{how}'
  )
  for name, guess in (
    ('nearest class mean', nearest),
    (f'linear probe, C={given.C:g}', partial(linear, C=given.C)),
  ):
    print(f'  {name:24}{100 * (guess(x, y, test) == answers).mean():5.1f} %', flush=True)
  return 0


def examples(
  stream: Stream, inputs: Any, of: Callable[[Any], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Features and labels of the examples that some step reads, and of those to test on.

  Args:
    inputs: of the stream, f32[N, ...] or a tree of these.
    of: their features.
  """
  rows = np.asarray(stream.index)
  rows = np.unique(rows[rows >= 0] % len(stream.y))  # k * N + n where legs mix tasks, see `Stream`
  test = stream.test
  real = np.asarray(test.w).reshape(-1) > 0
  flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[3:])[real], test.x)
  train = of(jax.tree.map(lambda a: np.asarray(a)[rows], inputs))
  return train, np.asarray(stream.y)[rows], of(flat), np.asarray(test.y).reshape(-1)[real]


def probe(resolved: Mapping[str, Any], place: Path, tell: Callable[[str], None]) -> None:
  """Did the features forget, or the output layer? Writes {'ncm': accuracy over all tasks} to probe.json.

  A network may fail on old classes because its features no longer tell them apart, or because its output
  layer no longer says so. Class means of its final features over ALL training sentences, old ones too, tell
  which (Davari et al., CVPR 2022, "Probing representation forgetting", with a linear probe). This looks back
  at the past, so it is a measurement and no method.

  Args:
    resolved: of a run with one seed, whose directory is `place`.
  """
  if (place / FILE).exists():
    return
  setup = build.prepare(resolved, tell=tell)[0]
  job = run.job(setup, place, config.sha256(resolved))
  like = blank(job, spread(job), resolved['eval_every'])
  found = checkpoint.restore(job.folder, like, job.sha256, tell, tidy=False)
  if found is None:
    tell(f'{place} has no checkpoint any more: its features are not measured')
    return
  model, stream = setup.model(setup.weights), setup.streams[0]
  variables = overlay(setup.weights['frozen'], found.tree.state.params)
  compute = jax.jit(lambda v, x: model.apply(v, features.batch_of(x)).features)

  def of(x: Any) -> np.ndarray:
    return features.extract(compute, variables, x, 'the data', tell)

  x, y, test, answers = examples(stream, stream.x, of)
  right = float((nearest(x, y, test) == answers).mean())
  durable.write(place / FILE, json.dumps({'ncm': right}) + '\n')


def nearest(train: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
  """i[N]: the class whose mean has the largest cosine with each row of `test`."""
  classes = np.unique(y)
  means = np.stack([train[y == c].mean(0) for c in classes])
  return classes[(unit(test) @ unit(means).T).argmax(1)]


def linear(train: np.ndarray, y: np.ndarray, test: np.ndarray, C: float = 1.0) -> np.ndarray:
  """i[N]: the class that softmax regression on all of `train` gives each row of `test`."""
  classes, labels = np.unique(y, return_inverse=True)
  # Features times the root of C and weights divided by it are the same, and L-BFGS takes fewer steps.
  w, b = fitted(unit(train) * C**0.5, labels, len(classes))
  return classes[(unit(test) @ w * C**0.5 + b).argmax(1)]


def fitted(x: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
  """Weights f64[D, classes] and biases f64[classes] with the least sum of losses + |weights|^2 / 2."""
  inputs, shape = jnp.asarray(x, jnp.float32), (x.shape[1] + 1, classes)

  @jax.jit
  @jax.value_and_grad
  def objective(flat, x):
    w, b = jnp.split(flat.reshape(shape), [shape[0] - 1])
    logits = x @ w + b
    right = jnp.take_along_axis(logits, jnp.asarray(labels)[:, None], 1)[:, 0]
    return (jax.nn.logsumexp(logits, 1) - right).sum() + 0.5 * (w**2).sum()

  def evaluated(flat):
    value, grad = objective(jnp.asarray(flat, jnp.float32), inputs)
    return float(value), np.asarray(grad, np.float64)

  start = np.zeros(shape[0] * shape[1])
  best = minimize(evaluated, start, jac=True, method='L-BFGS-B', options={'maxiter': ITERATIONS})
  w, b = np.split(best.x.reshape(shape), [shape[0] - 1])
  return w, b[0]


def unit(a: np.ndarray) -> np.ndarray:
  return a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12)


if __name__ == '__main__':
  sys.exit(main())
