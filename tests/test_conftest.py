"""A skipped test is a failure where CL_JAX_REQUIRE_DATA says so: CI cannot pass by skipping."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = """
import pytest

def test_of_data(data_dir):
  pass

def test_of_the_machine():
  pytest.skip('needs a GPU')

@pytest.mark.skipif(True, reason='needs a library')
def test_of_a_library():
  pass

@pytest.mark.xfail(reason='known')
def test_known():
  raise ValueError
"""
MODULE = "import pytest\npytest.importorskip('no_such_library', reason='needs a library')\n"


@pytest.mark.parametrize('require', ['', '1'])
def test_skips(tmp_path, require):
  (tmp_path / 'test_sample.py').write_text(SAMPLE)
  (tmp_path / 'test_module.py').write_text(MODULE)
  environment = {k: v for k, v in os.environ.items() if k != 'CL_JAX_DATA'}
  environment |= {'CL_JAX_REQUIRE_DATA': require, 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-m', 'pytest', '-q', '-p', 'tests.conftest', '-p', 'no:cacheprovider']
  done = subprocess.run(
    [*command, '--rootdir', str(tmp_path), '--continue-on-collection-errors', str(tmp_path)],
    cwd=tmp_path,
    env=environment,
    capture_output=True,
    text=True,
  )
  summary = done.stdout.splitlines()[-1]
  if require:
    assert done.returncode == 1
    assert '1 skipped, 1 xfailed, 3 errors' in summary, done.stdout
  else:
    assert done.returncode == 0
    assert '4 skipped, 1 xfailed' in summary, done.stdout
