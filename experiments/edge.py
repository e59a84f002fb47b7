"""Exports and verifies a list of learners: `python -m experiments.edge [--only=PATTERNS] [--workdir=DIR]`.

The list is CELLS of configs/edge.py. Every learner goes to DIR/NAME for every target whose tools are
installed, and its rows into DIR/edge.csv. With --install, what is missing of the cross compilers and
emulators is installed by apt-get first, when that is possible.

With --backend=iree (extra "edge") the learners become modules of IREE, their rows go into DIR/edge_iree.csv,
and --install fetches IREE's runtime for aarch64 by pip.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cl_jax.edge import artefact, iree_compile, iree_device, ram, targets
from cl_jax.errors import Fault, UserError
from experiments import cli, config, export, export_iree, study, verify, verify_iree

PROGRAM = 'experiments.edge'


def main(argv: Sequence[str] | None = None) -> int:
  parser = cli.parser(PROGRAM, __doc__)
  add = parser.add_argument
  add('--config', default='configs/edge.py', metavar='FILE', help='with CELLS, a list of words')
  add('--only', default='*', metavar='PATTERNS', help="of the list, as in 'er* *hat'")
  add('--workdir', type=Path, default=Path('runs/edge'), metavar='DIR', help='(runs/edge)')
  add('--backend', choices=('c99', 'iree'), default='c99', help='(c99)')
  add('--target', '--targets', action='append', metavar='NAMES', help='(all)')
  add('--steps', type=int, default=50, help='to compare (50)')
  add('--write', type=Path, metavar='FILE', nargs='?', const=Path(),
      help='rows into FILE (results/edge.csv, results/edge_iree.csv), not DIR')  # fmt: skip
  add('--install', action='store_true', help='missing Debian packages, as root')
  add('--data_dir', metavar='DIR', help='where data sets are (default: CL_JAX_DATA)')
  argv = sys.argv[1:] if argv is None else list(argv)
  return cli.guarded(PROGRAM, lambda words: command(parser, words), argv)


def command(parser: argparse.ArgumentParser, argv: list[str]) -> int:
  given = parser.parse_args(argv)
  iree = given.backend == iree_compile.BACKEND
  machines = iree_compile.find(given.target or list(iree_compile.MACHINES)) if iree else []
  wanted = [] if iree else targets.find(given.target or list(targets.TARGETS))
  name = 'edge_iree.csv' if iree else 'edge.csv'
  rows = given.write or given.workdir / name
  if given.write == Path():
    rows = Path('results') / name
  if given.install and iree:
    iree_device.install()
  elif given.install:
    install(wanted)
  module, path, _ = study.found(given.config)
  chosen = study.chosen(module, given.only)
  cli.devices(1)
  failed = []
  for cell in chosen:
    folder = given.workdir / cell.replace(',', '-')
    try:
      resolved = config.resolve(config.load(f'{path}:{cell}'))
      budget = {'ram': None, 'flash': None, 'stack': ram.STACK}
      if iree:
        export_iree.write(resolved, machines, budget, folder, given.data_dir)
        read = artefact.read(folder)
        verify_iree.run(read, machines, given.steps, rows, True, given.data_dir)
        continue
      export.export(resolved, wanted, budget, folder, given.data_dir)
      read = artefact.read(folder)
      verify.verify(read, wanted, given.steps, rows, True, given.data_dir)
    except (UserError, Fault) as error:
      failed.append(cell)
      print(f'{cell}: {error}', file=sys.stderr, flush=True)
  if failed:
    raise Fault(f'{len(failed)} of {len(chosen)} learners failed: {", ".join(failed)}')
  return 0


def install(wanted: Sequence[targets.Target]) -> None:
  """Installs the packages of what is missing where that is possible, and says so or what to do."""
  missing = [t for t in wanted if targets.absent(t)]
  packages = sorted({p for t in missing for p in t.packages})
  if not packages:
    return
  if os.geteuid() or not shutil.which('apt-get'):
    print(f'not installed, so some targets are left out; Debian: apt install {" ".join(packages)}')
    return
  print(f'apt-get install {" ".join(packages)} (cross compilers and emulators, once)', flush=True)
  for words in (['update'], ['install', '-y', '--no-install-recommends', *packages]):
    done = subprocess.run(['apt-get', '-qq', *words], capture_output=True, text=True)
    if done.returncode:
      print(f'apt-get {words[0]} failed: {done.stderr.strip()[:200]}; some targets are left out')
      return


if __name__ == '__main__':
  sys.exit(main())
