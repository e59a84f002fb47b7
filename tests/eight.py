"""What tests/test_shard.py asks of 8 virtual devices, in a process of its own: prints one JSON object.

`python -m tests.eight PART`; the number of devices of a process is fixed once jax has begun.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import Counter

import jax

jax.config.update('jax_num_cpu_devices', 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from cl_jax import footprint, shard, sweep  # noqa: E402
from cl_jax.compose import chain, gated  # noqa: E402
from cl_jax.learner import learner  # noqa: E402
from cl_jax.methods.regularisation.lwf import lwf  # noqa: E402
from cl_jax.methods.replay.er import er  # noqa: E402
from cl_jax.models import causal, vit  # noqa: E402
from cl_jax.models.decoder import decoder  # noqa: E402
from cl_jax.models.mlp import mlp  # noqa: E402
from cl_jax.sweep import MAPPED, SHARED  # noqa: E402
from cl_jax.types import Batch, Method  # noqa: E402
from tests.conftest import made_toy_stream  # noqa: E402

COLLECTIVES = re.compile(r' (all-gather|all-reduce|reduce-scatter|all-to-all|collective-\w+)\(')
LLAMA = causal.Config(64, 32, 2, 4, 2, 48, 16, tied=False)
VIT = vit.Config(8, 4, 1, 32, 2, 4, 64)


def collectives(text: str) -> dict[str, int]:
  """How often each occurs in a compiled program."""
  return dict(Counter(COLLECTIVES.findall(re.sub(r'-(start|done)\(', '(', text))))


def batch_of(x, n: int) -> Batch:
  y = np.arange(n, dtype=np.int32) % 4
  return Batch(x, jnp.asarray(y), jnp.ones(n), jnp.full(n, -1, jnp.int32))


def texts(n: int, length: int = 12) -> Batch:
  tokens = np.random.default_rng(0).integers(0, LLAMA.vocabulary, (n, length)).astype(np.int32)
  seen = np.ones((n, length), bool)
  return batch_of({'tokens': tokens, 'mask': seen, 'learn': seen}, n)


def pictures(n: int) -> Batch:
  return batch_of(np.random.default_rng(1).normal(size=(n, 8, 8, 1)).astype(np.float32), n)


def steps() -> dict:
  """Three steps on eight devices against one: the largest differences, and where things lie."""
  # Adam would blow up the rounding of gradients that are next to nothing: it divides by their size.
  tx, found = optax.sgd(0.1, momentum=0.9), {}
  models = {
    'llama': (decoder(LLAMA, 0, output='tokens', remat=True), texts(16), Method(), ('fsdp',)),
    'vit': (vit.vit(VIT, 4, remat=True), pictures(16), er(32, 8), ('fsdp', 'data')),
  }
  for name, (model, batch, method, modes) in models.items():
    one = learner(model, tx, method)
    begun = jax.jit(one.init)(jax.random.key(0), batch)
    alone, expected, _ = three(one, begun, batch)
    for mode in modes:
      cut = shard.over(None, mode, small=64)
      many = shard.placed(learner(shard.sharded(model, cut), tx, method), cut)
      state, losses, text = three(many, shard.put(cut, begun), shard.put(cut, batch, cut.whole))
      floats = [jax.tree.leaves((s.params, s.opt)) for s in (alone, state)]
      leaves = jax.tree.leaves(state.params)
      report = [jax.jit(m.measure or m.predict)(s, batch) for m, s in ((one, alone), (many, state))]
      found[f'{name} {mode}'] = {
        'parameters': max(map(distance, *floats)),
        'losses': distance(expected, losses),
        'report': distance(*report),
        'moved': losses[0] - losses[-1],
        'share': sum(a.addressable_data(0).nbytes for a in leaves) / sum(a.nbytes for a in leaves),
        'loops': collectives(bodies(text)),
      }
  return found


def three(made, state, batch):
  """The state after three steps, their losses, the compiled program."""
  step = jax.jit(made.step).lower(state, batch).compile()
  losses = []
  for _ in range(3):
    state, loss = step(state, batch)
    losses.append(float(loss))
  return state, losses, step.as_text() or ''


def distance(a, b) -> float:
  return float(np.abs(np.asarray(a, np.float64) - np.asarray(b)).max())


def bodies(text: str) -> str:
  """Of a compiled program, the lines that belong to a loop over layers."""
  return '\n'.join(line for line in text.splitlines() if '/while/body/' in line)


def ablation() -> dict:
  """{ER, LwF} on and off, two seeds: 8 runs on 8 devices against the same on one."""
  stream = made_toy_stream()
  cells = [c for c in sweep.factorial(('er', 'lwf')) for _ in range(2)]
  keys = jnp.stack([jax.random.key(i % 2) for i in range(8)])

  def one(cell, key, stream):
    def build(cell, weights):
      method = chain(er=gated(cell['er'], er(40, 5)), lwf=gated(cell['lwf'], lwf(0.5)))
      return learner(mlp((8,), 6), optax.sgd(0.05), method)

    return sweep.run(build, cell, key, stream)

  cell = {name: jnp.array([c[name] for c in cells]) for name in cells[0]}
  results, text = [], ''
  for n in (1, 8):
    f = sweep.map_runs(one, (MAPPED, MAPPED, SHARED), 8, 1, jax.devices()[:n])
    program = jax.jit(f).lower(cell, keys, stream).compile()
    text = program.as_text() or ''
    state, record = program(cell, keys, stream)
    results.append([np.asarray(a) for a in jax.tree.leaves((state.params, record.R))])
  same = all(np.array_equal(a, b) for a, b in zip(*results, strict=True))
  return {'same': same, 'collectives': collectives(text), 'spread': 'num_partitions=8' in text}


def memory() -> list:
  """The formula against XLA, of two steps with different largest stages."""
  small = causal.Config(256, 128, 4, 4, 2, 384, 512, tied=False)
  asked = [
    footprint.Step(small, 2, 128),
    footprint.Step(small._replace(vocabulary=4096), 1, 16),
  ]
  found = []
  for step in asked:
    need = footprint.footprint(step, 8)
    peak = footprint.measured(step)
    found.append({'stage': need.largest, 'plan': need.total, 'xla': peak.peak,
                  'kept': need.parameters + need.optimiser, 'arguments': peak.arguments})  # fmt: skip
  return found


if __name__ == '__main__':
  warnings.simplefilter('error')
  print(json.dumps({part: globals()[part]() for part in sys.argv[1:]}))
