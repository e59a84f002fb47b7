"""Do foundation models forget, and what helps? `python -m experiments.study --config=configs/study_NAME.py`.

A study is a configuration file with a list of cells, each an adaptation and a method (full,er). Every cell
and seed is a process of its own in DIR/CELL-SEED, as many at a time as there are cores. It resumes when
repeated.
Beside the results of every run it measures how far the network has moved (linear CKA of the features before
and after, Kornblith et al. 2019) and, for language models, the likelihood of text that is never learnt from.
DIR gets results.jsonl of all cells, drift.jsonl and table.md. What each cell will need is printed before the
first of them starts; --plan prints that and trains nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import budget, durable
from cl_jax.errors import UserError
from cl_jax.loop import evaluate
from cl_jax.report import lines as report_lines
from cl_jax.report.tables import markdown, size, tables, text
from cl_jax.streams import corpora, load
from cl_jax.streams.records import in_files
from cl_jax.streams.take import without_data
from cl_jax.types import Batch, Forward, Tree
from experiments import build, cli, config, features, results, run, show, streams, workdir
from experiments.options import Options, parse
from experiments.pool import Work, default_workers, processes

PROGRAM = 'experiments.study'
DRIFT = 'drift.json'
ROWS = 256  # examples that drift is measured on
SAVE_EVERY = 600.0  # seconds; a checkpoint of a language model is a gigabyte


def main(argv: Sequence[str] | None = None) -> int:
  argv = sys.argv[1:] if argv is None else list(argv)
  if argv[:1] == ['--run']:  # one of the processes
    return cli.guarded(run.PROGRAM, one, argv[1:])
  parser = argparse.ArgumentParser(
    prog=f'python -m {PROGRAM}',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--config', required=True, metavar='FILE[:WORDS]', help='configs/study_{vit,lm,encoder}.py')
  add('--workdir', metavar='DIR', type=Path, help='runs/ and the name of the configuration')
  add('--data_dir', metavar='DIR', help='parent of text/ and tfds/; default: CL_JAX_DATA')
  add('--only', default='*', metavar='PATTERNS', help="cells by name, as in 'lora,* full,er'")
  add('--seeds', type=int, default=1, help='each with an order of the tasks of its own (1)')
  add('--workers', type=int, help='processes at a time (one a core; one with an accelerator)')
  add('--plan', action='store_true', help='only print what each cell needs: bytes, FLOPs, steps')
  add('--table', action='store_true', help='only draw the tables again')
  return cli.guarded(PROGRAM, lambda words: command(parser.parse_args(words)), argv)


def command(options: argparse.Namespace) -> int:
  study, path, words = found(options.config)
  if options.seeds < 1 or (options.workers is not None and options.workers < 1):
    raise UserError('--seeds and --workers must be at least 1')
  cells = chosen(study, options.only)
  folder = options.workdir or Path('runs') / Path(path).stem
  work = [
    planned(path, words, cell, seed, folder, options.data_dir)
    for seed in range(options.seeds)
    for cell in cells
  ]
  if options.plan:
    return plan(work)
  if options.table and not any(folder.glob('*/results.jsonl')):
    raise UserError(f'--table: {folder} has no results yet: run the study without it first')
  folder.mkdir(parents=True, exist_ok=True)
  failed = {}
  if not options.table:
    todo = [w for w in work if not (w.finished() and (w.folder / DRIFT).exists())]
    print(f'{len(todo)} of {len(work)} runs to do, into {folder}', flush=True)
    left = {w.name.rpartition('-')[0] for w in todo}
    foretell(options, [c for c in cells if dashed(c) in left])
    failed = ran(todo, options.workers or default_workers(), folder)
  finish(folder)
  return max(failed.values(), default=0)


def found(source: str) -> tuple[ModuleType, str, tuple[str, ...]]:
  """The module of a study, its path and the words after it, which every cell gets."""
  path, _, words = source.partition(':')
  config.load(source)  # an absent or broken file is refused in the way of all commands
  spec = importlib.util.spec_from_file_location('study', path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'CELLS'):
    raise UserError(f'--config: {path} has no CELLS and is no study; use experiments.run for it')
  return module, os.path.relpath(path), tuple(w for w in words.split(',') if w)


def chosen(module: ModuleType, only: str) -> list[str]:
  """The CELLS of a configuration that one of the patterns matches, which are separated by spaces.

  Raises:
    UserError: none is.
  """
  found = [c for c in module.CELLS if any(fnmatch.fnmatch(c, p) for p in only.split())]
  if not found:
    raise UserError(f'--only={only} matches no cell; there are {"  ".join(module.CELLS)}')
  return found


def planned(
  path: str, words: tuple[str, ...], cell: str, seed: int, folder: Path, data_dir: str | None
) -> Work:
  name = f'{dashed(cell)}-{seed}'
  argv = (
    f'--config={path}:{",".join((*words, cell))}',
    f'--config.seeds={seed}',
    f'--save_every={SAVE_EVERY:.0f}',
    f'--workdir={folder / name}',
    *((f'--data_dir={data_dir}',) if data_dir else ()),
  )
  return Work(name, (seed,), folder / name, argv)


def dashed(cell: str) -> str:
  """A cell in names of folders."""
  return cell.replace(',', '-')


def foretell(options: argparse.Namespace, cells: Sequence[str]) -> None:
  """Prints the plan of these cells, by a process that leaves an accelerator's memory to those that follow."""
  if not cells:
    return
  print('what they will need (--plan):', flush=True)
  argv = ['--plan', f'--config={options.config}', f'--only={" ".join(cells)}']
  argv += [f'--data_dir={options.data_dir}'] if options.data_dir else []
  # What is wrong with a cell is said there and is its own run's failure.
  subprocess.run([sys.executable, '-m', PROGRAM, *argv], check=False)


