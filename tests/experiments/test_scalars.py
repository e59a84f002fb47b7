"""--writers: TensorBoard and wandb get what results.jsonl has, each point once."""

from __future__ import annotations

import os
import signal
import struct
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import launch, results, run, scalars, show
from experiments.launch_follow import Launch
from experiments.options import parse
from tests.experiments.conftest import lines

Points = list[tuple[str, str, int | None, float]]  # run, tag, step (None of wandb's summary), value


@pytest.fixture
def there(monkeypatch) -> dict[str, Points]:
  """What modules that stand in for tensorboardX and wandb were given."""
  got: dict[str, Points] = {'tensorboard': [], 'wandb': []}

  class SummaryWriter:
    def __init__(self, folder: str, purge_step: int, filename_suffix: str):
      self.run = Path(folder).name
      assert all(step < purge_step for r, _, step, _ in got['tensorboard'] if r == self.run)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
      got['tensorboard'].append((self.run, tag, step, value))

    def add_text(self, tag: str, text: str) -> None:
      assert (tag, text[:4]) == ('config', '    ')

    def flush(self) -> None: ...

    def close(self) -> None: ...

  def init(*, id: str, config: dict, resume: str | None, mode: str, **others: object):
    assert mode == 'offline' and config['name'] and others['name'] == id
    assert resume == ('allow' if any(r == id for r, *_ in got['wandb']) else None)
    summary = lambda values: got['wandb'].extend((id, k, None, v) for k, v in values.items())  # noqa: E731

    def log(values, step, commit):
      assert commit
      got['wandb'].extend((id, k, step, v) for k, v in values.items())

    return SimpleNamespace(
      log=log, summary=SimpleNamespace(update=summary), finish=lambda: None, id=id
    )

  monkeypatch.setitem(sys.modules, 'tensorboardX', SimpleNamespace(SummaryWriter=SummaryWriter))
  monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init, Settings=dict))
  monkeypatch.delenv('WANDB_MODE', raising=False)
  return got


def wanted(line: dict, final_step: int | None) -> set:
  """(tag, step, value) of everything that a writer should get of a line."""
  R = np.array(line['R'], float)
  found = {(f'accuracy/task_{i + 1}', t + 1, R[t, i]) for t in range(5) for i in range(5)}
  found |= {('accuracy/tasks_seen', t + 1, R[t, : t + 1].mean()) for t in range(5)}
  for key in ('acc', 'forgetting', 'bwt', 'fwt', 'learning_acc', 'aaa', 'min_acc'):
    found.add((f'measures/{key}', final_step, line[key]))
  found |= {(f'state_bytes/{k}', final_step, v) for k, v in line['state_bytes'].items()}
  return found | {(f'costs/{k}', final_step, line[k]) for k in scalars.COSTS}


def check(points: Points, found: list[dict], final_step: int | None) -> None:
  """Every point of every line is there, once, and nothing else."""
  assert max(Counter(p[:3] for p in points).values()) == 1
  for line in found:
    name = f'er-seed{line["seed"]}-{line["config_sha256"][:8]}'
    got = {(tag, step): value for r, tag, step, value in points if r == name}
    expected = {(tag, step): value for tag, step, value in wanted(line, final_step)}
    assert got == pytest.approx(expected)
  assert len({p[0] for p in points}) == len(found)


def test_each_point_is_given_once_in_spite_of_interruptions(
  call, tiny, tmp_path, monkeypatch, there
):
  seen, step = [], show.Show.step

  def interrupting(self, done, about):
    step(self, done, about)
    seen.append(done)
    if len(seen) == 8:  # inside the third leg
      os.kill(os.getpid(), signal.SIGTERM)

  monkeypatch.setattr(show.Show, 'step', interrupting)
  argv = (f'--config={tiny}:class,er', f'--workdir={tmp_path}')
  assert call(run.main, *argv, '--writers=tensorboard').code == 128 + signal.SIGTERM
  live = {p[2] for p in there['tensorboard']}
  assert live == {1, 2}  # before the end
  assert call(run.main, *argv, '--writers=tensorboard').code == 0
  check(there['tensorboard'], lines(tmp_path), 5)
  # Of a finished run a writer that comes later gets everything from results.jsonl, the other nothing.
  before = list(there['tensorboard'])
  assert call(run.main, *argv, '--writers=tensorboard,wandb').code == 0
  assert there['tensorboard'] == before
  check(there['wandb'], lines(tmp_path), None)
  assert call(run.main, *argv, '--writers=wandb').code == 0
  check(there['wandb'], lines(tmp_path), None)


