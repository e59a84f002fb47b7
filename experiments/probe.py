"""Did the features forget, or the output layer? The nearest class mean on a network that was fine-tuned.

A network may fail on old classes because its features no longer tell them apart, or because its output
layer no longer says so. Class means of its final features over ALL training sentences, old ones too, tell
which (Davari et al., CVPR 2022, "Probing representation forgetting", with a linear probe). This looks back
at the past, so it is a measurement and no method.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cl_jax import checkpoint, durable
from cl_jax.types import overlay
from experiments import build, features, run
from experiments.config import sha256
from experiments.job import blank, spread

FILE = 'probe.json'


def probe(config: Mapping[str, Any], place: Path, tell: Callable[[str], None]) -> None:
  """Writes {'ncm': accuracy over all tasks} of the final network of a run with one seed to probe.json."""
  if (place / FILE).exists():
    return
  setup = build.prepare(config, tell=tell)[0]
  job = run.job(setup, place, sha256(config))
  found = checkpoint.restore(job.folder, blank(job, spread(job), 0), job.sha256, tell)
  if found is None:
    tell(f'{place} has no checkpoint any more: its features are not measured')
    return
  model, stream = setup.model(setup.weights), setup.streams[0]
  variables = overlay(setup.weights['frozen'], found.tree.state.params)
  compute = jax.jit(lambda v, x: model.apply(v, features.batch_of(x)).features)

  def of(x: Any, what: str) -> np.ndarray:
    return features.extract(compute, variables, x, what, tell)

  rows = np.unique(stream.index)
  rows = rows[rows >= 0]
  train = of(jax.tree.map(lambda a: np.asarray(a)[rows], stream.x), 'the training data')
  test = stream.test
  real = np.asarray(test.w).reshape(-1) > 0
  flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[3:]), test.x)
  guess = nearest(train, np.asarray(stream.y)[rows], of(flat, 'the test data'))
  right = float((guess == np.asarray(test.y).reshape(-1))[real].mean())
  durable.write(place / FILE, json.dumps({'ncm': right}) + '\n')


def nearest(train: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
  """i[N]: the class whose mean has the largest cosine with each row of `test`."""
  classes = np.unique(y)
  means = np.stack([train[y == c].mean(0) for c in classes])
  unit = lambda a: a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12)  # noqa: E731
  return classes[(unit(test) @ unit(means).T).argmax(1)]
