"""The other side, in an environment of its own: PyTorch, Avalanche, and the libraries they need.

On AMD processors MKL, which PyTorch's CPU build calls, takes a path of half its speed. `unleashed` puts that
right, so that the comparison is with PyTorch at its best; the rows say where it is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import ROOT, Unavailable

PACKAGES = ('torch==2.13.0', 'torchvision', 'avalanche-lib==0.6.0', 'transformers', 'peft')


def folder() -> Path:
  return Path(os.environ.get('CL_JAX_CACHE', ROOT / '.cache')) / 'bench'


def python(offline: bool = False) -> str:
  """The interpreter of the peers' environment, which is set up first where it is missing.

  Raises:
    Unavailable: it cannot be set up, and why.
  """
  home = folder() / 'peers'
  there = home / 'bin' / 'python'
  stamp = home / 'complete'
  if stamp.exists() and stamp.read_text().split() == list(PACKAGES):
    return str(there)
  if offline:
    raise Unavailable('the peers are not installed, and --offline forbids it')
  print(f'setting up {home}: {" ".join(PACKAGES)} (about 1.5 GB, a few minutes, once)', flush=True)
  try:
    subprocess.run([sys.executable, '-m', 'venv', str(home)], check=True)
    extra = os.environ.get('PIP_ARGS', '').split()
    subprocess.run([there, '-m', 'pip', 'install', '-q', *extra, *PACKAGES], check=True)
  except (subprocess.CalledProcessError, OSError) as error:
    raise Unavailable(f'the peers cannot be installed ({error})') from error
  stamp.write_text('\n'.join(PACKAGES))
  return str(there)


def versions(python: str) -> str:
  """'torch 2.13.0+cpu, avalanche-lib 0.6.0, ...'"""
  names = ['torch', 'avalanche-lib', 'transformers', 'peft']
  code = 'import importlib.metadata as m,sys;print(", ".join(f"{n} {m.version(n)}" for n in sys.argv[1:]))'
  return subprocess.run(
    [python, '-c', code, *names], check=True, capture_output=True, text=True
  ).stdout.strip()


def unleashed() -> dict[str, str]:
  """Environment variables with which MKL uses all of an AMD processor; {} elsewhere.

  MKL asks a function of its own whether the processor is Intel's; a library loaded before it answers yes.
  """
  try:
    amd = 'AuthenticAMD' in Path('/proc/cpuinfo').read_text()
  except OSError:
    return {}
  compiler = shutil.which('cc') or shutil.which('gcc')
  if not amd or compiler is None:
    return {}
  library = folder() / 'mkl_full_speed.so'
  if not library.exists():
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
      code = Path(scratch) / 'answer.c'
      code.write_text('int mkl_serv_intel_cpu_true(void) { return 1; }\n')
      built = Path(scratch) / 'answer.so'
      done = subprocess.run([compiler, '-shared', '-fPIC', '-o', built, code], capture_output=True)
      if done.returncode:
        return {}
      shutil.move(built, library)
  return {'LD_PRELOAD': str(library)}
