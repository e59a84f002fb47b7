"""The package as a user meets it: what importing it brings along, and what it offers."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import cl_jax

# Third-party packages that `import cl_jax` may bring along: jax, flax, optax and what those import.
PROBE = """
import sys
import jax, flax, optax
before = {name.partition('.')[0] for name in sys.modules}
import cl_jax
after = {name.partition('.')[0] for name in sys.modules}
print(*sorted(after - before - set(sys.stdlib_module_names) - {'cl_jax'}))
"""
EXTRAS = (
  'orbax tensorflow_datasets array_record grain ml_collections matplotlib rich tokenizers '
  'safetensors torch transformers submitit tensorboardX wandb'
).split()


def test_import_brings_no_other_library():
  done = subprocess.run([sys.executable, '-c', PROBE], capture_output=True, text=True, check=True)
  assert done.stdout.split() == []


def test_import_works_without_any_extra():
  block = f'import sys; sys.modules.update(dict.fromkeys({EXTRAS})); import cl_jax; cl_jax.run'
  subprocess.run([sys.executable, '-W', 'ignore', '-c', block], check=True)


def test_public_names_are_there_and_sorted():
  assert cl_jax.__all__ == sorted(cl_jax.__all__)
  assert all(hasattr(cl_jax, name) for name in cl_jax.__all__)


def test_every_shipped_file_is_package_data():
  root = Path(cl_jax.__file__).parent.parent
  setup = configparser.ConfigParser()
  setup.read(root / 'setup.cfg')
  folder = root / 'cl_jax/data'
  patterns = setup['options.package_data']['cl_jax.data'].split(', ')
  matched = {path for pattern in patterns for path in folder.glob(pattern)}
  assert matched == {p for p in folder.iterdir() if p.is_file() and p.suffix != '.py'}
