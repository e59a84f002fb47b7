"""A second module for IREE, which calls the functions of a learner's in turn."""

from __future__ import annotations

from collections.abc import Sequence

from cl_jax.edge.iree_module import NAME, kind
from cl_jax.edge.learner import Leaf


def driver(
  state: Sequence[Leaf],
  batch: Sequence[Leaf],
  ends: Sequence[Leaf],
  logits: Leaf,
  steps: int,
  half: int,
) -> str:
  """A module that calls a learner's.

  main(leaves, batches, ends, batch) -> (losses, logits, leaves): `half` steps, the boundary where there are
  `ends`, the rest of the steps, a prediction.
  """
  join = ', '.join
  s, b, e = ([kind(leaf) for leaf in table] for table in (state, batch, ends))
  x = [kind(leaf._replace(shape=(steps, *leaf.shape))) for leaf in batch]
  losses, out = f'tensor<{steps}xf32>', kind(logits)
  named = lambda letter, kinds: join(f'%{letter}{k}: {t}' for k, t in enumerate(kinds))  # noqa: E731
  passed = lambda letter, kinds: join(f'%{letter}{k}' for k in range(len(kinds)))  # noqa: E731
  parts = [
    named(letter, kinds) for letter, kinds in (('a', s), ('x', x), ('e', e), ('p', b)) if kinds
  ]
  lines = [
    'module @driver {',
    f'  func.func private @{NAME}.load({join(s)})',
    f'  func.func private @{NAME}.save() -> ({join(s)})',
    f'  func.func private @{NAME}.step({join(b)}) -> tensor<f32>',
    f'  func.func private @{NAME}.predict({join(b)}) -> {out}',
    f'  func.func private @{NAME}.boundary({join(e)})' if e else '',
    f'  func.func public @main({join(parts)}) -> ({losses}, {out}, {join(s)}) {{',
    f'    call @{NAME}.load({passed("a", s)}) : ({join(s)}) -> ()',
    '    %c0 = arith.constant 0 : index',
    '    %c1 = arith.constant 1 : index',
    f'    %half = arith.constant {half} : index',
    f'    %all = arith.constant {steps} : index',
    f'    %l0 = tensor.empty() : {losses}',
    *_steps('%c0', '%half', '%l0', '%l1', batch, b, x, losses),
    f'    call @{NAME}.boundary({passed("e", e)}) : ({join(e)}) -> ()' if e else '',
    *(_steps('%half', '%all', '%l1', '%l2', batch, b, x, losses)),
    f'    %p = call @{NAME}.predict({passed("p", b)}) : ({join(b)}) -> {out}',
    f'    %s:{len(s)} = call @{NAME}.save() : () -> ({join(s)})',
    f'    return %l2, %p, {join(f"%s#{k}" for k in range(len(s)))} : {losses}, {out}, {join(s)}',
    '  }',
    '}',
  ]
  return '\n'.join(line for line in lines if line) + '\n'


def _steps(
  first: str,
  last: str,
  given: str,
  name: str,
  batch: Sequence[Leaf],
  b: list[str],
  x: list[str],
  losses: str,
) -> list[str]:
  """A loop over rows of the stacked batches."""
  lines = [
    f'    {name} = scf.for %i = {first} to {last} step %c1 iter_args(%l = {given}) -> ({losses}) {{'
  ]
  for k, leaf in enumerate(batch):
    ones = ', '.join('1' for _ in range(len(leaf.shape) + 1))
    at = ', '.join(['%i', *('0' for _ in leaf.shape)])
    size = ', '.join(['1', *map(str, leaf.shape)])
    lines.append(
      f'      %r{k} = tensor.extract_slice %x{k}[{at}] [{size}] [{ones}] : {x[k]} to {b[k]}'
    )
  rows = ', '.join(f'%r{k}' for k in range(len(b)))
  return [
    *lines,
    f'      %loss = func.call @{NAME}.step({rows}) : ({", ".join(b)}) -> tensor<f32>',
    '      %v = tensor.extract %loss[] : tensor<f32>',
    f'      %w = tensor.insert %v into %l[%i] : {losses}',
    f'      scf.yield %w : {losses}',
    '    }',
  ]
