"""Whether a learner's programs are in the subset of StableHLO that edge compilers run right.

Refused: calls into libraries, donated arguments, unsigned state. Named: loops, whose every turn is a round
trip to the host, and scatters without a promise to be in bounds, which a backend has to guard (see
`iree_safe`). Each finding has its line of Python and, where one is on the stack, its method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import source_info_util

from cl_jax import budget
from cl_jax.edge import stablehlo
from cl_jax.edge.learner import Flat, Leaf, lower, shapes
from cl_jax.errors import UserError

CALLS = ('LuDecomposition',)  # `iree_safe` writes it out, as it does cholesky and triangular_solve


class Finding(NamedTuple):
  """One thing that is not in the subset.

  Attributes:
    part: 'step', 'predict' or 'boundary'.
    rule: 'custom_call', 'donation', 'unsigned', 'while' or 'scatter'.
    place: 'file.py:12 (method ewc)'.
    detail: what it is.
  """

  part: str
  rule: str
  place: str
  detail: str

  def __str__(self) -> str:
    return f'{self.part}: {self.detail} at {self.place}'


REFUSED = ('custom_call', 'donation', 'unsigned')


def lint(flat: Flat) -> list[Finding]:
  """What is outside of the subset, each once."""
  found = [
    Finding('step', 'unsigned', leaf.name, f'a leaf of the state of type {leaf.dtype}')
    for leaf in flat.state
    if leaf.dtype.startswith('uint')
  ]
  for part, f, rows in (
    ('step', flat.step, flat.batch),
    ('predict', flat.predict, flat.batch),
    ('boundary', flat.boundary, flat.ends),
  ):
    if f is not None:
      found += _program(part, f, flat.state, rows)
  return list(dict.fromkeys(found))


def check(findings: list[Finding]) -> None:
  """Raises UserError for the first finding that no backend can mend."""
  for finding in findings:
    if finding.rule in REFUSED:
      raise UserError(f'this learner is not exported for iree: {finding}')


def promised(f: Callable, *lists: Sequence[Leaf]) -> set[str]:
  """'FILE:LINE' of the scatters that promise to be in bounds, where no other scatter is on the line."""
  found: dict[str, set[bool]] = {}

  def visit(jaxpr: Any) -> None:
    for eqn in jaxpr.eqns:
      if eqn.primitive.name.startswith('scatter'):
        words = source_info_util.summarize(eqn.source_info).split(' ')[0].split(':')
        kept = eqn.params['mode'] == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
        found.setdefault(':'.join(words[:2]), set()).add(kept)
      for sub in budget.subjaxprs(eqn):
        visit(sub)

  visit(jax.make_jaxpr(f)(*(shapes(leaves) for leaves in lists)).jaxpr)
  return {line for line, kinds in found.items() if kinds == {True}}


def _program(
  part: str, f: Callable, state: tuple[Leaf, ...], rows: tuple[Leaf, ...]
) -> list[Finding]:
  module = lower(f, state, rows)
  found = donated(part, str(module))
  kept = promised(f, state, rows)

  def visit(region: stablehlo.Region) -> None:
    for op in region.ops:
      text = ' '.join(map(str, op.places))
      line, place = stablehlo.where(text)
      if op.name == 'custom_call' and op.attrs['call_target_name'] not in CALLS:
        found.append(
          Finding(part, 'custom_call', place, f'a call of {op.attrs["call_target_name"]}')
        )
      elif op.name == 'while':
        found.append(Finding(part, 'while', place, 'a loop'))
      elif op.name == 'scatter' and line not in kept:
        found.append(Finding(part, 'scatter', place, 'a scatter that may be out of range'))
      for inner in op.regions:
        visit(inner)

  visit(stablehlo.parse(module))
  return found


def donated(part: str, text: str) -> list[Finding]:
  """Arguments of a module that its results may overwrite."""
  main = re.search(r'func\.func public @main\((.*)', text)
  marks = re.findall(r'tf\.aliasing_output|jax\.buffer_donor', main[1] if main else '')
  return [Finding(part, 'donation', 'main', 'a donated argument')] if marks else []
