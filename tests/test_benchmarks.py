"""What speed rests on and no clock is needed for; and that the benchmarks run.

That a step takes the same time whatever the memory's capacity is measured by `benchmarks` (G6).
"""

from __future__ import annotations

import csv
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_jax.budget import subjaxprs
from cl_jax.compose import chain, gated
from cl_jax.learner import learner
from cl_jax.loop import learn, run
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.replay.agem import agem
from cl_jax.methods.replay.er import er
from cl_jax.models.mlp import mlp
from cl_jax.types import Batch, Method, Stream

SIDE, CLASSES, SMALL, LARGE = 12, 4, 64, 4096
MEMORIES = {
  'er': lambda n: er(n, 6),
  'er_ring': lambda n: er(n, 6, 'ring', classes=CLASSES),
  'er_balanced': lambda n: er(n, 6, 'class_balanced', classes=CLASSES),
  'agem': lambda n: agem(n, 6, CLASSES),
  'gated_er': lambda n: gated(jnp.float32(1), er(n, 6)),
}


@cache
def stream(tasks: int) -> Stream:
  """Shapes of a stream of small images; nothing is learnt here."""
  rng = np.random.default_rng(0)
  rows, steps, batch = 40, 5, 8
  test = Batch(
    rng.integers(0, 256, (tasks, 1, rows, SIDE, SIDE, 1), np.uint8),
    np.zeros((tasks, 1, rows), np.int32),
    np.ones((tasks, 1, rows), np.float32),
    np.zeros((tasks, 1, rows), np.int32),
  )
  return Stream(
    x=rng.integers(0, 256, (rows, SIDE, SIDE, 1), np.uint8),
    y=rng.integers(0, CLASSES, rows).astype(np.int32),
    index=rng.integers(0, rows, (tasks, steps, batch)).astype(np.int32),
    ends=np.tile(np.arange(rows, dtype=np.int32), (tasks, 1, 1)),
    test=test,
    scenario='task',
    told=('boundary', 'task_train', 'task_test'),
    classes=CLASSES,
    task_names=tuple(map(str, range(tasks))),
    task_classes=(tuple(range(CLASSES)),) * tasks,
  )


def built(method: Method):
  return lambda hp, weights: learner(mlp((16,), CLASSES), optax.sgd(hp), method)


@cache
def scanned(name: str, capacity: int):
  """The compiled steps of one leg, whose state is given away to be updated."""
  build = built(MEMORIES[name](capacity))
  given = stream(2)
  first = Batch(given.x[:8], given.y[:8], jnp.ones(8), jnp.zeros(8, jnp.int32))
  state = jax.eval_shape(lambda k: build(0.1, None).init(k, first), jax.random.key(0))
  steps = lambda state, stream: learn(build(0.1, None), state, stream, 0, 0)[:2]  # noqa: E731
  return jax.jit(steps, donate_argnums=0).lower(state, given).compile()


@pytest.mark.parametrize('name', MEMORIES)
def test_a_step_copies_no_memory(name):
  """In the optimised program nothing but a scatter makes an array of the memory's size."""
  rows = rf'\[{LARGE + 1},{SIDE},{SIDE},1\]|\[{LARGE + 1},{SIDE * SIDE}\]'
  makes = re.compile(rf'^\s*(?:ROOT )?%?(\S+) = \w+(?:{rows})\S* ([\w-]+)\(')
  made = []
  for computation in re.split(r'\n(?=%|ENTRY)', scanned(name, LARGE).as_text()):
    if 'ENTRY' in computation[:20]:
      continue  # before and after the loop
    made += [m.groups() for line in computation.split('\n') if (m := makes.match(line))]
  views = ('parameter', 'get-tuple-element', 'bitcast', 'scatter')
  assert any('scatter' in part for pair in made for part in pair), 'the memory is not to be seen'
  others = [p for p in made if p[1] not in views and 'scatter' not in p[0]]
  assert not others, others


@pytest.mark.parametrize('name', MEMORIES)
def test_temporaries_do_not_grow_with_the_memory(name):
  small, large = (scanned(name, n).memory_analysis().temp_size_in_bytes for n in (SMALL, LARGE))
  integers = 16 * (LARGE - SMALL) if name == 'er_balanced' else 0  # it scans the stored labels
  assert large <= small + integers + 1024, (small, large)


def equations(jaxpr) -> int:
  return sum(1 + sum(map(equations, subjaxprs(eqn))) for eqn in jaxpr.eqns)


def test_a_run_compiles_to_the_same_program_for_any_number_of_tasks():
  build = built(chain(er=er(SMALL, 6), ewc=ewc(1.0, 'empirical')))
  sizes = []
  for tasks in (3, 12):
    whole = lambda key, stream: run(build, 0.1, key, stream)  # noqa: E731
    traced = jax.jit(whole).trace(jax.random.key(0), stream(tasks))
    text = traced.lower().compile().as_text()
    sizes.append((equations(traced.jaxpr.jaxpr), text.count(' = ')))
  assert sizes[0][0] == sizes[1][0]
  assert abs(sizes[0][1] - sizes[1][1]) <= 0.02 * sizes[0][1], sizes


@pytest.mark.long
def test_quick_benchmarks_run_and_write_their_rows(tmp_path, capsys):
  from benchmarks.run import COLUMNS, main

  out = tmp_path / 'bench.csv'
  arguments = ['--quick', '--runs=1', '--offline', f'--out={out}']
  assert main([*arguments, '--only=G6,G13']) == 0
  assert main([*arguments, '--only=G13']) == 0  # replaces its row
  with out.open() as file:
    rows = list(csv.DictReader(file))
  assert tuple(rows[0]) == COLUMNS
  assert [r['work'].split()[0] for r in rows] == ['G6', 'G13']
  assert all(float(r['ratio_median']) > 0 and float(r['ours']) > 0 for r in rows)
  assert 'DIFFER' not in capsys.readouterr().out


def test_an_unknown_goal_is_the_users_mistake(capsys):
  from benchmarks.run import main

  assert main(['--only=G99']) == 2
  assert 'G99' in capsys.readouterr().err
