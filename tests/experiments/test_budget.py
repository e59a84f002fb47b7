"""Costs before training, and limits that bind: counted by hand, refused by one, the advice taken."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import pytest

from cl_jax import budget
from cl_jax.errors import UserError
from experiments import budget as command
from experiments import build, config, results, run, sweep, workdir
from tests.experiments.conftest import lines
from tests.experiments.test_build import saved_vit

RAW = {
  'data': {'examples_per_class': 24, 'test_per_task': 20, 'test_batch': 20},
  'batch': 10,
  'model': {'name': 'mlp', 'sizes': (8,)},
  'methods': ('er',),
  'er': {'capacity': 50, 'draw': 6},
}
LIMITS = ('state_bytes', 'peak_bytes', 'macs_per_step')


def prepared(raw=None, **limits) -> build.Setup:
  return build.prepare(config.resolve({**(raw or RAW), 'budget': limits}))[0]


@pytest.fixture(scope='module')
def measured() -> dict:
  return command.figures(config.resolve(RAW), ['45nm-cache', 'cortex-m7'])


# --- counts -----------------------------------------------------------------------------------------


def test_multiply_adds_of_an_mlp_by_hand(measured):
  """784-8-10 on 10 rows and 6 rehearsed ones; the gradient of the first layer's input is not taken."""
  one, two = 784 * 8, 8 * 10
  rows = 10 + 6
  forward, backward = rows * (one + two), rows * (one + 2 * two)
  assert measured['step']['macs'] == {
    'forward': forward,
    'backward': backward,
    'other': 0,
    'total': forward + backward,
  }
  assert measured['predict']['macs']['total'] == 10 * (one + two)
  assert measured['flops_per_step'] == 2 * measured['macs_per_step']


def test_bytes_moved_by_hand():
  n = 4 * 6  # bytes of f32[6]
  x = jnp.ones(6)

  def moved(f, *args):
    found = budget.traffic(f, *args)
    assert found.unbounded == ()
    return found.read, found.written

  assert moved(lambda x: jnp.sin(x) + 2.0, x) == (2 * n, 2 * n)
  loop = lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, None, length=7)[0]  # noqa: E731
  assert moved(loop, x) == (7 * n, 7 * n)
  nested = lambda x: jax.lax.scan(lambda c, _: (loop(c), None), x, None, length=3)[0]  # noqa: E731
  assert moved(jax.jit(nested), x) == (21 * n, 21 * n)
  dearest = lambda p, x: jax.lax.cond(p, jnp.sin, lambda x: jnp.sin(jnp.sin(x)), x)  # noqa: E731
  read, written = moved(dearest, True, x)
  assert written - 4 == 2 * n and read - written + 4 == 1  # the flag becomes a number
  # How numbers are added up is a program inside the equation, which moves nothing itself.
  where = jax.lax.ScatterDimensionNumbers((), (0,), (0,))
  add = lambda x, rows, new: jax.lax.scatter_add(x, rows, new, where, mode='promise_in_bounds')  # noqa: E731
  assert moved(add, x, jnp.zeros((2, 1), jnp.int32), x[:2]) == (n + 8 + 8, n)


def test_a_loop_of_unknown_length_is_flagged_with_its_line():
  halve = lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x)  # noqa: E731
  inside = jax.jit(lambda x: jax.lax.map(halve, x))
  x = jnp.ones((5, 3, 3))
  (line,) = budget.traffic(inside, x).unbounded
  assert 'test_budget.py' in line and re.search(r':\d+', line)
  assert budget.macs(inside, x)['total'] == 5 * 27  # the body counts once, as often as the map runs
  # Of a linear solve the solution runs, which has no product, and not what its derivatives are made of.
  assert budget.macs(jax.numpy.linalg.solve, jnp.ones((5, 5)), jnp.ones((5, 2)))['total'] == 0
  known = lambda x: jax.lax.fori_loop(0, 4, lambda _, x: x @ x, x)  # noqa: E731
  assert budget.traffic(known, x[0]).unbounded == ()
  assert budget.macs(known, x[0])['total'] == 4 * 27


def test_a_flagged_loop_is_told(measured):
  shown = {**measured, 'step': {**measured['step'], 'unbounded_loops': ['slda.py:58 (fit)']}}
  assert 'UNBOUNDED' not in command.table(measured)
  assert re.search(r'UNBOUNDED: step .*slda\.py:58', command.table(shown))


def test_peak_of_a_program_that_overwrites_its_state():
  x = jnp.ones(1000)
  given, kept = (budget.compiled(lambda x: x + 1, x, donate=d) for d in ((0,), ()))
  assert given.arguments == given.results == given.shared == 4000 and kept.shared == 0
  assert given.peak == 4000 + given.temporary and kept.peak == 8000 + kept.temporary


# --- the command ------------------------------------------------------------------------------------


