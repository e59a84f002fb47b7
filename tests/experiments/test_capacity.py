"""A budget of bytes: as many slots as fit, whatever the method keeps besides."""

from __future__ import annotations

import itertools

import pytest

from cl_jax.errors import UserError
from experiments import build, capacity, config, results, run
from tests.experiments.conftest import lines

pytestmark = pytest.mark.usefixtures('quickly')

RAW = {
  'data': {'examples_per_class': 24, 'test_per_task': 20, 'test_batch': 20},
  'batch': 10,
  'model': {'name': 'mlp', 'sizes': (8,)},
  'scenario': 'class',
}


def added(methods, **fields):
  """(slots, bytes beyond plain fine-tuning) of what is built."""
  raw = {**RAW, 'methods': methods, **fields}
  (setup,) = build.prepare(config.resolve(raw))
  (plain,) = build.prepare(config.resolve({**RAW, 'methods': ()}))
  total = lambda s: results.costs(s)['state_bytes']['total']  # noqa: E731
  return setup.slots, total(setup) - total(plain)


def test_growth_is_what_a_learner_for_so_many_tasks_would_keep():
  """Columns of PNN, gates of HAT, encoders of EBLL, low-rank factors come with tasks; not ER's memory."""
  units, image = 8, 784

  def grown(method, **more):
    (setup,) = build.prepare(config.resolve({**RAW, 'methods': (method,), **more}))
    total = results.costs(setup)['state_bytes']['total']
    sizes = results.growth(setup)
    assert not sizes or sizes[-1] == total
    return sizes

  task = {'scenario': 'task', 'head': 'task'}
  assert grown('er') == grown('ewc') == []
  steps = [b - a for a, b in itertools.pairwise(grown('hat', **task))]
  assert steps == [4 * (units + 1)] * 4  # and smax, with which a finished task is read
  steps = [b - a for a, b in itertools.pairwise(grown('pnn', **task))]
  column, lateral = image * units + units + 2 * units + 2, 2 * units
  assert steps == [4 * (column + k * lateral) for k in (1, 2, 3, 4)]
  steps = [b - a for a, b in itertools.pairwise(grown('ebll', ebll={'code': 3}))]
  assert steps == [0] + [4 * 3 * (units + 1)] * 3  # one from the start; the last task needs none
  for method in ('olora', 'sdlora', 'inflora'):
    steps = [
      b - a
      for a, b in itertools.pairwise(grown(method, **{method: {'targets': 'l0/w', 'rank': 2}}))
    ]
    assert steps == [4 * (2 * (image + units) + (method == 'sdlora'))] * 4, method


@pytest.mark.parametrize(
  'method', [*'er agem gem derpp mir icarl gdumb rehearsal latent remind'.split()]
)
def test_what_is_added_is_just_below_the_budget(method):
  fields = {
    'agem': {'draw': 16},
    'mir': {'candidates': 20},
    'latent': {'tap': 'l0'},
    'remind': {'tap': 'l0', 'codebooks': 4, 'codes': 16},
  }.get(method, {})
  own = {method: fields} if fields else {}
  slots, size = added((method,), budget_bytes=150_000, **own)
  # A slot is an image of 784 bytes, its label, weight and task, and what the method keeps with it.
  assert 150_000 - 2_000 * 5 < size <= 150_000 and set(slots) == {method}
  more = {method: {**fields, 'capacity': slots[method] + 10}}
  assert added((method,), **more)[1] > 150_000


@pytest.mark.parametrize('method, row', [('er', 784), ('latent', 4 * 8)])
def test_fewer_bytes_a_row_are_more_slots(method, row):
  """As many as fit: 12 bytes of label, weight and task a row and, for activations, 4 of their scale."""
  own = {method: {'draw': 10, **({'tap': 'l0'} if method == 'latent' else {})}}
  scale = 0 if method == 'er' else 4
  few = {
    '': row,
    'float32': 4 * row if method == 'er' else row,
    'int8': row if method == 'er' else row // 4,
  }
  few['int4'] = row // 2 if method == 'er' else row // 8
  for codec, size in few.items():
    each = size + 12 + (scale if codec.startswith('int') else 0)
    slots, total = added((method,), budget_bytes=60_000, compress={'memory': codec}, **own)
    rest = total - each * (slots[method] + 1 + 10)
    assert 0 <= rest <= 20 and 60_000 - each < total <= 60_000, codec


def test_what_has_no_memory_to_compress_is_refused():
  with pytest.raises(
    UserError, match=r"config\.compress\.memory='int4': no method of config\.methods has"
  ):
    config.resolve({**RAW, 'methods': ('ewc',), 'compress': {'memory': 'int4'}})
  with pytest.raises(UserError, match='remind keeps no examples .* in int4'):
    own = {'remind': {'tap': 'l0', 'codebooks': 4, 'codes': 16}}
    added(('remind',), compress={'memory': 'int4'}, **own)
  with pytest.raises(UserError, match=r'config\.compress\.state must be \(\(pattern, codec\)'):
    config.resolve({**RAW, 'methods': ('ewc',), 'compress': {'state': (('.*', 'int8'),)}})


def test_methods_share_a_number_of_slots():
  slots, size = added(('er', 'derpp'), budget_bytes=400_000)
  assert slots['er'] == slots['derpp'] and 398_000 < size <= 400_000


def test_a_method_without_slots_fits_or_is_refused():
  assert added(('ewc',), budget_bytes=60_000)[0] == {}
  with pytest.raises(UserError, match=r'ewc adds 50,964 bytes .* no capacity'):
    added(('ewc',), budget_bytes=10_000)


def test_too_small_a_budget():
  with pytest.raises(UserError, match=r'too small: er adds \d+,\d{3} bytes .* with 1 slots'):
    added(('er',), budget_bytes=1000)
  # A ring needs a slot for each class.
  with pytest.raises(UserError, match='with 10 slots'):
    added(('er',), budget_bytes=16_000, er={'writer': 'ring', 'draw': 10})


@pytest.mark.parametrize('least', [1, 2, 7, 10, 64, 65])
@pytest.mark.parametrize('budget', [650, 651, 5000, 123_457])
def test_the_search(least, budget):
  def size(c):
    if c['m']['capacity'] < least:
      raise ValueError('too few')
    return 10 * c['m']['capacity']

  own = {'budget_bytes': budget, 'methods': ('m',), 'm': {'capacity': 3}}
  assert capacity.fitted(own, size)['m']['capacity'] == budget // 10
  assert capacity.fitted({**own, 'budget_bytes': None}, size) == {**own, 'budget_bytes': None}


def test_results_tell_the_slots(call, tiny, tmp_path):
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', '--config.budget_bytes=50000')
  assert call(run.main, *argv).code == 0
  for line in lines(tmp_path):
    assert line['slots'] == {'er': 56} or 50 < line['slots']['er'] < 60
    assert 49_000 < line['state_bytes']['method/er'] <= 50_000
  assert call(run.main, *argv).code == 0 and len(lines(tmp_path)) == 2
