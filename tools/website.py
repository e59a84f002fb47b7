"""Hooks of mkdocs for `make site`: the files of the repository that docs/ links to are on the site as well.

Pages of docs/ link to files beside docs/ (`../cl_jax/types.py`), so that they can be read in the
repository. On the site such a link leads to a page made of that file: for a module of cl_jax the reference,
which mkdocstrings makes of its docstrings; for Markdown and notebooks their text; for other Python its code.
Files of another kind are copied. Pages of Markdown and notebooks may link on. mkdocs then checks the links
as it does all others.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
LINK = re.compile(r'(\]\()([^)\s#:]+)(?=[)#])')
FENCE = re.compile(r'^```.*?^```$', re.MULTILINE | re.DOTALL)


def modules() -> list[Path]:
  return sorted((ROOT / 'cl_jax').rglob('*.py'))


def uri(path: Path) -> str:
  """The name on the site of a file of the repository."""
  if path.is_relative_to(DOCS):
    return path.relative_to(DOCS).as_posix()
  place = path.relative_to(ROOT)
  if place.parts[0] == 'cl_jax' and path.suffix == '.py':
    stem = 'index' if path.stem == '__init__' else path.stem
    return f'reference/{place.with_name(stem).as_posix()}.md'
  return f'{place.as_posix()}.md' if path.suffix == '.py' else place.as_posix()


def prose(path: Path) -> bool:
  """Whether a file is text with links: Markdown, or a notebook."""
  return path.suffix == '.md' or path.parent == ROOT / 'notebooks'


def linked(path: Path) -> list[Path]:
  """The files of the repository that a page links to."""
  text = FENCE.sub('', path.read_text())
  targets = [(path.parent / place).resolve() for _, place in LINK.findall(text)]
  return [t for t in targets if t.is_file() and t.is_relative_to(ROOT)]


def outside() -> list[Path]:
  """What is on the site beside docs/ and the modules: the notebooks, and whatever is linked to."""
  todo = [*DOCS.rglob('*.md'), *(ROOT / 'notebooks').glob('*.py')]
  found: set[Path] = set()
  while todo:
    path = todo.pop()
    if path not in found:
      found.add(path)
      todo += linked(path) if prose(path) else []
  return sorted(p for p in found - set(modules()) if not p.is_relative_to(DOCS))


@functools.cache
def sources() -> dict[str, Path]:
  """{name on the site: page of Markdown or notebook}."""
  return {uri(p): p for p in (*DOCS.rglob('*.md'), *outside()) if prose(p)}


def content(path: Path) -> str:
  """The Markdown of a file that is not in docs/."""
  if path.suffix == '.md':
    return path.read_text()
  place = path.relative_to(ROOT)
  if place.parts[0] == 'cl_jax':
    name = '.'.join(place.with_suffix('').parts).removesuffix('.__init__')
    return f'# {name}\n\n::: {name}\n'
  if place.parts[0] == 'notebooks':
    return notebook(path.read_text())
  return f'# {place}\n\n````python\n{path.read_text()}````\n'


def notebook(text: str) -> str:
  """The cells of a notebook in jupytext's percent format: prose, and blocks of Python."""
  parts = []
  for cell in re.split(r'^# %% *', text, flags=re.MULTILINE)[1:]:
    kind, _, body = cell.partition('\n')
    if kind == '[markdown]':
      parts.append(re.sub(r'^# ?', '', body, flags=re.MULTILINE).strip())
    else:
      parts.append(f'```python\n{body.strip()}\n```')
  return '\n\n'.join(parts) + '\n'


def tree(paths: list[Path]) -> list[Any]:
  """The modules as an entry of the navigation, packages as sections."""
  nested: dict[str, Any] = {}
  for path in paths:
    node = nested
    for part in path.relative_to(ROOT).parts[:-1]:
      node = node.setdefault(part, {})
    node[path.stem] = uri(path)

  def entry(name: str, node: Any) -> Any:
    if isinstance(node, str):
      return node if name == '__init__' else {name: node}
    first = [node['__init__']] if '__init__' in node else []
    return {name: first + [entry(k, v) for k, v in sorted(node.items()) if k != '__init__']}

  return [entry(name, node) for name, node in nested.items()]


# What mkdocs calls.


def on_config(config: Any) -> Any:
  sources.cache_clear()  # mkdocs serve builds again and again
  section = next(e['Reference'] for e in config.nav if isinstance(e, dict) and 'Reference' in e)
  section += tree(modules())
  return config


def on_files(files: Any, config: Any) -> Any:
  from mkdocs.structure.files import File, InclusionLevel  # pyright: ignore[reportMissingImports]

  for path in (*outside(), *modules()):
    page = path.suffix in ('.md', '.py')
    what = {'content': content(path)} if page else {'abs_src_path': str(path)}
    made: Any = File.generated(config, uri(path), **what, inclusion=InclusionLevel.NOT_IN_NAV)
    files.append(made)
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
  """Links that are right in the repository become those that are right on the site."""
  here = sources().get(page.file.src_uri)
  if here is None:
    return markdown

  def moved(link: re.Match[str]) -> str:
    target = (here.parent / link[2]).resolve()
    if not target.is_file() or not target.is_relative_to(ROOT):
      return link[0]
    return link[1] + os.path.relpath(uri(target), Path(page.file.src_uri).parent)

  return LINK.sub(moved, markdown)