def test_what_was_not_noted_before_a_kill_is_given_again_and_hidden(tmp_path, there, monkeypatch):
  config = {'name': 'n', 'methods': (), 'data': {}, 'model': {'name': 'mlp'}}
  points = [scalars.Point(t, {'accuracy/task_1': t / 4}) for t in (1, 2, 3)]
  with scalars.opened(['tensorboard'], tmp_path) as out:
    out.give(config, 0, points[:1])
    monkeypatch.setattr(
      scalars.durable, 'write', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
      out.give(config, 0, points[:2])
  monkeypatch.undo()
  there['tensorboard'].pop()  # what purge_step hides
  opened = []
  fake = SimpleNamespace(
    SummaryWriter=lambda folder, **how: (
      opened.append(how)
      or SimpleNamespace(
        add_scalar=lambda tag, value, step: opened.append(step), flush=list, close=list
      )
    )
  )
  monkeypatch.setitem(sys.modules, 'tensorboardX', fake)
  with scalars.opened(['tensorboard'], tmp_path) as out:
    out.give(config, 0, points)
  assert opened == [{'purge_step': 2, 'filename_suffix': '.1'}, 2, 3]


def test_runs_that_fault_and_legs_to_come_give_nothing(tmp_path, there):
  config = {'name': 'n', 'methods': ('er',), 'data': {}, 'model': {'name': 'mlp'}}
  R = np.full((2, 3, 3), np.nan)
  R[:, 0] = [0.5, 0.25, 0.0]
  stream = SimpleNamespace(tasks=3)
  job = SimpleNamespace(configs=[config] * 2, seeds=[4, 5], streams=[stream] * 2)
  with scalars.opened(['tensorboard'], tmp_path) as out:
    out.leg(job, SimpleNamespace(R=R), {0: 'a fault'})
    (one,) = {p[0] for p in there['tensorboard']}
    assert one.startswith('er-seed5-')
    R[:, 1] = 0.75
    out.leg(job, SimpleNamespace(R=R), {0: 'a fault'})
  assert [(t, v) for _, k, t, v in there['tensorboard'] if k == 'accuracy/tasks_seen'] == [
    (1, 0.5),
    (2, 0.75),
  ]
  # Joint training has its only row at the end.
  assert [p.step for p in scalars.legs(results.table(R[0, :1], 3), config)] == [3]


@pytest.mark.parametrize('name, module', [('tensorboard', 'tensorboardX'), ('wandb', 'wandb')])
def test_a_missing_extra_is_one_line(call, tiny, tmp_path, monkeypatch, name, module):
  monkeypatch.setitem(sys.modules, module, None)
  done = call(run.main, f'--config={tiny}', f'--workdir={tmp_path}', f'--writers={name}')
  assert done.code == 2 and len(done.err.splitlines()) == 1
  assert f'--writers={name} needs {module}' in done.line and f"'cl_jax[{name}]'" in done.line
  assert not (tmp_path / 'checkpoints').exists()
  done = call(launch.main, f'--config={tiny}', f'--workdir={tmp_path}', f'--writers={name}')
  assert done.code == 2 and f'--writers={name} needs {module}' in done.line
  done = call(run.main, f'--config={tiny}', f'--workdir={tmp_path}', '--writers=tensorbored')
  assert done.code == 2 and 'only tensorboard and wandb' in done.line


def test_jobs_of_a_launch_have_the_writers_too(tiny, tmp_path):
  words = [f'--config={tiny}', f'--workdir={tmp_path}', '--writers=tensorboard,wandb']
  own = Launch(tmp_path, '', [], None, parse(words, 'experiments.launch', ''), print)  # pyright: ignore
  argv = own.argv(SimpleNamespace(folder=tmp_path))  # pyright: ignore
  assert parse([f'--config={tiny}', *argv[1:]], 'experiments.run', '').writers == (
    'tensorboard',
    'wandb',
  )


def test_tensorboard_reads_its_own_events_back(tmp_path):
  pytest.importorskip('tensorboardX', reason="needs: pip install 'cl_jax[tensorboard]'")
  config = {'name': 'n', 'methods': (), 'data': {}, 'model': {'name': 'mlp'}}
  points = [scalars.Point(t, {'accuracy/task_1': t / 4}) for t in (1, 2, 3)]
  for upto in (2, 3):  # two processes
    with scalars.opened(['tensorboard'], tmp_path) as out:
      out.give(config, 0, points[:upto])
  (folder,) = (tmp_path / 'tensorboard').iterdir()
  assert len(list(folder.iterdir())) == 2
  assert sorted(p for file in folder.iterdir() for p in events(file)) == [
    ('accuracy/task_1', p.step, p.values['accuracy/task_1']) for p in points
  ]


def events(file: Path) -> list[tuple[str, int, float]]:
  """(tag, step, value) of the scalars of an event file: records of length, checksum, bytes, checksum."""
  from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports]

  raw, at, found = file.read_bytes(), 0, []
  while at < len(raw):
    (size,) = struct.unpack_from('<Q', raw, at)
    event = Event.FromString(raw[at + 12 : at + 12 + size])
    at += 12 + size + 4
    found += [
      (v.tag, event.step, v.simple_value) for v in event.summary.value if v.HasField('simple_value')
    ]
  return found