def ran(todo: Sequence[Work], workers: int, folder: Path) -> dict[str, int]:
  """Runs them: {name: exit code} of what failed."""
  begin = time.monotonic()

  def say(line: str) -> None:
    print(f'{show.clock(time.monotonic() - begin):>7}  {line}', flush=True)

  failed = {}
  with processes(todo, (sys.executable, '-m', PROGRAM, '--run'), workers, say) as ended:
    for w, code in ended:
      failed |= {w.name: code} if code else {}
      say(f'{w.name}: {f"failed, {w.last_words()}" if code else outcome(w)}')
      finish(folder, quiet=True)
  return failed


def outcome(w: Work) -> str:
  line = results.read(w.folder)[-1]
  fell = line['forgetting']
  return f'{line["acc"]:.3f}, forgetting {"-" if fell is None else f"{fell:.3f}"}, {line["wall_s"]:.0f} s'


# --- one run ----------------------------------------------------------------------------------------


def one(argv: list[str]) -> int:
  """experiments.run without its report, then what moved; the checkpoints, which are large, go at the end."""
  options = parse(argv, run.PROGRAM, run.ABOUT)
  source = next(w for w in argv if w.startswith('--config=')).removeprefix('--config=')
  held_out = getattr(found(source)[0], 'HELD_OUT', ())
  shown = show.make()
  with workdir.claimed(options.workdir) as place:
    workdir.remember(place, options.config)
    run.run(options, place, shown)
    if not (place / DRIFT).exists():
      measure(options, place, held_out, shown.say)
  return 0


