"""Published tables again: `python -m experiments.reproduce [--only PATTERN] [--seeds N]`.

Every row of a table is a study of its own: N seeds in one compiled program (of a row that takes hours, as
many as there are devices). What a seed gave is one line of `results/published/<table>.jsonl`; seeds that are
there are not run again, so the command resumes where it was stopped. `results/published.csv` is drawn from
those lines alone.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import json
import os
import platform
import sys
import time
from pathlib import Path

import jax
import numpy as np

from cl_jax import durable, metrics
from cl_jax.errors import Fault, UserError
from cl_jax.loop import run
from cl_jax.streams.take import put
from cl_jax.sweep import MAPPED, map_runs, stack_streams
from experiments import cli, workdir
from experiments.published import (
  permuted_mnist,
  split_cifar10,
  split_fashion,
  split_mnist,
  tiny_memories,
)
from experiments.published.table import Row

COLUMNS = (
  'table', 'dataset', 'scenario', 'method', 'setting', 'needs', 'metric', 'published', 'published_err',
  'ours', 'ours_ci95', 'seeds', 'command', 'note',
)  # fmt: skip
PROGRAM = 'experiments.reproduce'
SEEDS = 5


def learn(row: Row, seeds: list[int], data_dir: str | None) -> list[dict]:
  """One result per seed: R, start, loss at the ends; all seeds in one program over all devices."""
  streams = [row.stream(seed, data_dir) for seed in seeds]
  stream, axes = stack_streams(streams)
  keys = jax.numpy.stack([jax.random.key(seed) for seed in seeds])

  def one(key, stream):
    state, record = run(row.build, None, key, stream)
    del state
    legs, steps = record.loss.shape
    last = jax.numpy.full(legs, steps) if stream.steps is None else stream.steps
    return record.start, record.R, record.loss[jax.numpy.arange(legs), last - 1]

  begin = time.perf_counter()
  used = min(len(seeds), len(jax.devices()))
  program = jax.jit(map_runs(one, (MAPPED, axes), len(seeds), devices=jax.devices()[:used]))
  start, R, loss = jax.block_until_ready(program(keys, put(stream)))
  seconds = time.perf_counter() - begin
  results = []
  for i, seed in enumerate(seeds):
    if not np.isfinite(R[i]).all() or not np.isfinite(loss[i]).all():
      raise Fault(f'{row.name}: seed {seed} gave a loss that is not finite; nothing was stored')
    results.append(
      {
        'row': row.name,
        'seed': seed,
        'R': np.asarray(R[i]).round(6).tolist(),
        'start': np.asarray(start[i]).round(6).tolist(),
        'loss': np.asarray(loss[i]).round(6).tolist(),
        'wall_s_of_all_seeds': round(seconds, 1),
        'seeds_together': len(seeds),
        'device': f'{platform.machine()} {jax.devices()[0].device_kind} x {used}',
        'versions': {'jax': jax.__version__, 'numpy': np.__version__},
        'date': datetime.date.today().isoformat(),
      }
    )
  return results


def read(path: Path) -> list[dict]:
  """The lines of a results file; a line that a killed process left half written is dropped."""
  lines = []
  if path.exists():
    for text in path.read_text().splitlines():
      try:
        lines.append(json.loads(text))
      except ValueError:
        print(f'{path}: an incomplete line is ignored', file=sys.stderr)
  return lines


def append(path: Path, lines: list[dict]) -> None:
  """Replaces the file by one that has these lines too."""
  path.parent.mkdir(parents=True, exist_ok=True)
  durable.write(path, ''.join(json.dumps(line) + '\n' for line in [*read(path), *lines]))


def seconds_of_a_seed(lines: list[dict]) -> float | None:
  """Wall seconds on the machine that wrote these lines, compilation included; None without a line."""
  each = [r['wall_s_of_all_seeds'] / r['seeds_together'] for r in lines if 'seeds_together' in r]
  return float(np.mean(each)) if each else None


def table_rows(rows: list[Row], out: Path, command: str) -> list[dict]:
  """The rows of published.csv; a row that was not run has empty figures of ours."""
  lines = []
  for row in rows:
    needs = sorted(row.needs)
    runs = row.own(read(out / f'{row.table}.jsonl'))
    for figure in row.figures:
      values = [metrics.summary(r['R'], r['start'])[figure.metric] for r in runs]
      mean, ci = metrics.interval(np.array(values) * figure.scale) if values else (None, None)
      digits = 1 if figure.scale == 100 else 3
      show = lambda v, d=digits: '' if v is None else f'{v:.{d}f}'  # noqa: E731
      note = row.note if values else '; '.join(filter(None, (row.note, 'not run')))
      cells = (
        row.table, row.dataset, row.scenario, row.method, row.setting, ' '.join(needs), figure.metric,
        '' if figure.value is None else figure.value, '' if figure.err is None else figure.err,
        show(mean), show(ci), len(values), f'{command}{seeds_of(values)} --only={row.name}', note,
      )  # fmt: skip
      lines.append(dict(zip(COLUMNS, cells, strict=True)))
  return lines


def seeds_of(values: list) -> str:
  """The option that asks for as many seeds as there are values."""
  return f' --seeds={len(values)}' if len(values) not in (0, SEEDS) else ''


def write_csv(path: Path, lines: list[dict]) -> None:
  part = path.with_suffix(f'.{os.getpid()}.part')
  with part.open('w', newline='') as f:
    writer = csv.DictWriter(f, COLUMNS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
  part.replace(path)


def all_rows() -> list[Row]:
  return [
    *split_mnist.rows(),
    *tiny_memories.rows(),
    *permuted_mnist.rows(),
    *split_fashion.rows(),
    *split_cifar10.rows(),
  ]


def main(argv: list[str] | None = None) -> int:
  parser = cli.parser(PROGRAM, __doc__)
  parser.add_argument(
    '--only', default='*', help='rows whose name matches, e.g. "split_mnist/class/*"'
  )
  parser.add_argument('--seeds', type=int, default=SEEDS, help=f'seeds per row ({SEEDS})')
  parser.add_argument('--all', action='store_true', help='also rows that take hours')
  listed = 'print the rows, how many seeds are done, and about how long the others take'
  parser.add_argument('--list', action='store_true', help=listed)
  parser.add_argument('--data_dir', help='parent of tfds/; default: the variable CL_JAX_DATA')
  parser.add_argument('--out', type=Path, default=Path('results'), help='(results)')
  return cli.guarded(PROGRAM, lambda words: command(parser.parse_args(words)), argv)


def command(args: argparse.Namespace) -> int:
  if args.seeds < 1:
    raise UserError(f'--seeds must be at least 1; got {args.seeds}')
  if args.list:
    return reproduce(args)
  with workdir.claimed(args.out / 'published'):
    return reproduce(args)


def reproduce(args: argparse.Namespace) -> int:
  everything = all_rows()
  pattern = args.only if any(c in args.only for c in '*?[') else f'*{args.only}*'
  rows = [r for r in everything if fnmatch.fnmatch(r.name, pattern)]
  if not rows:
    raise UserError(f'--only={args.only} matches no row; --list shows them')
  store = args.out / 'published'
  wanted = list(range(args.seeds))
  todo = []
  for row in rows:
    lines = row.own(read(store / f'{row.table}.jsonl'))
    done = {r['seed'] for r in lines}
    missing = [s for s in wanted if s not in done]
    skip = row.slow and not (args.all or args.only == row.name)
    if args.list:
      took = seconds_of_a_seed(lines)
      time_of = f', about {took * len(missing):.0f} s to go' if took and missing else ''
      print(f'{row.name}: {len(done)} seeds done{time_of}{", slow" if row.slow else ""}')
    elif missing and skip:
      print(f'{row.name}: left out, it takes hours; --all or --only={row.name} runs it')
    elif missing:
      # A row that takes hours is kept after every few seeds, as many as there are devices.
      most = len(jax.devices()) if row.slow else len(missing)
      todo += [(row, missing[i : i + most]) for i in range(0, len(missing), most)]
  if args.list:
    return 0
  data_dir = args.data_dir or os.environ.get('CL_JAX_DATA')
  faults = []
  for i, (row, missing) in enumerate(todo):
    print(f'[{i + 1}/{len(todo)}] {row.name}, seeds {missing} ...', flush=True)
    begin = time.perf_counter()
    try:
      results = learn(row, missing, data_dir)
    except Fault as fault:  # one row's trouble is not the others'
      print(f'    stopped: {fault}', file=sys.stderr, flush=True)
      faults.append(str(fault))
      continue
    append(store / f'{row.table}.jsonl', results)
    acc = [metrics.accuracy(r['R']) * 100 for r in results]
    seconds = time.perf_counter() - begin
    first = next((f for f in row.figures if f.metric == 'acc'), None)
    paper = f'paper {first.value}' if first and first.value is not None else 'not in the paper'
    print(f'    acc {np.mean(acc):.2f} ({paper}), {seconds:.0f} s', flush=True)
    write_csv(args.out / 'published.csv', table_rows(everything, store, f'python -m {PROGRAM}'))
  write_csv(args.out / 'published.csv', table_rows(everything, store, f'python -m {PROGRAM}'))
  print(f'{args.out / "published.csv"}: {len(everything)} rows')
  if faults:
    raise Fault('; '.join(faults))
  return 0


if __name__ == '__main__':
  jax.config.update('jax_num_cpu_devices', os.cpu_count() or 1)  # before jax looks for devices
  sys.exit(main())
