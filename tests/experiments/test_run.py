"""One experiment: its results, its resumption, and what stops it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cl_jax.errors import UserError
from cl_jax.loop import Progress, Record
from experiments import build, cli, config, engine, job, results, run, show
from experiments import workdir as workdirs
from tests.experiments.conftest import final_state, lines

# contract.md, "Files": the fields of a line of results.jsonl.
CONTRACT = (
  'config config_sha256 method needs scenario dataset model seed tasks R acc forgetting bwt fwt '
  'learning_acc aaa min_acc state_bytes flops_per_step passes steps wall_s compile_s peak_rss_bytes '
  'state_sha256 commit versions device started command'
)


@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory) -> Path:
  """The working directory of an uninterrupted run."""
  place = tmp_path_factory.mktemp('runs') / 'whole'
  assert run.main([f'--config={tiny}:class,er', f'--workdir={place}']) == 0
  return place


def states(place: Path) -> list[tuple]:
  """What must be the same however often a run was stopped."""
  keys = ('seed', 'R', 'acc', 'forgetting', 'min_acc', 'state_sha256', 'config_sha256')
  return [tuple(str(line[k]) for k in keys) for line in lines(place)]


def test_a_line_per_seed_with_the_fields_of_the_contract(whole):
  found = lines(whole)
  assert [line['seed'] for line in found] == [0, 1]
  for line in found:
    assert set(line) == set(CONTRACT.split())
    R = np.array(line['R'], float)
    assert R.shape == (5, 5) and (R >= 0).all() and (R <= 1).all()
    assert line['acc'] == pytest.approx(R[-1].mean(), abs=1e-6)
    assert line['method'] == 'er' and line['needs'] == [] and line['tasks'] == 5
    assert line['state_bytes']['total'] == sum(
      v for k, v in line['state_bytes'].items() if k != 'total'
    )
    assert line['state_bytes']['method/er'] > 30 * 784
    assert line['passes'] == {'train_forward': 1.5, 'train_backward': 1.5, 'predict_forward': 1.0}
    assert line['flops_per_step'] > 0 and line['steps'] == 40
    assert (
      line['config']['er']['coef'] == 1.0 and line['config_sha256'] == found[0]['config_sha256']
    )
    assert re.fullmatch(r'[0-9a-f]{64}', line['state_sha256'])
    assert re.fullmatch(r'([0-9a-f]{40}(-dirty)?)|(cl_jax .*)', line['commit'])
    assert line['command'].startswith('python -m experiments.run --config=')
    assert line['compile_s'] <= line['wall_s'] and line['peak_rss_bytes'] > 1e7
    assert line['versions']['jax'] and 'cpu' in line['device']
  assert found[0]['state_sha256'] != found[1]['state_sha256']
  assert json.loads((whole / 'config.json').read_text()) == found[0]['config']
  assert (whole / 'report.html').exists()


def test_a_finished_run_is_not_repeated(call, tiny, whole):
  before = (whole / 'results.jsonl').read_bytes()
  done = call(run.main, f'--config={tiny}:class,er', f'--workdir={whole}')
  assert done.code == 0 and 'tiny is finished: 2 runs' in done.err
  assert (whole / 'results.jsonl').read_bytes() == before
  assert 'acc %' in done.out and 'er' in done.out


def test_another_configuration_is_refused(call, tiny, whole):
  done = call(run.main, f'--config={tiny}:class,er', f'--workdir={whole}', '--config.batch=5')
  assert done.code == 2 and 'batch: 10 / 5' in done.line and len(done.err.splitlines()) == 1


@pytest.mark.parametrize('seed', [0, 1])
def test_a_seed_of_a_mapped_run_equals_a_run_of_its_own(call, tiny, whole, tmp_path, seed):
  """In what it drew and stored to the bit, in its weights to rounding (to the bit with jax 0.10)."""
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', f'--config.seeds={seed}')
  assert call(run.main, *argv).code == 0
  alone, mapped = final_state(tmp_path), final_state(whole)
  assert set(alone) == set(mapped) and len(alone) > 10
  for name, a in alone.items():
    if a.dtype.kind == 'f':
      np.testing.assert_allclose(a, mapped[name][seed], rtol=1e-4, atol=1e-5, err_msg=name)
    else:
      np.testing.assert_array_equal(a, mapped[name][seed], err_msg=name)
  np.testing.assert_allclose(lines(tmp_path)[0]['R'], lines(whole)[seed]['R'], atol=0.051)


def test_the_size_of_chunks_changes_nothing(call, tiny, whole, tmp_path):
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', '--config.chunk=100')
  assert call(run.main, *argv).code == 0
  assert [s[:-1] for s in states(tmp_path)] == [s[:-1] for s in states(whole)]


def test_evaluation_inside_tasks_shows_the_lowest_accuracy(call, tiny, whole, tmp_path):
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', '--config.eval_every=2')
  assert call(run.main, *argv).code == 0
  for often, seldom in zip(lines(tmp_path), lines(whole), strict=True):
    assert often['state_sha256'] == seldom['state_sha256'] and often['R'] == seldom['R']
    assert often['min_acc'] <= seldom['min_acc'] and 'curve' not in seldom
    curve = np.array(often['curve'], float)
    assert curve.ndim == 3 and curve.shape[2] == often['tasks'] and np.nanmax(curve) <= 1
  assert any(
    a['min_acc'] < b['min_acc'] for a, b in zip(lines(tmp_path), lines(whole), strict=True)
  )


@pytest.mark.parametrize('at', [0, 7, 12])
def test_a_signal_saves_and_the_same_command_goes_on(call, tiny, whole, tmp_path, monkeypatch, at):
  seen, step = [], show.Show.step

  def interrupting(self, done, about):
    step(self, done, about)
    seen.append(done)
    if len(seen) == at + 1:
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(show.Show, 'step', interrupting)
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}')
  done = call(run.main, *argv)
  assert done.code == 128 + signal.SIGTERM
  assert 'stopped by SIGTERM' in done.line and 'run the same command again' in done.line
  assert not (tmp_path / 'results.jsonl').exists()
  done = call(run.main, *argv)
  assert done.code == 0 and 'going on from leg' in done.err
  assert states(tmp_path) == states(whole)
  assert seen[at + 1] <= seen[at + 2] and seen.count(40) >= 1  # it did not begin anew
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_at_the_end_of_one_program_leaves_the_next_alone(
  call, tiny, tmp_path, monkeypatch
):
  """As where seeds are programs of their own: a signal that came in the last moment counts."""
  train, trained, prepare = engine.train, [], build.prepare
  alone = lambda c, s, *more: prepare({**c, 'seeds': (s,)}, *more)[0]._replace(config=c)  # noqa: E731
  each = lambda c, *more: [alone(c, s, *more) for s in c['seeds']]  # noqa: E731
  monkeypatch.setattr(build, 'prepare', each)

  def late(*args, **how):
    outcome = train(*args, **how)
    trained.append(args[0].seeds)
    signal.raise_signal(signal.SIGTERM)
    return outcome

  monkeypatch.setattr(engine, 'train', late)
  argv = (f'--config={tiny}:class', f'--workdir={tmp_path}')
  done = call(run.main, *argv)
  assert done.code == 128 + signal.SIGTERM and '1 seeds are still to be run' in done.line
  assert trained == [[0]] and [line['seed'] for line in lines(tmp_path)] == [0]
  assert call(run.main, *argv).code == 0  # nothing is left that a signal could spare
  assert trained == [[0], [1]]


def test_a_checkpoint_holds_the_runs_alone(tiny):
  """Two devices have four places for three runs, one device three."""
  plan = lambda n: job.Plan(n, lambda f, mapped: f, *[None] * 5)  # noqa: E731
  work = job.Job(*[None] * 2, seeds=[0, 1, 2], **dict.fromkeys(job.Job._fields[3:9]))  # pyright: ignore
  rows = np.arange(8.0).reshape(4, 2)
  rows[3] = rows[2]
  key = jax.random.split(jax.random.key(0), 4)
  p = Progress({'a': rows, 'key': key}, Record(*[rows] * 4), 1, 2)
  kept = job.without_copies(p, work, plan(4))
  assert kept.state['a'].shape == (3, 2) and kept.state['key'].shape == (3,)
  again = job.padded(kept, plan(4))
  np.testing.assert_array_equal(again.state['a'], rows)
  np.testing.assert_array_equal(again.record.R, rows)
  assert job.padded(kept, plan(3)).state['a'].shape == (3, 2)


def test_what_is_not_at_its_end_is_no_run_to_take(call, tiny, tmp_path, monkeypatch):
  stopping(monkeypatch, 3)
  argv = (f'--config={tiny}:class', f'--workdir={tmp_path}', '--config.seeds=0,')
  assert call(run.main, *argv).code == 128 + signal.SIGINT
  chosen = config.tuples(json.loads((tmp_path / 'config.json').read_text()))
  with pytest.raises(UserError, match='is not at its end, it has finished . of its legs'):
    run.end_of(chosen, tmp_path, None, print)


def test_a_flipped_byte_in_the_latest_checkpoint(call, tiny, whole, tmp_path, monkeypatch):
  stopping(monkeypatch, 9)
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', '--save_every=0')
  assert call(run.main, *argv).code == 128 + signal.SIGINT
  latest = sorted((tmp_path / 'checkpoints/seeds-0-1').iterdir())[-1]
  victim = max((p for p in latest.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(victim.read_bytes())
  data[len(data) // 2] ^= 4
  victim.write_bytes(data)
  done = call(run.main, *argv)
  assert done.code == 0 and 'IS DAMAGED' in done.err and 'going back to step' in done.err
  assert states(tmp_path) == states(whole)


def stopping(monkeypatch, at: int) -> None:
  """SIGINT after so many looks at the progress, once."""
  seen, step = [], show.Show.step

  def interrupting(self, done, about):
    step(self, done, about)
    seen.append(done)
    if len(seen) == at:
      os.kill(os.getpid(), signal.SIGINT)

  monkeypatch.setattr(show.Show, 'step', interrupting)


def test_killed_between_the_last_checkpoint_and_the_results(
  call, tiny, whole, tmp_path, monkeypatch
):
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}')
  with monkeypatch.context() as patch:
    patch.setattr(results, 'append', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(run.main, *argv).code == 130
  assert call(run.main, *argv).code == 0
  assert states(tmp_path) == states(whole)


def test_a_half_written_line_is_written_again(tiny, whole, tmp_path):
  text = (whole / 'results.jsonl').read_text()
  (tmp_path / 'results.jsonl').write_text(text[: len(text) - 500])
  assert [line['seed'] for line in results.read(tmp_path)] == [0]
  results.append(tmp_path, lines(whole))
  results.append(tmp_path, lines(whole))
  assert (tmp_path / 'results.jsonl').read_text() == text


def test_a_damaged_line_in_the_middle_is_reported(whole, tmp_path):
  first, second = (whole / 'results.jsonl').read_text().splitlines()
  (tmp_path / 'results.jsonl').write_text(f'{first[:-9]}\n{second}\n')
  with pytest.raises(UserError, match=r'results\.jsonl:1 is not JSON'):
    results.read(tmp_path)


def test_joint_training_has_one_row(call, tiny, tmp_path):
  assert (
    call(run.main, f'--config={tiny}:joint', f'--workdir={tmp_path}', '--config.seeds=0').code == 0
  )
  (line,) = lines(tmp_path)
  assert [row.count(None) for row in line['R']] == [5, 5, 5, 5, 0]
  assert line['scenario'] == 'joint' and line['forgetting'] is None and line['acc'] > 0.1
  assert line['method'] == 'naive'


# --- NaN --------------------------------------------------------------------------------------------


def arrays(path: Path, **changes) -> Path:
  """A small data set of 4 classes as an .npz; `changes` replace its arrays."""
  rng = np.random.default_rng(0)
  centres = 3 * rng.normal(size=(4, 6))
  y = np.repeat(np.arange(4), 20)
  x = (centres[y] + rng.normal(size=(80, 6))).astype(np.float32)
  np.savez(path, **{'x_train': x, 'y_train': y, 'x_test': x, 'y_test': y, **changes})
  return path


@pytest.fixture
def on_arrays(call, tiny, tmp_path):
  """A run on the data set `arrays` makes."""

  def of(place: Path, *argv: str):
    return call(
      run.main,
      f'--config={tiny}',
      f'--workdir={place}',
      f'--config.dataset=npz:{tmp_path / "data.npz"}',
      '--config.tasks=2',
      '--config.data.examples_per_class=None',
      *argv,
    )

  return of


def overflow(path: Path, row: int) -> Path:
  """Finite data, one example of which makes the loss infinite."""
  x = np.array(np.load(arrays(path))['x_train'])
  x[row] = 3e38
  return arrays(path, x_train=x)


def test_nan_stops_with_the_seed_the_step_and_the_rows(on_arrays, tmp_path):
  overflow(tmp_path / 'data.npz', 55)  # class 2: in the second task
  place = tmp_path / 'run'
  done = on_arrays(place)
  assert done.code == 3
  match = re.search(
    r'seed (\d): the loss is (\w+) at step (\d+) of leg 2 of 2 .*rows \[(.*)\]; '
    r'the last good state is checkpoint (\d+)',
    done.line,
  )
  assert match, done.line
  what = json.loads((place / 'fault.json').read_text())
  assert 55 in what['rows'] and what['leg'] == 1 and what['step'] == int(match[3])
  assert what['seed'] == int(match[1]) and what['step_overall'] == 8 + what['step']
  kept = sorted(p.name for p in (place / 'checkpoints/seeds-0-1').iterdir())
  assert int(kept[-1]) == int(match[5]) <= 9 + what['step']
  assert not (place / 'results.jsonl').exists()
  again = on_arrays(place)
  assert again.code == 3 and again.line == done.line and 'going on from leg 2' in again.err


def test_what_is_kept_after_nan_is_as_if_the_run_had_been_stopped_there(on_arrays, tmp_path):
  """With the example repaired, the kept state goes on to what a clean run gives."""
  clean = arrays(tmp_path / 'clean.npz')
  overflow(tmp_path / 'data.npz', 55)
  place = tmp_path / 'run'
  assert on_arrays(place, '--config.eval_every=2').code == 3
  (tmp_path / 'data.npz').write_bytes(clean.read_bytes())
  assert on_arrays(place, '--config.eval_every=2').code == 0
  assert not (place / 'fault.json').exists()
  assert on_arrays(tmp_path / 'other', '--config.eval_every=2').code == 0
  assert states(place) == states(tmp_path / 'other')


def test_a_rate_that_is_too_high_stops_too(call, tiny, tmp_path):
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', '--config.optimizer.lr=1e30')
  done = call(run.main, *argv)
  assert done.code == 3 and 'the loss is nan at step 1 of leg 1 of 5' in done.line
  assert 'the last good state is checkpoint 0 ' in done.line


def test_data_that_cannot_be_learnt_from_is_refused_before_the_first_step(on_arrays, tmp_path):
  good = dict(np.load(arrays(tmp_path / 'data.npz')))
  bad = good['x_train'].copy()
  bad[13, 2] = np.nan
  for changes, message in (
    ({'x_train': bad}, 'has NaN or infinity in row 13'),
    ({'x_test': good['x_test'][:, :5]}, 'in test'),
    ({'y_train': good['y_train'][:-1]}, 'leading axis'),
    ({'y_test': good['y_test'] + 4}, '4 of 8 classes have no training example'),
    ({'x_train': good['x_train'].astype(complex)}, 'dtype complex'),
  ):
    arrays(tmp_path / 'data.npz', **changes)
    done = on_arrays(tmp_path / 'run')
    assert done.code == 2 and message in done.line and len(done.err.splitlines()) == 1, done.err
  (tmp_path / 'data.npz').unlink()
  done = on_arrays(tmp_path / 'run')
  assert done.code == 2 and 'data.npz' in done.line


def test_absent_data_says_where_it_looked(call, tiny, tmp_path, monkeypatch):
  monkeypatch.delenv('CL_JAX_DATA', raising=False)
  argv = (f'--config={tiny}', f'--workdir={tmp_path / "w"}', '--config.dataset=mnist')
  done = call(run.main, *argv)
  assert done.code == 2 and '--data_dir' in done.line
  done = call(run.main, *argv, f'--data_dir={tmp_path / "nowhere"}')
  assert done.code == 2 and 'nowhere does not exist' in done.line
  done = call(run.main, *argv, f'--data_dir={tmp_path}')
  assert done.code == 2 and len(done.err.splitlines()) == 1


# --- the disk ---------------------------------------------------------------------------------------


# When a write fails orbax closes its event loop while its other threads still report to it.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
# A program that compiles slowly enough to be cached finds the disk full too.
@pytest.mark.filterwarnings('ignore:Error writing persistent compilation cache entry')
def test_a_full_disk_keeps_what_there_is_and_the_run_goes_on_later(
  call, tiny, whole, tmp_path, monkeypatch
):
  stopping(monkeypatch, 5)
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}', '--save_every=0')
  assert call(run.main, *argv).code == 128 + signal.SIGINT
  there = sorted((tmp_path / 'checkpoints/seeds-0-1').iterdir())
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
  try:
    done = call(run.main, *argv)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert done.code == 2 and 'the disk is full' in done.line
  assert 'Traceback' not in done.err
  assert sorted((tmp_path / 'checkpoints/seeds-0-1').iterdir()) == there
  assert call(run.main, *argv).code == 0
  assert states(tmp_path) == states(whole)


def test_a_directory_that_cannot_be_made(call, tiny, tmp_path):
  (tmp_path / 'file').write_text('')
  done = call(run.main, f'--config={tiny}', f'--workdir={tmp_path / "file" / "below"}')
  assert done.code == 2 and 'cannot be written' in done.line and len(done.err.splitlines()) == 1


def test_a_read_only_directory(call, tiny, tmp_path):
  if os.geteuid() == 0:
    pytest.skip('root may write everywhere')
  place = tmp_path / 'fixed'
  place.mkdir(mode=0o500)
  done = call(run.main, f'--config={tiny}', f'--workdir={place}')
  assert done.code == 2 and 'cannot be written' in done.line and len(done.err.splitlines()) == 1


def test_a_read_only_file_system(call, tiny):
  """As root too: /proc takes no directories."""
  if not Path('/proc/self').exists():
    pytest.skip('Python 3 on this machine has no /proc')
  done = call(run.main, f'--config={tiny}', '--workdir=/proc/cl_jax')
  assert done.code == 2 and 'cannot be written' in done.line and len(done.err.splitlines()) == 1


def test_two_processes_do_not_share_a_directory(call, tiny, tmp_path):
  with workdirs.claimed(tmp_path):
    done = call(run.main, f'--config={tiny}', f'--workdir={tmp_path}')
  assert done.code == 2 and 'another process is at work' in done.line


# --- around it --------------------------------------------------------------------------------------


def test_offline_forbids_the_network():
  with cli.network(True):
    with pytest.raises(UserError, match="--offline: something tried to reach 'localhost'"):
      socket.getaddrinfo('localhost', 80)
    one = socket.socket()
    with one, pytest.raises(UserError, match='127.0.0.1'):
      one.connect(('127.0.0.1', 9))
  socket.getaddrinfo('localhost', 80)
  with cli.network(False):
    socket.getaddrinfo('localhost', 80)


def test_a_missing_report_is_said(call, tiny, whole, monkeypatch):
  monkeypatch.setitem(sys.modules, 'cl_jax.report', None)
  done = call(run.main, f'--config={tiny}:class,er', f'--workdir={whole}')
  assert done.code == 0 and 'no report was written' in done.err


def test_a_fault_of_the_program_is_one_line_too(call, tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(run, 'run', lambda *args: 1 / 0)
  done = call(run.main, f'--config={tiny}', f'--workdir={tmp_path}')
  assert done.code == 3 and 'ZeroDivisionError' in done.line and len(done.err.splitlines()) == 1


def test_a_log_has_lines_and_a_terminal_a_bar(capsys, monkeypatch):
  plain = show.Show()
  plain.begin('name', 100, 0)
  for done in (0, 10, 50):
    plain.step(done, {'leg': 0, 'legs': 2, 'done': done, 'loss': 1.5})
  plain.step(50, {'leg': 1, 'legs': 2, 'done': 0, 'accuracy': [0.5, 0.25]})
  out = capsys.readouterr().err.splitlines()
  assert len(out) == 1 and re.search(
    r'name  leg 1/2 done  accuracy 0.500 0.250  50%  eta 0:0', out[0]
  )
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
  bar = show.make()
  assert isinstance(bar, show.Bar)
  bar.begin('name', 100, 0)
  bar.step(10, {'leg': 0, 'legs': 2, 'done': 10, 'loss': 1.5})
  bar.step(50, {'leg': 1, 'legs': 2, 'done': 0, 'accuracy': [0.5]})
  bar.close()
  assert 'leg 1/2 done' in capsys.readouterr().err


def test_the_commit_is_that_of_the_source_or_the_version(monkeypatch):
  assert re.fullmatch(r'[0-9a-f]{40}(-dirty)?|cl_jax [\d.]+', results.commit())
  monkeypatch.setattr(results.cl_jax, '__file__', '/nowhere/cl_jax/__init__.py')
  assert results.commit() == f'cl_jax {results.cl_jax.__version__}'


def test_times_are_read_at_a_glance():
  assert [show.clock(s) for s in (0.4, 61, 3723)] == ['0:00', '1:01', '1:02:03']


def test_a_mistake_can_be_put_right_in_the_same_place(call, tiny, tmp_path):
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}')
  done = call(run.main, *argv, '--config.er.writer=rings')
  assert done.code == 2 and 'no memory writer' in done.line
  assert call(run.main, *argv).code == 0
  done = call(run.main, *argv, '--config.er.draw=4')
  assert done.code == 2 and 'belongs to another configuration' in done.line