def measure(
  options: Options, place: Path, held_out: Sequence[str], tell: Callable[[str], None]
) -> None:
  """Writes what moved in a run with one seed to drift.json.

  {'before': [accuracy (or log-likelihood) on each task before the first step], 'cka': of the features of the
  network without its method, before the first step, and of those after the last one, 'held_out': {corpus:
  [before, after]}}.
  """
  resolved = options.config
  end = run.end_of(resolved, place, options.data_dir, tell)
  if end is None:
    tell(f'{place} has no checkpoint any more: what moved is not measured')
    return
  setup, state, hp, method = end.setup, end.state, end.hp, end.method
  stream, model = setup.streams[0], setup.model(setup.weights)
  flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1, *a.shape[3:]), stream.test.x)
  real = np.flatnonzero(np.asarray(stream.test.w).reshape(-1) > 0)
  rows = real[np.linspace(0, len(real) - 1, min(ROWS, len(real))).astype(int)]
  x = jax.tree.map(lambda a: a[rows], flat)
  first = features.batch_of(jax.tree.map(lambda a: a[:1], x))
  key = jax.random.key(resolved['seeds'][0])
  # Weights are arguments of what is compiled: closed over, they would be constants in it.
  made = lambda weights: setup.build(hp, weights)  # noqa: E731
  start = jax.jit(lambda w: made(w).init(key, first))(setup.weights)
  before = jax.jit(lambda w, s, test: evaluate(made(w), s, test))(setup.weights, start, stream.test)
  said: dict[str, Any] = {
    'before': [round(float(a), 6) for a in before],
    'cka': round(
      cka(
        seen(model.apply, setup, start, x, tell),
        seen(method.wrap(state.method, model.apply), setup, state, x, tell),
      ),
      6,
    ),
  }
  if held_out:

    def total(weights, state, batch):
      found = made(weights).measure
      assert found is not None, 'only language models have text that they were not told to learn'
      return found(state, batch).sum(0)

    measured = partial(jax.jit(total), setup.weights)
    said['held_out'] = unseen(options, measured, (start, state), held_out)
  durable.write(place / DRIFT, json.dumps(said) + '\n')
  shutil.rmtree(end.folder, ignore_errors=True)


def seen(apply, setup, state, x: Tree, tell: Callable[[str], None]) -> np.ndarray:
  """The features f64[N, D] of inputs, as the forward pass `apply` gives them."""

  def compute(variables, x):
    state, frozen = variables
    fwd = Forward(apply, frozen, state.stats)
    return fwd(state.params, features.batch_of(x)).features

  variables = (state, setup.weights['frozen'])
  return features.extract(jax.jit(compute), variables, x, 'a sample', tell).astype(np.float64)


def cka(one: np.ndarray, two: np.ndarray) -> float:
  """Linear centred kernel alignment of features [N, D] and [N, E], in [0, 1]: 1 up to rotation and scale.

  Kornblith et al., ICML 2019, eq. 4 with linear kernels.
  """
  one, two = (a - a.mean(0) for a in (one, two))
  norm = np.linalg.norm
  return float(norm(one.T @ two) ** 2 / max(norm(one.T @ one) * norm(two.T @ two), 1e-30))


def unseen(
  options: Options, measured: Callable, states, names: Sequence[str]
) -> dict[str, list[float]]:
  """{corpus: log-likelihood of a token before and after}, in nats, on text that no task has.

  `measured(state, batch)` gives f32[2], the sum and the number of tokens.
  """
  data = options.config['data']
  root = load.root_of(options.data_dir, 'for text/corpora') / 'text/corpora'
  tokenizer = Path(streams.tokenizer(options.config))
  found = {}
  for name in names:
    rows = corpora.blocks(root / name / 'test.txt', tokenizer, data['length'])
    rows = rows[: data['test_per_task'] or len(rows)]
    sums = np.zeros((2, 2))
    for lo in range(0, len(rows), data['test_batch']):
      part = rows[lo : lo + data['test_batch']]
      keep = np.arange(data['test_batch']) < len(part)
      part = np.resize(part, (data['test_batch'], part.shape[1]))
      learn = np.ones(part.shape, bool)
      x = {'tokens': part, 'mask': learn, 'learn': learn}
      zeros = jnp.zeros(len(part), jnp.int32)
      batch = Batch(x, zeros, jnp.asarray(keep, jnp.float32), zeros - 1)
      sums += [np.asarray(measured(s, batch)) for s in states]
    found[name] = [round(float(v / n), 6) for v, n in sums]
  return found


# --- tables and plans -------------------------------------------------------------------------------


