"""results.jsonl: one JSON object a line and run, written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cl_jax
from cl_jax import budget, checkpoint, durable, metrics
from cl_jax.errors import UserError
from cl_jax.report.tables import LIKELIHOOD
from cl_jax.types import Batch, Tree
from experiments.build import Setup, example, hyper, likelihood
from experiments.config import sha256
from experiments.engine import Outcome
from experiments.job import Job, leg_steps

FILE = 'results.jsonl'
LIBRARIES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'orbax-checkpoint')


def lines(job: Job, outcome: Outcome, command: str) -> list[dict[str, Any]]:
  """A line per run of the job that came to its end.

  `peak_rss_bytes` is the most that the process has held since it began, for this program or one before it.
  `wall_s` and `compile_s` are those of the mapped program divided by its runs, so that sums over lines
  are what was waited for; `compile_s` is lowering and compiling, and is part of `wall_s`.
  """
  cost, grown = costs(job.setup), growth(job.setup)
  about = {
    'peak_rss_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
    'commit': commit(),
    'versions': {'python': platform.python_version()} | {n: version(n) for n in LIBRARIES},
    'device': device(),
    'started': outcome.clock.started,
    'command': command,
  }
  found = []
  for run, (config, seed) in enumerate(zip(job.configs, job.seeds, strict=True)):
    if run in outcome.faults:
      continue
    record, stream = outcome.records[run], job.streams[run]
    R = np.asarray(record.R, np.float64)
    measures = metrics.summary(R, record.start, record.curve if record.curve.size else None)
    found.append(
      {
        'config': config,
        'config_sha256': sha256(config),
        'method': method_name(config),
        'needs': list(cost['needs']),
        'scenario': config['scenario'],
        'dataset': config['dataset'],
        'model': config['model']['name'],
        'seed': seed,
        'tasks': stream.tasks,
        'R': table(R, stream.tasks),
        **{k: None if v is None else round(v, 7) for k, v in measures.items()},
        **({'metric': LIKELIHOOD} if likelihood(config) else {}),
        **({'curve': nested(np.asarray(record.curve))} if record.curve.size else {}),
        **({'slots': job.setup.slots} if job.setup.slots else {}),
        'state_bytes': cost['state_bytes'],
        **({'state_bytes_by_task': grown} if grown else {}),
        'flops_per_step': cost['flops_per_step'],
        'passes': cost['passes'],
        **({'backbone': cost['backbone']} if 'backbone' in cost else {}),
        'steps': int(leg_steps(stream).sum()),
        'wall_s': round(outcome.clock.wall() / len(job.seeds), 3),
        'compile_s': round(outcome.clock.compile_s / len(job.seeds), 3),
        'state_sha256': checkpoint.digest(outcome.states[run]),
        **about,
      }
    )
  return found


def method_name(config: Mapping[str, Any]) -> str:
  return '+'.join(config['methods']) or 'naive'


def variant_name(config: Mapping[str, Any]) -> str:
  """What tables of devices call a learner: its methods and, but for configs/edge.py, the experiment.

  'ranpac (structured)' of the experiment 'edge_structured'; 'er' of 'edge' alone.
  """
  of = config['name'].removeprefix('edge').strip('_')
  return method_name(config) + (f' ({of})' if of else '')


def table(R: np.ndarray, tasks: int) -> list[list[float | None]]:
  """R as T x T, null where nothing was evaluated: joint training fills the last row alone.

  A blurry stream of another number of segments than tasks has a row per segment.
  """
  if len(R) == 1 < tasks:
    R = np.concatenate([np.full((tasks - 1, tasks), np.nan), R])
  return nested(R)


def nested(a: np.ndarray) -> list:
  """Nested lists, null for NaN."""
  if a.ndim > 1:
    return [nested(part) for part in a]
  return [None if np.isnan(v) else round(float(v), 7) for v in a]


def costs(setup: Setup) -> dict[str, Any]:
  """Bytes by role, FLOPs of a step and passes, from shapes alone: nothing is computed.

  Where features are cached, 'passes' and 'flops_per_step' are those of what learns from them, and what
  they stand for is in 'backbone'.
  """
  stream = setup.streams[0]
  hp, batch = hyper(setup.config, stream), abstract(example(stream))
  weights = abstract(setup.weights)

  def made(model=None, hp=hp, weights=setup.weights):
    return setup.assemble(hp, weights, model)

  own = made()
  state = jax.eval_shape(own.init, jax.random.key(0), batch)
  step = lambda weights, state, batch: made(weights=weights).step(state, batch)  # noqa: E731
  return {
    'needs': own.needs,
    'state_bytes': budget.state_bytes(state, setup.frozen),
    'flops_per_step': budget.flops(step, weights, state, batch),
    'passes': budget.passes(made, setup.model(setup.weights), state, batch),
    **({'backbone': backbone(setup)} if setup.config['cache_features'] else {}),
  }


def backbone(setup: Setup) -> dict[str, float]:
  """Forward passes and FLOPs of the network whose features are cached, which no step computes again.

  A pass is one of a whole batch of the stream. In training every example has one, shared out among its
  visits; a prediction, of whose input nothing is cached, needs one of its own.
  """
  stream = setup.streams[0]
  index = np.asarray(stream.index)
  visits = index[index >= 0] % len(stream.y)
  share, batch = len(np.unique(visits)) / len(visits), index.shape[-1] * setup.below
  return {
    'train_forward': round(share, 3),
    'predict_forward': 1.0,
    'flops_per_step': round(share * batch),
    'flops_per_prediction': batch,
  }


def growth(setup: Setup) -> list[int]:
  """Bytes of state that a learner needs after 1, 2, ... tasks; [] where they stay the same.

  Each is the total of the learner made for so many tasks: what methods allocate for tasks to come (columns,
  gates, encoders) is not there yet. The output layer and a memory of fixed capacity are whole from the start.
  """
  tasks = setup.streams[0].tasks
  if bytes_after(setup, 1)['total'] == bytes_after(setup, tasks)['total']:
    return []
  return [bytes_after(setup, t + 1)['total'] for t in range(tasks)]


def bytes_after(setup: Setup, tasks: int) -> dict[str, int]:
  """Bytes by role of the learner made for the first `tasks` tasks; see `growth`."""
  stream = setup.streams[0]
  own = setup.assemble(hyper(setup.config, stream), setup.weights, tasks=tasks)
  state = jax.eval_shape(own.init, jax.random.key(0), abstract(example(stream)))
  return budget.state_bytes(state, setup.frozen)


def abstract(tree: Tree | Batch) -> Any:
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def read(workdir: Path) -> list[dict[str, Any]]:
  """The lines that are there; a line that a killed process left half-written is none."""
  path, found = workdir / FILE, []
  if not path.exists():
    return found
  raw = path.read_text().split('\n')
  for number, line in enumerate(raw, 1):
    if not line.strip():
      continue
    try:
      found.append(json.loads(line))
    except ValueError as error:
      if number == len(raw):  # no newline follows: an append that was cut off
        continue
      raise UserError(
        f'{path}:{number} is not JSON ({error}): repair or remove the file'
      ) from error
  return found


def done(workdir: Path) -> set[tuple[str, int]]:
  """(config_sha256, seed) of the runs that have a line."""
  return {(line['config_sha256'], line['seed']) for line in read(workdir)}


def append(workdir: Path, new: list[dict[str, Any]]) -> None:
  """Adds lines for runs that have none, all together: the file is replaced in one step."""
  old = read(workdir)
  there = {(line['config_sha256'], line['seed']) for line in old}
  old += [line for line in new if (line['config_sha256'], line['seed']) not in there]
  durable.write(workdir / FILE, ''.join(json.dumps(line, sort_keys=False) + '\n' for line in old))


def commit() -> str:
  """The commit of the source that runs, marked where files differ from it; else the version."""
  here = Path(cl_jax.__file__).resolve().parent
  git = ['git', '-C', str(here)]
  try:
    run = lambda *args: subprocess.run(  # noqa: E731
      [*git, *args], capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()
    run('ls-files', '--error-unmatch', 'types.py')  # a repository around site-packages is not ours
    mark = '-dirty' if run('status', '--porcelain', '--untracked-files=no') else ''
    return run('rev-parse', 'HEAD') + mark
  except (OSError, subprocess.SubprocessError):
    return f'cl_jax {cl_jax.__version__}'


def version(name: str) -> str | None:
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return None


def device() -> str:
  """The kind and number of devices, and the processor's name where it is a CPU."""
  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform == 'cpu':
    try:
      text = Path('/proc/cpuinfo').read_text()
      named = [
        line.partition(':')[2] for line in text.splitlines() if line.startswith('model name')
      ]
      kind = named[0].strip() if named else platform.machine()
    except OSError:
      kind = platform.machine()
  return f'{len(devices)} x {devices[0].platform} ({kind}), {os.cpu_count()} cores'


_RSS_UNIT = 1 if sys.platform == 'darwin' else 1024
