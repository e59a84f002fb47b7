"""`python -m experiments.reproduce`: rows resume, the table is drawn from the stored lines alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from cl_jax.learner import learner
from cl_jax.models.mlp import mlp
from experiments import reproduce, workdir
from experiments.published import permuted_mnist, split_fashion, split_mnist, tiny_memories
from experiments.published.table import Figure, Row, seen_once

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows(toy_stream, monkeypatch):
  build = lambda hp, w: learner(mlp((8,), 6), optax.sgd(0.05))  # noqa: E731
  made = []

  def stream(seed, data_dir):
    made.append(seed)
    return toy_stream

  def row(method, slow=False):
    figures = (Figure('acc', 50.0, 1.0), Figure('forgetting', None, None, 1.0))
    return Row('toy', 'toys', 'task', method, 'small', stream, build, figures, 'a note', slow)

  found = [row('naive'), row('again'), row('heavy', slow=True)]
  monkeypatch.setattr(reproduce, 'all_rows', lambda: found)
  return made


def table(out):
  with (out / 'published.csv').open(newline='') as f:
    return list(csv.DictReader(f))


def test_rows_resume_and_the_table_shows_what_is_missing(rows, tmp_path, capsys):
  assert reproduce.main(['--only=naive', '--seeds=2', f'--out={tmp_path}']) == 0
  assert rows == [0, 1]
  lines = [json.loads(x) for x in (tmp_path / 'published/toy.jsonl').read_text().splitlines()]
  assert [x['seed'] for x in lines] == [0, 1] and np.shape(lines[0]['R']) == (3, 3)
  acc = [100 * np.mean(x['R'][-1]) for x in lines]
  naive, forgetting, again, *_ = table(tmp_path)
  assert list(naive) == list(reproduce.COLUMNS)
  assert naive['ours'] == f'{np.mean(acc):.1f}' and naive['published'] == '50.0'
  assert naive['seeds'] == '2' and float(naive['ours_ci95']) >= 0
  assert forgetting['published'] == '' and float(forgetting['ours']) > 0
  assert again['ours'] == '' and again['note'] == 'a note; not run'

  del rows[:]
  assert reproduce.main(['--only=naive', '--seeds=3', f'--out={tmp_path}']) == 0
  assert rows == [2]  # the other seeds are there already
  assert table(tmp_path)[0]['seeds'] == '3'

  with (tmp_path / 'published/toy.jsonl').open('a') as f:
    f.write('{"row": "toy/task/naive')  # a process that was killed while it wrote
  del rows[:]
  assert reproduce.main(['--only=naive', '--seeds=3', f'--out={tmp_path}']) == 0
  assert rows == [] and 'incomplete line' in capsys.readouterr().err
  assert reproduce.main(['--only=naive', '--seeds=4', f'--out={tmp_path}']) == 0
  assert rows == [3] and table(tmp_path)[0]['seeds'] == '4', 'nothing is glued to that line'
  assert table(tmp_path)[0]['command'].endswith('--seeds=4 --only=toy/task/naive/small')
  path = tmp_path / 'published/toy.jsonl'
  path.write_text(2 * path.read_text())  # as two processes would have left it
  assert reproduce.main(['--only=naive', '--seeds=4', f'--out={tmp_path}']) == 0
  assert table(tmp_path)[0]['seeds'] == '4'


def test_heavy_rows_are_left_out_unless_named(rows, tmp_path, capsys):
  assert reproduce.main(['--only=toy*', '--seeds=1', f'--out={tmp_path}']) == 0
  assert 'it takes hours' in capsys.readouterr().out
  assert [r['seeds'] for r in table(tmp_path)] == ['1', '1', '1', '1', '0', '0']
  (tmp_path / 'published/toy.jsonl').write_text(
    '{"row": "toy/task/again/small", "seed": 0, "wall_s_of_all_seeds": 12.0, "seeds_together": 2}\n'
  )
  assert reproduce.main(['--list', '--seeds=3', f'--out={tmp_path}']) == 0
  out = capsys.readouterr().out
  assert 'toy/task/heavy/small: 0 seeds done, slow' in out
  assert 'toy/task/again/small: 1 seeds done, about 12 s to go' in out


def test_a_heavy_row_is_kept_after_every_few_seeds(rows, tmp_path, monkeypatch, capsys):
  most, learnt = len(jax.devices()), []

  def learn(row, seeds, data_dir):
    if len(learnt) == 2:
      raise KeyboardInterrupt
    learnt.append(seeds)
    return [{'row': row.name, 'seed': s, 'R': [[1.0, 0.0]] * 2, 'start': [0.0] * 2} for s in seeds]

  monkeypatch.setattr(reproduce, 'learn', learn)
  argv = ['--only=toy/task/heavy/small', f'--seeds={3 * most}', f'--out={tmp_path}']
  assert reproduce.main(argv) == 130
  assert learnt == [list(range(most)), list(range(most, 2 * most))]
  assert len((tmp_path / 'published/toy.jsonl').read_text().splitlines()) == 2 * most
  learnt.clear()
  assert reproduce.main(argv) == 0 and learnt == [list(range(2 * most, 3 * most))]


def test_a_pattern_without_a_row(rows, tmp_path, capsys):
  assert reproduce.main(['--only=nothing', f'--out={tmp_path}']) == 2
  assert 'matches no row' in capsys.readouterr().err


def test_what_cannot_be_written_and_who_is_there_already(rows, tmp_path, capsys):
  (tmp_path / 'file').touch()
  for words, said in (
    ((f'--out={tmp_path}/file',), 'cannot be written'),
    (('--seeds=0',), 'at least 1'),
  ):
    assert reproduce.main(['--only=naive', f'--out={tmp_path}', *words]) == 2
    assert said in capsys.readouterr().err
  with workdir.claimed(tmp_path / 'published'):
    assert reproduce.main(['--only=naive', f'--out={tmp_path}']) == 2
  assert 'another process is at work' in capsys.readouterr().err and not rows


def test_a_loss_that_is_not_finite_stops_its_row_alone(rows, tmp_path, monkeypatch, capsys):
  build = lambda hp, w: learner(mlp((8,), 6), optax.sgd(1e30))  # noqa: E731
  first, *others = reproduce.all_rows()
  found = [first._replace(build=build), others[0]]
  monkeypatch.setattr(reproduce, 'all_rows', lambda: found)
  assert reproduce.main(['--seeds=1', f'--out={tmp_path}']) == 3
  assert 'not finite' in capsys.readouterr().err
  lines = (tmp_path / 'published/toy.jsonl').read_text().splitlines()
  assert [json.loads(line)['row'] for line in lines] == [others[0].name]


def test_protocols_on_real_mnist(data_dir):
  """What the tables rest on: sizes, tasks, labels, 1,000 distinct examples, one device program traces."""
  stream = split_mnist.stream_of('domain')(1, data_dir)
  assert stream.index.shape == (5, 2000, 128) and stream.classes == 2 and stream.tasks == 5
  pairs = [split_mnist.stream_of('class')(s, data_dir).task_names for s in (1, 2)]
  assert pairs[0] != pairs[1]  # another order of the digits for every seed
  tiny = tiny_memories.stream(0, data_dir)
  tiny_memories.check(tiny)
  assert tiny.index.shape == (17, 100, 10) and tiny.test.y.size == 170_000
  assert np.array_equal(np.sort(tiny.ends.reshape(17, -1)), np.sort(tiny.index.reshape(17, -1)))
  assert len(np.unique(tiny.index)) > 10_000  # tasks draw their own examples
  for row in (*split_mnist.rows()[:6], *tiny_memories.rows()[:5]):
    one = row.stream(0, data_dir)
    jax.eval_shape(lambda k, s, b=row.build: reproduce.run(b, None, k, s), jax.random.key(0), one)


def test_rows_of_a_protocol_have_different_names():
  names = [r.name for r in reproduce.all_rows()]
  assert len(set(names)) == len(names) > 40


@pytest.mark.parametrize(
  ('name', 'needs'),
  [
    ('task/naive', {'task_test', 'task_train'}),
    ('domain/agem', {'boundary'}),  # a ring by class and task, counted
    ('class/er', set()),
  ],
)
def test_rows_of_configurations_say_what_their_learner_needs(name, needs):
  (row,) = (r for r in split_fashion.rows() if r.name == f'split_fashion/{name}/own')
  assert set(row.needs) == set(row.build(None, None).needs) == needs


def test_rows_of_protocols_say_what_they_need():
  found = {row.name: set(row.needs) for row in tiny_memories.rows()}
  assert found['tiny_memories/domain/reservoir/1_per_class'] == set()
  assert found['tiny_memories/domain/ring/1_per_class'] == {'task_train'}


def test_every_line_that_is_kept_belongs_to_one_row():
  rows, lines = reproduce.all_rows(), []
  for path in (ROOT / 'results/published').glob('*.jsonl'):
    lines += reproduce.read(path)
  assert sorted(line['row'] for row in rows for line in row.own(lines)) == sorted(
    line['row'] for line in lines
  )


def test_permuted_mnist_is_the_full_protocol(data_dir):
  stream = permuted_mnist.stream_of('class')(1, data_dir)
  assert stream.index.shape == (10, 5000, 256) and stream.test.x.shape[3:] == (32, 32, 1)
  assert stream.classes == 100 and stream.task_classes == permuted_mnist.HEADS
  (row,) = (r for r in permuted_mnist.rows() if (r.scenario, r.method) == ('class', 'lwf'))
  assert row.slow
  jax.eval_shape(lambda k, s: reproduce.run(row.build, None, k, s), jax.random.key(0), stream)


def test_ends_are_what_was_seen(toy_stream):
  ends = seen_once(toy_stream).ends
  assert np.array_equal(ends.reshape(3, -1), np.asarray(toy_stream.index).reshape(3, -1))
