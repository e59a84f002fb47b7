"""Licences: every shipped datum has its entry in NOTICE, every dependency a licence from a list.

`python -m tools.licences` prints what is wrong and exits 1, or says how much it checked.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

# Permissive licences, and MPL-2.0, whose obligations end at its own files. SPDX identifiers.
ALLOWED = set(
  """0BSD Apache-2.0 BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 CNRI-Python HPND ISC LLVM-exception MIT
  MIT-0 MIT-CMU MPL-2.0 PSF-2.0 Python-2.0 Unlicense Zlib""".split()
)
# Packages from before SPDX expressions: the first of these found in the classifier or licence field.
WORDS = (
  (r'\b(A|L)?GPL|GNU|proprietary|non-?commercial', ''),
  (r'Apache', 'Apache-2.0'),
  (r'MPL|Mozilla', 'MPL-2.0'),
  (r'\bMIT\b', 'MIT'),
  (r'BSD|Redistribution and use in source and binary forms', 'BSD-3-Clause'),
  (r'Python Software Foundation|\bPSF', 'PSF-2.0'),
  (r'\bISC\b', 'ISC'),
  (r'Unlicense|public domain', 'Unlicense'),
  (r'HPND|Historical Permission', 'HPND'),
)
# A CUDA build of torch, which only the parity tests use, brings these; nothing of ours needs them.
EXEMPT = re.compile(r'(nvidia|cuda|cudnn|triton)\b')


def of_package(dist: Distribution) -> str:
  """The licence as an SPDX expression, or what the package says where that is no known licence."""
  if expression := dist.metadata.get('License-Expression'):
    return expression
  classifiers = [c for c in dist.metadata.get_all('Classifier') or () if c.startswith('License ::')]
  said = [c.rpartition(' :: ')[2] for c in classifiers if c != 'License :: OSI Approved']
  text = ' '.join(said) or dist.metadata.get('License') or 'no licence stated'
  if all(word in ALLOWED for word in re.split(r'\s+(?:AND|OR)\s+', text)):
    return text
  return next((spdx for words, spdx in WORDS if re.search(words, text)), '') or text[:60]


def permitted(expression: str) -> bool:
  """Whether an SPDX expression can be met with allowed licences only; AND binds closer than OR, as there."""
  words = [*re.findall(r'[()]|[^\s()]+', expression), '']  # '' is the end

  def either() -> bool:
    found = both()
    while words[0] == 'OR':
      words.pop(0)
      found |= both()  # always read on
    return found

  def both() -> bool:
    found = one()
    while words[0] in ('AND', 'WITH'):
      words.pop(0)
      found &= one()
    return found

  def one() -> bool:
    if (word := words.pop(0)) in ('', ')', 'OR', 'AND', 'WITH'):
      raise ValueError(f'no SPDX expression: {expression}')
    if word != '(':
      return word in ALLOWED
    found = either()
    if words.pop(0) != ')':
      raise ValueError(f'no SPDX expression: {expression}')
    return found

  try:
    return either() and words == ['']
  except (ValueError, IndexError):
    return False


def packages(root: str) -> tuple[dict[str, str], set[str]]:
  """({package: licence} of everything that `root` and its extras lead to, what is not installed)."""
  found: dict[str, str] = {}
  absent: set[str] = set()
  todo = [(root, frozenset(distribution(root).metadata.get_all('Provides-Extra') or ()))]
  done = set()
  while todo:
    name, extras = todo.pop()
    if (name, extras) in done:
      continue
    done.add((name, extras))
    try:
      dist = distribution(name)
    except PackageNotFoundError:
      absent.add(name)
      continue
    found[name] = of_package(dist)
    for line in dist.requires or ():
      need = Requirement(line)
      if need.marker is None or any(need.marker.evaluate({'extra': e}) for e in ('', *extras)):
        todo.append((canonicalize_name(need.name), frozenset(need.extras)))
  return found, absent


def data(folder: Path, notice: str) -> list[str]:
  """What is wrong with the attribution of the files in `folder`."""
  sections = re.split(r'^-{20,}$', notice, flags=re.MULTILINE)
  wrong = []
  for path in sorted(folder.rglob('*')):
    if path.suffix in ('.py', '.pyc') or not path.is_file():
      continue
    own = [s for s in sections if re.search(rf'(?<![\w.]){re.escape(path.name)}(?![\w.])', s)]
    text = ''.join(own)
    lacks = [
      what
      for what, words in (('the source', r'https?://'), ('the licence', r'[Ll]icen[sc]e|Creative'))
      if not re.search(words, text)
    ]
    if lacks:
      wrong.append(f'{path.name}: NOTICE does not name {" and ".join(lacks)}')
  return wrong


def main() -> int:
  wrong = data(ROOT / 'cl_jax/data', (ROOT / 'NOTICE').read_text())
  found, absent = packages('cl-jax')
  wrong += [
    f'{name}: licence {licence!r} is not in the list of tools/licences.py'
    for name, licence in sorted(found.items())
    if not permitted(licence) and not EXEMPT.match(name)
  ]
  print(*wrong, sep='\n', file=sys.stderr, end='\n' if wrong else '')
  print(f'licences: {len(found)} packages checked, not installed here: {", ".join(sorted(absent))}')
  return bool(wrong)


if __name__ == '__main__':
  sys.exit(main())