def test_figures_are_those_of_results(measured):
  setup = prepared()
  costs = results.costs(setup)
  assert measured['state_bytes_by_role'] == costs['state_bytes']
  assert measured['state_bytes'] == costs['state_bytes']['total']
  assert measured['passes'] == costs['passes']
  assert measured['flops_per_step'] == costs['flops_per_step']
  assert measured['state_bytes_by_task'] == [costs['state_bytes']] * 5
  state = build.programs(setup).state
  every = budget.leaves(state, setup.frozen)
  assert sum(leaf.bytes for leaf in every) == measured['state_bytes']
  assert measured['largest'][0]['name'] == 'method/er/rows/x' and len(measured['largest']) == 10
  text = command.table(measured)
  for role, n in costs['state_bytes'].items():
    assert not n or re.search(rf'^  {role} +{n:,} ', text, re.MULTILINE), role


def test_growth_and_energy(measured):
  hat = {**RAW, 'scenario': 'task', 'head': 'task', 'methods': ('hat',)}
  setup = prepared({k: v for k, v in hat.items() if k != 'er'})
  sizes = [results.bytes_after(setup, t + 1)['total'] for t in range(5)]
  assert sizes == results.growth(setup) and len(set(sizes)) == 5
  work = measured['step']
  moved = work['bytes_read'] + work['bytes_written']
  picojoules = work['macs']['total'] * (0.9 + 3.7) + moved * 10 / 8
  assert work['energy_estimate']['45nm-cache']['uj'] == pytest.approx(1e-6 * picojoules)
  assert work['energy_estimate']['cortex-m7'] == dict.fromkeys(('uj', 'low', 'high'))
  assert 'AN ESTIMATE' in command.table(measured)


def test_command_prints_json_and_draws_and_trains_nothing(call, tiny, tmp_path):
  picture = tmp_path / 'growth.png'
  done = call(
    command.main,
    f'--config={tiny}:task,hat',
    '--config.head=task',
    '--config.budget.state_bytes=1000',
    '--profile=cortex-m4',
    '--json',
    f'--plot={picture}',
  )
  about = json.loads(done.out)
  assert done.code == 0 and about['exceeded'] == ['state_bytes']
  assert list(about['step']['energy_estimate']) == ['cortex-m4']
  assert about['state_bytes'] == about['state_bytes_by_task'][-1]['total'] > 1000
  assert picture.read_bytes().startswith(b'\x89PNG') and list(tmp_path.iterdir()) == [picture]
  assert re.search(r'config\.budget\.state_bytes=1,000: EXCEEDED by [\d,]+', command.table(about))


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ((), '--config is missing'),
    (('--config={}', '--profile=m7'), "no profile 'm7': there are 45nm-cache"),
    (('--config={}', '--config.sweep={{"batch": (1, 2)}}'), 'config.sweep holds a grid'),
    (('--config={}', '--config.budget.state_bytes=0'), 'must be at least 1'),
    (('--config={}', '--config.budget.bytes=1'), r'no field config\.budget\.bytes'),
    (('--config={}', 'x'), "'x' is not understood"),
  ],
)
def test_mistakes(call, tiny, argv, message):
  done = call(command.main, *(word.format(tiny) for word in argv))
  assert done.code == 2 and re.search(message, done.line) and done.out == ''


# --- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', LIMITS)
def test_one_too_small_is_refused_and_the_advice_fits(name, measured):
  exact = measured[name]
  prepared(**{name: exact})
  with pytest.raises(UserError) as caught:
    prepared(**{name: exact - 1})
  line = str(caught.value)
  assert line.startswith(f'config.budget.{name}={exact - 1:,}: ') and '\n' not in line
  assert f'{exact:,}' in line and ', 1 too many' in line
  parts = re.search(r'\(largest: (.*)\)', line)
  assert parts is not None
  figures = [int(n.replace(',', '')) for n in re.findall(r'(?<= )\d[\d,]*(?=, |$)', parts[1])]
  assert len(figures) == (2 if name == 'macs_per_step' else 3)
  assert figures == sorted(figures, reverse=True)
  field, value = re.search(r'config\.([\w.]+)=(\d+) would fit', line).groups()  # pyright: ignore
  assert (field, int(value)) == {
    'state_bytes': ('er.capacity', 49),
    'peak_bytes': ('batch', 5),
    'macs_per_step': ('batch', 9),
  }[name]
  prepared(config.override(RAW, field, int(value)), **{name: exact - 1})


def test_what_would_fit_is_a_multiple_of_the_micro_batches():
  raw = {**RAW, 'micro_batches': 2}
  macs = build.programs(prepared(raw)).macs()['total']
  with pytest.raises(UserError, match=r'config\.batch=(\d+) would fit') as caught:
    prepared(raw, macs_per_step=macs - 1)
  n = int(re.search(r'batch=(\d+)', str(caught.value))[1])  # pyright: ignore
  assert n == 8
  prepared({**raw, 'batch': n}, macs_per_step=macs - 1)


