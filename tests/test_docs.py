"""README and docs: links lead somewhere, every example runs, generated parts are current."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md')])
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def named(page: Path) -> str:
  return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
  return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def anchors(page: Path) -> set[str]:
  """The anchors of a page's headings, as GitHub and mkdocs make them."""
  prose = FENCE.sub('', page.read_text())
  titles = re.findall(r'^#+ (.+)$', prose, re.MULTILINE)
  plain = [re.sub(r'[^\w\s-]', '', title.lower()).strip() for title in titles]
  return {re.sub(r'\s', '-', title) for title in plain}


def python_blocks() -> list:
  return [
    pytest.param(p, id=named(p)) for p in PAGES if blocks(p, 'python') and p.name != 'README.md'
  ]


@pytest.mark.parametrize('page', PAGES, ids=named)
def test_links_lead_somewhere(page):
  links = re.findall(r'\]\(([^)\s]+)\)', FENCE.sub('', page.read_text()))
  broken = []
  for link in links:
    place, _, anchor = link.partition('#')
    if re.match(r'https?://', link):
      continue
    target = (page.parent / place).resolve() if place else page
    if not target.exists() or not target.is_relative_to(ROOT):
      broken.append(link)
    elif anchor and anchor not in anchors(target):
      broken.append(link)
  assert not broken


def test_every_page_of_docs_is_reached_from_the_index():
  reached, todo = set(), [ROOT / 'docs/index.md']
  while todo:
    page = todo.pop()
    if page in reached or page.suffix != '.md':
      continue
    reached.add(page)
    for link in re.findall(r'\]\(([^)#\s]+)', FENCE.sub('', page.read_text())):
      target = (page.parent / link).resolve()
      if target.is_file() and target.is_relative_to(ROOT / 'docs'):
        todo.append(target)
  assert reached == set((ROOT / 'docs').rglob('*.md'))


@pytest.mark.usefixtures('quickly')
@pytest.mark.parametrize('page', python_blocks())
def test_examples_run(page, tmp_path, monkeypatch):
  """The blocks of a page run one after the other, as they would when pasted."""
  monkeypatch.chdir(tmp_path)
  shared = {'__name__': '__main__'}
  for i, text in enumerate(blocks(page, 'python')):
    exec(compile(text, f'{named(page)}, example {i + 1}', 'exec'), shared)


def test_readme_method_is_short_and_runs_in_a_fresh_interpreter(tmp_path):
  text = next(b for b in blocks(ROOT / 'README.md', 'python') if 'return Method(' in b)
  assert len(text.splitlines()) <= 40
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    [sys.executable, '-c', text], cwd=tmp_path, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  *_, naive, method = [
    float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith('coef')
  ]
  assert method > naive


@pytest.mark.parametrize(
  'tool', ['method_table', 'figures', 'study', 'edit', 'device', 'edge', 'compression']
)
def test_generated_parts_are_current(tool):
  command = [sys.executable, '-m', f'tools.{tool}']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_hook_pages_are_those_of_the_code():
  from cl_jax.types import Method

  assert {p.stem for p in (ROOT / 'docs/hooks').glob('*.md')} == set(Method._fields) - {'needs'}


def commands() -> list:
  """Every `python -m MODULE` and `make TARGET` in the prose and the console examples."""
  found = set()
  for page in PAGES:
    text = page.read_text()
    found |= {(named(page), 'module', m) for m in re.findall(r'python -m ([\w.]+)', text)}
    found |= {(named(page), 'target', m) for m in re.findall(r'(?:`|^)make ([a-z]+)', text, re.M)}
  return sorted(found)


@pytest.mark.parametrize('page, kind, name', commands())
def test_commands_exist(page, kind, name):
  if kind == 'target':
    assert re.search(rf'^{name}:', (ROOT / 'Makefile').read_text(), re.MULTILINE)
  elif name.split('.')[0] in ('experiments', 'benchmarks', 'tools', 'cl_jax'):
    place = ROOT.joinpath(*name.split('.'))
    path = place / '__main__.py' if place.is_dir() else place.with_suffix('.py')
    assert path.exists()
    ast.parse(path.read_text())
