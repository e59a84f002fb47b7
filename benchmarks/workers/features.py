"""A linear layer on a frozen MiniLM learns CLINC150: through the network, or from features kept before.

A turn is a whole run: data, weights, and for 'cold' the features of every sentence once.
"""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import os  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from cl_jax import loop  # noqa: E402
from cl_jax.streams import cache  # noqa: E402
from cl_jax.types import Stream, Tree  # noqa: E402
from configs import study_encoder  # noqa: E402
from experiments import build, cli, config  # noqa: E402

FOLDER = tempfile.TemporaryDirectory()


def prepare(kind: str, examples: int, test: int):
  os.environ['CL_JAX_CACHE'] = FOLDER.name
  cli.devices(1)  # programs are kept in it as well, so that no turn waits for a compiler
  raw = study_encoder.get_config('clinc150,head,naive')
  raw['data'] |= {'examples_per_class': examples, 'test_per_task': test, 'test_batch': test}
  raw['batch'] = min(raw['batch'], 15 * examples)
  resolved = config.resolve({**raw, 'cache_features': kind != 'plain'})
  first = build.prepare(resolved)[0]
  hp = build.hyper(resolved, first.streams[0])

  def whole(weights: Tree, stream: Stream):
    state, record = loop.run(first.build, hp, jax.random.key(0), stream, weights)
    return record.R, state.params['head']

  program = jax.jit(whole).lower(first.weights, first.streams[0]).compile()

  def repeat(i):
    if kind == 'cold':
      shutil.rmtree(Path(cache.directory()) / 'features')
    setup = build.prepare(resolved)[0]
    R, head = jax.device_get(program(setup.weights, setup.streams[0]))
    some = np.random.default_rng(0).normal(size=(head['w'].shape[1], 4)) / len(head['w'])
    return {'accuracy': float(R[-1].mean()), 'R': R.tolist(), 'head': (head['w'] @ some).tolist()}

  return repeat, {}


serve(lambda: prepare(**GIVEN))
