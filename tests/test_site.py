"""The site of `make site`: its navigation names what there is, and it is built without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tools import website

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'


def names(node) -> list[str]:
  """The pages of a navigation."""
  if isinstance(node, str):
    return [node]
  below = node.values() if isinstance(node, dict) else node
  return [name for part in below for name in names(part)]


def navigation() -> list:
  return yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav']


def test_navigation_names_every_page_of_docs_and_nothing_that_is_not_there():
  found = names(navigation())
  pages = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob('*.md')}
  assert len(found) == len(set(found)) and pages <= set(found)
  assert set(found) - pages <= {website.uri(p) for p in website.outside()}


def test_index_has_the_kinds_and_pages_of_the_navigation():
  text = (DOCS / 'index.md').read_text()
  kinds = {k: v for part in navigation() if isinstance(part, dict) for k, v in part.items()}
  assert re.findall('^## (.*)', text, re.MULTILINE) == list(kinds)
  linked = {website.uri(p) for p in website.linked(DOCS / 'index.md')}
  assert set(names(list(kinds.values()))) <= linked


def test_a_notebook_becomes_prose_and_code():
  text = '# ---\n# x: y\n# ---\n\n# %% [markdown]\n# # Title\n#\n# prose\n\n# %%\na = 1  # why\n'
  assert website.notebook(text) == '# Title\n\nprose\n\n```python\na = 1  # why\n```\n'


@pytest.mark.long
def test_site_is_built_without_a_warning(tmp_path):
  pytest.importorskip('mkdocs', reason="the site needs: pip install 'cl_jax[docs]'")
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path)]
  environment = {**os.environ, 'NO_MKDOCS_2_WARNING': '1'}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  page = lambda name: (tmp_path / name / 'index.html').read_text()  # noqa: E731
  # Links out of docs/ lead to pages made of the files.
  assert 'href="../reference/cl_jax/types/"' in page('house')
  assert 'href="configs/common.py/"' in page('.')
  assert 'One run per seed, all in one mapped program.' in page('configs/common.py')
  assert 'href="../docs/hooks/mix' not in page('CONTRIBUTING')
  assert 'href="../hooks/mix/"' in page('CONTRIBUTING')
  # The reference has the docstrings, asterisks and all.
  assert 'theta*_k,i)^2' in page('reference/cl_jax/methods/regularisation/ewc')
  assert '(theta_i - theta*_i)^2' in page('reference/cl_jax/methods/regularisation/mas')
  assert {website.uri(p).removesuffix('.md') for p in website.modules()} <= {
    p.relative_to(tmp_path).as_posix().removesuffix('/index.html') + suffix
    for p in tmp_path.rglob('index.html')
    for suffix in ('', '/index')
  }
  # Nothing is loaded from elsewhere.
  assert not re.search(
    r'<(?:script|img)[^>]*src="https?:|<link[^>]*stylesheet[^>]*https?:', page('.')
  )
