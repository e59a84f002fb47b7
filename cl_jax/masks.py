"""Parts of a parameter tree, chosen by path patterns that must cover every leaf."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from cl_jax.errors import UserError
from cl_jax.types import Tree


def paths(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """The leaves of nested dicts by path, as in 'backbone/layers/query/w', in sorted order."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return {path_name(path): leaf for path, leaf in flat}


def path_name(path) -> str:
  """'a/b/0' for a key path of jax.tree_util."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def nest(leaves: Mapping[str, Any]) -> Tree:
  """The nested dicts whose leaves by path are `leaves`: the inverse of `paths`."""
  tree: dict = {}
  for path, leaf in leaves.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def matches(pattern: str, name: str) -> bool:
  """Whether a regular expression matches the whole of a name.

  Raises:
    UserError: it is no regular expression.
  """
  try:
    return re.fullmatch(pattern, name) is not None
  except re.error as error:
    raise UserError(f'pattern {pattern!r} is no regular expression: {error}') from error


def mark(
  tree: Tree, rules: Sequence[tuple[str, Any]], is_leaf: Callable[[Any], bool] | None = None
) -> Tree:
  """A tree like `tree` with the value of the first rule whose pattern matches the whole path.

  Args:
    tree: nested dicts of arrays.
    rules: (regular expression, value) pairs, tried in order.
    is_leaf: of nodes that count as one parameter, as weights in few bits do.

  Raises:
    UserError: a pattern that is no regular expression; a leaf that no rule covers, or a rule that covers
      nothing: both are usually a typo, and would silently train or freeze the wrong weights.
  """
  used = [False] * len(rules)

  def value(path, _):
    name = path_name(path)
    for i, (pattern, v) in enumerate(rules):
      if matches(pattern, name):
        used[i] = True
        return v
    raise UserError(
      f'no pattern covers the parameter {name!r}: add one, or end the list with (".*", ...); '
      f'patterns: {[p for p, _ in rules]}'
    )

  marked = jax.tree_util.tree_map_with_path(value, tree, is_leaf=is_leaf)
  for hit, (pattern, _) in zip(used, rules, strict=True):
    if not hit and pattern != '.*':
      raise UserError(
        f'pattern {pattern!r} matches no parameter; there are {list(paths(tree, is_leaf))}'
      )
  return marked


def split(tree: Tree, patterns: Iterable[str]) -> tuple[Tree, Tree]:
  """(the leaves whose path matches one of the patterns, the others), as nested dicts.

  Raises:
    UserError: a pattern that matches nothing.
  """
  chosen = mark(tree, [*((p, True) for p in patterns), ('.*', False)])
  leaves, flags = paths(tree), paths(chosen)
  inside = nest({p: a for p, a in leaves.items() if flags[p]})
  outside = nest({p: a for p, a in leaves.items() if not flags[p]})
  return inside, outside


def subtract(tree: Tree, other: Tree) -> Tree:
  """`tree` without the leaves whose path is in `other`, as a leaf or as a dict: a weight in few bits."""
  drop = {*paths(other)}
  drop |= {p[:i] for p in drop for i, letter in enumerate(p) if letter == '/'}
  return nest({p: a for p, a in paths(tree).items() if p not in drop}) if drop else tree