def test_what_would_fit_below_all_batches_and_slots():
  """A memory that is larger than what a smaller batch saves; a network that is too large by itself."""
  raw = {**RAW, 'er': {'capacity': 500, 'draw': 6}}
  made = build.programs(prepared(raw))
  limit = made.peak().peak - budget.tree_bytes(made.state.method) // 2
  with pytest.raises(UserError, match=r'config\.er\.capacity=\d+ would fit') as caught:
    prepared(raw, peak_bytes=limit)
  n = int(re.search(r'capacity=(\d+)', str(caught.value))[1])  # pyright: ignore
  assert 240 < n < 260
  for name in LIMITS[::2]:
    with pytest.raises(UserError, match=r'take a smaller config\.model$'):
      prepared(**{name: 100})


def test_slots_that_a_budget_of_bytes_gives_become_fewer_by_that_budget():
  """A capacity beside it would change nothing."""
  raw = {**RAW, 'budget_bytes': 60_000}
  total = results.costs(prepared(raw))['state_bytes']['total']
  with pytest.raises(UserError, match=r'; config\.budget_bytes=\d+ would fit$') as caught:
    prepared(raw, state_bytes=total - 20_000)
  n = int(re.search(r'config\.budget_bytes=(\d+)', str(caught.value))[1])  # pyright: ignore
  assert 39_000 < n <= 40_000
  setup = prepared({**raw, 'budget_bytes': n}, state_bytes=total - 20_000)
  more = {**RAW, 'er': {'capacity': setup.slots['er'] + 1, 'draw': 6}}
  with pytest.raises(UserError, match=f'config.er.capacity={setup.slots["er"]} would fit'):
    prepared(more, state_bytes=total - 20_000)


def test_frozen_weights_count_and_may_be_rounded(tmp_path):
  saved_vit(tmp_path)
  raw = {
    **{k: v for k, v in RAW.items() if k not in ('methods', 'er')},
    'model': {'name': 'vit', 'pretrained': str(tmp_path), 'image': 28},
    'freeze': ('backbone/.*',),
  }
  sizes = results.costs(prepared(raw))['state_bytes']
  assert sizes['frozen'] > sizes['total'] / 2
  message = r'frozen weights included.*largest: frozen [\d,]+.*; config\.frozen_bits=16 would fit'
  with pytest.raises(UserError, match=message):
    prepared(raw, state_bytes=sizes['total'] - 1)
  held = results.costs(prepared({**raw, 'frozen_bits': 16}))['state_bytes']['total']
  prepared({**raw, 'frozen_bits': 16}, state_bytes=held)
  with pytest.raises(UserError, match=r'config\.frozen_bits=8 would fit'):
    prepared(raw, state_bytes=held - 1)
  parts = {'freeze': (), 'update': {'parts': (('backbone/.*', 'none'), ('.*', 'all'))}}
  with pytest.raises(UserError, match=message):
    prepared({**raw, **parts}, state_bytes=sizes['total'] - 1)


def test_run_refuses_before_it_trains_and_runs_at_an_exact_fit(call, tiny, tmp_path):
  words = (f'--config={tiny}:class,er', '--config.seeds=0')
  about = json.loads(call(command.main, *words, '--json').out)
  for name in LIMITS[::2]:  # the third compiles, and is refused in the same place: see above
    done = call(
      run.main, *words, f'--config.budget.{name}={about[name] - 1}', f'--workdir={tmp_path}'
    )
    assert done.code == 2 and f'config.budget.{name}=' in done.line
    assert not (tmp_path / 'checkpoints').exists() and not (tmp_path / 'results.jsonl').exists()
  exact = [f'--config.budget.{name}={about[name]}' for name in LIMITS]
  assert call(run.main, *words, *exact, f'--workdir={tmp_path}').code == 0
  (line,) = lines(tmp_path)
  assert line['state_bytes']['total'] == about['state_bytes']
  assert line['flops_per_step'] == 2 * about['macs_per_step']


def test_sweep_trains_no_group_where_another_is_refused(call, tiny, tmp_path):
  small = results.costs(build.prepare(config.resolve(config.load(f'{tiny}:class')))[0])
  done = call(
    sweep.main,
    f'--config={tiny}:class',
    f'--config.budget.state_bytes={small["state_bytes"]["total"]}',
    "--config.sweep={'methods': ((), ('er',))}",
    f'--workdir={tmp_path}',
  )
  assert done.code == 2 and 'largest: method/er' in done.line
  assert not (tmp_path / 'results.jsonl').exists()


def test_fields_that_came_later_leave_hashes_and_working_directories_as_they_were(tmp_path):
  new = config.resolve(RAW)
  old = {k: v for k, v in new.items() if k not in ('budget', 'compress')}
  assert config.sha256(new) == config.sha256(old)
  limited = config.resolve({**RAW, 'budget': {'peak_bytes': 10**9}})
  packed = config.resolve(
    {**RAW, 'optimizer': {'momentum': 0.9}, 'compress': {'optimizer': 'bfloat16'}}
  )
  assert len({config.sha256(c) for c in (old, limited, packed)}) == 3
  build.prepare(old)  # as `verify` does with the configuration of an earlier artefact
  workdir.remember(tmp_path, old)
  (tmp_path / 'checkpoints').mkdir()
  workdir.remember(tmp_path, new)
  with pytest.raises(UserError, match='another configuration'):
    workdir.remember(tmp_path, limited)
