"""The main job: does a foundation model forget? `python -m experiments.demo [--workdir DIR] [--quick]`

all-MiniLM-L6-v2 learns the 150 intents of CLINC150 domain by domain (configs/demo.py). Every method is a
process of its own in DIR/METHOD, as many at a time as there are cores, the cheap ones first. Repeat the
command after Ctrl-C or a crash, or with more --seeds: what is finished is not run again. DIR gets
results.jsonl of all methods, table.md, report.html and figures/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_jax import durable, report
from cl_jax.errors import UserError
from cl_jax.models import pretrained
from configs import demo as study
from experiments import cli, probe, results, run, show, workdir
from experiments.answer import answer
from experiments.config import tuples
from experiments.options import parse
from experiments.pool import Work, default_workers, processes

PROGRAM = 'experiments.demo'


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
  add('--workdir', metavar='DIR', type=Path, help='runs/demo, or runs/demo-quick with --quick')
  add('--quick', action='store_true', help='few sentences: whether it works, not how well')
  add('--only', default='', metavar='A,B', help=f'some of {", ".join(study.METHODS)}')
  add('--seeds', type=int, default=1, help='of the methods that train the network (1)')
  add('--workers', type=int, help='processes at a time (one a core; one with an accelerator)')
  add('--model', default=study.MODEL, help='or a directory with another BERT encoder')
  options = parser.parse_args(argv)
  folder = options.workdir or Path('runs/demo-quick' if options.quick else 'runs/demo')
  try:
    return demo(plan(options, folder), folder, options.workers or default_workers(), options.quick)
  except UserError as error:
    print(f'{PROGRAM}: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:  # before the first run began or after the last one ended
    print(f'{PROGRAM}: stopped; the same command goes on from here', file=sys.stderr)
    return 130
  except OSError as error:
    print(f'{PROGRAM}: {error.filename or folder}: {error.strerror or error}', file=sys.stderr)
    return 2


def one(argv: list[str]) -> int:
  """experiments.run without the report, which is made once, of all of them; then the probe."""
  options = parse(argv, run.PROGRAM, run.ABOUT)
  shown = show.make()
  with workdir.claimed(options.workdir) as place:
    workdir.remember(place, options.config)
    run.run(options, place, shown)
    if probed(options.config):
      probe.probe(options.config, place, shown.say)
  return 0


def probed(config: Mapping[str, Any]) -> bool:
  """Whether the features are looked at after the run: of fine-tuning, domain after domain."""
  return not config['methods'] and config['scenario'] == 'class'


def finished(w: Work) -> bool:
  """Whether nothing of it is left to do, the probe included."""
  config = parse([*w.argv], run.PROGRAM, run.ABOUT).config
  return w.finished() and (not probed(config) or (w.folder / probe.FILE).exists())


def plan(options: argparse.Namespace, folder: Path) -> list[Work]:
  """The processes in the order in which they are started.

  Raises:
    UserError: an unknown method, a number out of range, or weights that are not on this machine.
  """
  chosen = [name for name in options.only.split(',') if name] or [*study.METHODS]
  for name in chosen:
    if name not in study.METHODS:
      raise UserError(f'--only: there is no {name!r} here, but {", ".join(study.METHODS)}')
  if options.seeds < 1 or (options.workers is not None and options.workers < 1):
    raise UserError('--seeds and --workers must be at least 1')
  pretrained.find(options.model)
  trained = [m for m in study.METHODS if m in study.TRAINED]
  parts = [(m, (0,) if m in study.TRAINED else study.CLOSED_SEEDS) for m in study.METHODS]
  parts += [(m, (seed,)) for seed in range(1, options.seeds) for m in trained]
  work = []
  for method, seeds in parts:
    if method in chosen:
      name = f'{method}-{seeds[0]}' if method in trained else method
      words = f'quick,{method}' if options.quick else method
      argv = (
        f'--config={os.path.relpath(study.__file__)}:{words}',
        f'--config.seeds={",".join(map(str, seeds))}',
        *([f'--config.model.pretrained={options.model}'] if options.model != study.MODEL else ()),
        f'--workdir={folder / name}',
      )
      work.append(Work(name, seeds, folder / name, argv))
  return work


def demo(work: list[Work], folder: Path, workers: int, quick: bool) -> int:
  """Runs what is not finished, and reports on all of it."""
  begin = time.monotonic()

  def say(line: str) -> None:
    print(f'{show.clock(time.monotonic() - begin):>6}  {line}', flush=True)

  folder.mkdir(parents=True, exist_ok=True)
  gathered(work, folder)  # what cannot go together is refused before anything runs
  todo = [w for w in work if not finished(w)]
  print(f'Does a foundation model forget? {len(todo)} of {len(work)} runs to do, into {folder}')
  for w in work:
    if w not in todo:
      say(f'{w.name}: {outcome(w)} (done before)')
  failed = {}
  with processes(todo, (sys.executable, '-m', PROGRAM, '--run'), workers, say) as ended:
    try:
      for w, code in ended:
        failed |= {w.name: code} if code else {}
        say(f'{w.name}: {f"failed, {w.last_words()}" if code else outcome(w)}')
    except KeyboardInterrupt:
      print('stopping: every run saves its state first', file=sys.stderr, flush=True)
      stopped = True
    else:
      stopped = False
  if stopped:
    print(f'{PROGRAM}: stopped; the same command goes on from here', file=sys.stderr)
    return 130
  if lines := gathered(work, folder):
    finish(lines, folder, quick, say)
  return max(failed.values(), default=0)


def gathered(work: Sequence[Work], folder: Path) -> list[dict[str, Any]]:
  """The lines of all methods and seeds that are there, those that were not asked for now included.

  Raises:
    UserError: some are of other sentences or of another network.
  """
  own = parse([*work[0].argv], run.PROGRAM, run.ABOUT).config
  unfinished, found = [w.folder for w in work if not w.finished()], []
  for place in sorted(p for p in folder.iterdir() if p.is_dir()):
    lines = results.read(place)
    if any(tuples(line['config'][k]) != own[k] for line in lines for k in ('data', 'model')):
      raise UserError(
        f'{place} has results with another --quick or --model: name another --workdir'
      )
    found += [] if place in unfinished else lines
  return found


def finish(
  lines: list[dict[str, Any]], folder: Path, quick: bool, say: Callable[[str], None]
) -> None:
  """results.jsonl, report.html, figures and table.md of all methods; prints the table."""
  durable.write(folder / results.FILE, ''.join(json.dumps(line) + '\n' for line in lines))
  page = report.write(folder)
  plain, markdown = answer(folder, quick)
  durable.write(folder / 'table.md', markdown)
  print(f'\n{plain}\n')
  say(f'report: {page}, figures in {folder / "figures"}, table in {folder / "table.md"}')


def outcome(w: Work) -> str:
  """'accuracy 91.2 ± 0.5 %, forgetting 2.0 ± 0.3 %, 12 s a run'."""
  from cl_jax.report.tables import NONE, percent

  lines = results.read(w.folder)
  acc, fell = percent([line['acc'] for line in lines]), NONE
  if all(line['forgetting'] is not None for line in lines):
    fell = percent([line['forgetting'] for line in lines])
  seconds = sum(line['wall_s'] for line in lines) / len(lines)
  return f'accuracy {acc} %, forgetting {fell} %, {seconds:.0f} s a run'


if __name__ == '__main__':
  sys.exit(main())
