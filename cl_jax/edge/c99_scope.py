"""C text as nested scopes: a local variable goes to the outermost loop that it does not change in."""

from __future__ import annotations

import re
from collections.abc import Sequence


class Scope:
  """Braces and what is in them.

  Attributes:
    parent: the scope around; None of a function's body.
    header: what stands before the brace.
    names: loop variables and locals that are declared here.
    wall: locals of scopes inside are not moved beyond this one.
    memo: (value, index) -> the local that holds it.
  """

  def __init__(self, parent: Scope | None, header: str = '', names: Sequence[str] = (), wall=False):
    self.parent, self.header, self.wall = parent, header, wall
    self.names = set(names)
    self.items: list[str | Scope] = []
    self.memo: dict = {}
    if parent is not None:
      parent.items.append(self)

  def add(self, *lines: str) -> None:
    self.items.extend(lines)

  def declare(self, name: str, line: str) -> str:
    """A line that declares a name, here."""
    self.names.add(name)
    self.items.append(line)
    return name

  def find(self, key) -> str | None:
    scope: Scope | None = self
    while scope is not None:
      if key in scope.memo:
        return scope.memo[key]
      scope = None if scope.wall else scope.parent
    return None

  def local(self, key, name: str, kind: str, expression: str, index: Sequence[str]) -> str:
    """`const kind name = expression;` as far out as its names allow; accumulators pin it here."""
    words = set(re.findall(r'[A-Za-z]\w*', ' '.join([*index, expression])))
    scope, child = self, None
    if not any(w.startswith('acc') for w in words):
      while not scope.wall and not scope.names & words and scope.parent is not None:
        scope, child = scope.parent, scope
    at = len(scope.items) if child is None else scope.items.index(child)
    scope.items.insert(at, f'const {kind} {name} = {expression};')
    scope.names.add(name)
    scope.memo[key] = name
    return name

  def loops(self, shape: Sequence[int], prefix: str) -> tuple[Scope, list[str]]:
    """A loop for every axis longer than 1; returns the innermost scope and the index."""
    scope, index = self, []
    for k, n in enumerate(shape):
      if n == 1:
        index.append('0')
        continue
      i = f'{prefix}{k}'
      scope = Scope(scope, f'for (int32_t {i} = 0; {i} < {n}; {i}++)', [i])
      index.append(i)
    return scope, index

  def render(self, depth: int) -> list[str]:
    """The lines, indented; nothing where nothing is inside."""
    pad = '  ' * depth
    inner: list[str] = []
    for item in self.items:
      inner += [f'{pad}  {item}'] if isinstance(item, str) else item.render(depth + 1)
    if not inner:
      return []
    head = f'{self.header} ' if self.header else ''
    return [f'{pad}{head}{{', *inner, f'{pad}}}']


def total(*terms: str) -> str:
  """The sum of index expressions, constants folded."""
  constant = sum(int(t) for t in terms if re.fullmatch(r'-?\d+', t))
  rest = [t for t in terms if not re.fullmatch(r'-?\d+', t)]
  if constant or not rest:
    rest.append(str(constant))
  return ' + '.join(rest).replace('+ -', '- ')


def times(i: str, n: int) -> str:
  """An index times a constant."""
  if re.fullmatch(r'-?\d+', i):
    return str(int(i) * n)
  if n == 0:
    return '0'
  simple = re.fullmatch(r'\w+', i)
  return i if n == 1 else f'{i if simple else f"({i})"} * {n}'


def linear(index: Sequence[str], strides: Sequence[int], offset: int = 0) -> str:
  return total(*(times(i, s) for i, s in zip(index, strides, strict=True)), str(offset))