def finish(folder: Path, quiet: bool = False) -> None:
  """results.jsonl and drift.jsonl of all runs, and table.md."""
  lines, drift = [], []
  for place in sorted(p for p in folder.iterdir() if p.is_dir()):
    own = results.read(place)
    lines += own
    if own and (place / DRIFT).exists():
      about = json.loads((place / DRIFT).read_text())
      drift.append({'cell': cell_of(own[-1]), 'seed': own[-1]['seed'], **about})
  if not lines:
    return
  dump = lambda rows: ''.join(json.dumps(row) + '\n' for row in rows)  # noqa: E731
  durable.write(folder / results.FILE, dump(lines))
  durable.write(folder / 'drift.jsonl', dump(drift))
  parts = [t for s in report_lines.sections(map(report_lines.check, lines)) for t, _ in tables(s)]
  durable.write(folder / 'table.md', '\n\n'.join(map(markdown, parts)) + '\n')
  if not quiet:
    print('\n' + '\n\n'.join(map(text, parts)))


COLUMNS = ('weights', 'data', 'state', 'temporary', 'together')


def plan(work: Sequence[Work]) -> int:
  """Prints what each run would hold and compute; nothing is trained."""
  cli.devices(1)
  print(row('cell', ['weights', 'data', 'state', 'a step', 'together', 'FLOPs/step', 'steps']))
  wrong, most = 0, ('', 0.0)
  for w in work:
    try:
      options = parse([*w.argv], run.PROGRAM, run.ABOUT)
      cost = needed(build.prepare(options.config, options.data_dir)[0])
    except UserError as error:
      print(f'{PROGRAM}: {w.name}: {" ".join(str(error).split())}', file=sys.stderr)
      wrong = 2
      continue
    counts = [f'{cost["flops"]:.3g}', f'{cost["steps"]:.0f}']
    print(row(w.name, [size(cost[k]) for k in COLUMNS] + counts), flush=True)
    most = max(most, (w.name, cost['together']), key=lambda m: m[1])
  if most[0]:
    room = (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
    has = f'; this device has {size(room)}' if room else ''
    print(f'the most, {most[0]}: {size(most[1])}{has}', flush=True)
  return wrong


def row(name: str, cells: Sequence[str]) -> str:
  return f'{name:28}' + ''.join(f' {cell:>10}' for cell in cells)


def needed(setup: build.Setup) -> dict[str, float]:
  """Bytes on the device while the run trains, FLOPs and steps.

  Returns:
    'weights' (frozen ones, also behind cached features, and the pretrained values of those that are
    trained, from which the state begins), 'data' (the stream, with what is evaluated), 'state', 'temporary'
    (what a compiled step needs besides; NaN where the backend does not tell), 'together' (all that, and the
    state a second time: the one before a call is there until the next one is), 'flops' of a step, 'steps'.
  """
  stream = setup.streams[0]
  hp, batch = build.hyper(setup.config, stream), results.abstract(build.example(stream))
  weights = results.abstract(setup.weights)
  made = lambda w: setup.build(hp, w)  # noqa: E731
  state = jax.eval_shape(lambda w: made(w).init(jax.random.key(0), build.example(stream)), weights)
  step = jax.jit(lambda w, s, b: made(w).step(s, b), donate_argnums=1)
  memory = step.lower(weights, state, batch).compile().memory_analysis()
  there = without_data(stream) if in_files(stream.x) else stream
  found = {
    'weights': budget.tree_bytes((setup.frozen, weights['initial'])),
    'data': budget.tree_bytes(jax.tree.leaves(there)),
    'state': budget.tree_bytes(state),
    'temporary': memory.temp_size_in_bytes if memory else np.nan,
  }
  return {
    **{k: float(v) for k, v in found.items()},
    'together': float(sum(found.values()) + found['state']),
    'flops': float(results.costs(setup)['flops_per_step'] or np.nan),
    'steps': float(len(stream.index) * stream.index.shape[1]),
  }


def cell_of(line: Mapping[str, Any]) -> str:
  """The words of the configuration that a line's command names."""
  return line['command'].split('--config=')[1].split()[0].split(':')[-1].strip("'")


if __name__ == '__main__':
  sys.exit(main())
