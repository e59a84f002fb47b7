"""A learner as one module for IREE: the state stays on the device, in globals of the module.

Functions: load(leaves), save() -> leaves, step(batch) -> loss, predict(batch) -> logits, and
boundary(batches) where the learner has one. Nothing is donated: a module made from a donated export computes
wrong numbers, without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax

from cl_jax.edge import iree_safe, lint
from cl_jax.edge.c99_file import MLIR
from cl_jax.edge.learner import Flat, Leaf, lower, shapes
from cl_jax.errors import UserError

NAME = 'learner'


class Module(NamedTuple):
  """What `module` returns.

  Attributes:
    text: MLIR: StableHLO, and IREE's `util` for the globals.
    guarded: scatters that may be out of range and were made safe, by function.
  """

  text: str
  guarded: dict[str, tuple[str, ...]]


def kind(leaf: Leaf) -> str:
  """The MLIR type of a leaf."""
  if leaf.dtype not in MLIR:
    raise UserError(f'{leaf.name} is of type {leaf.dtype}, which the backend iree does not take')
  return f'tensor<{"".join(f"{n}x" for n in leaf.shape)}{MLIR[leaf.dtype]}>'


def module(flat: Flat) -> Module:
  """The module of a learner; see `learner.flatten`."""
  state = [kind(leaf) for leaf in flat.state]
  logits = jax.eval_shape(flat.predict, shapes(flat.state), shapes(flat.batch))
  parts = {
    'step': (flat.step, flat.batch, ['tensor<f32>'], True),
    'predict': (flat.predict, flat.batch, [kind(Leaf('', logits.shape, 'float32', ''))], False),
    'boundary': (flat.boundary, flat.ends, [], True),
  }
  lines = [f'module @{NAME} {{']
  lines += [f'  util.global private mutable @s{k} : {t}' for k, t in enumerate(state)]
  guarded = {}
  for name, (f, rows, outs, writes) in parts.items():
    if f is None:
      continue
    kept = lint.promised(f, flat.state, rows)
    made = iree_safe.safe(lower(f, flat.state, rows), f'{name}_', kept)
    guarded[name] = made.guarded
    lines += [*_function(name, state, [kind(leaf) for leaf in rows], outs, writes), made.text]
  lines += [*_load(state), *_save(state), '}']
  return Module('\n'.join(lines) + '\n', guarded)


def _function(
  name: str, state: Sequence[str], rows: Sequence[str], outs: Sequence[str], writes: bool
) -> list[str]:
  """A public function of a batch, around the program over lists."""
  given = ', '.join(f'%b{k}: {t}' for k, t in enumerate(rows))
  passed = ', '.join(
    [*(f'%s{k}' for k in range(len(state))), *(f'%b{k}' for k in range(len(rows)))]
  )
  results = [*(state if writes else ()), *outs]
  takes, gives = ', '.join([*state, *rows]), ', '.join(results)
  first = len(results) - len(outs)
  back = ', '.join(f'%r#{first + k}' for k in range(len(outs)))
  return [
    f'  func.func public @{name}({given}) -> ({", ".join(outs)}) {{',
    *_loads(state),
    f'    %r:{len(results)} = call @{name}_main({passed}) : ({takes}) -> ({gives})',
    *(f'    util.global.store %r#{k}, @s{k} : {t}' for k, t in enumerate(state) if writes),
    f'    return {back} : {", ".join(outs)}' if outs else '    return',
    '  }',
  ]


def _load(state: Sequence[str]) -> list[str]:
  """Each leaf by a function of its own: in one they would share a buffer, which then outlives them all."""
  lines = []
  for k, t in enumerate(state):
    lines += [
      f'  util.func private @load{k}(%a: {t}) attributes {{inlining_policy = #util.inline.never}} {{',
      f'    util.global.store %a, @s{k} : {t}',
      '    util.return',
      '  }',
    ]
  given = ', '.join(f'%a{k}: {t}' for k, t in enumerate(state))
  calls = [f'    util.call @load{k}(%a{k}) : ({t}) -> ()' for k, t in enumerate(state)]
  return [*lines, f'  func.func public @load({given}) {{', *calls, '    return', '  }']


def _save(state: Sequence[str]) -> list[str]:
  names, kinds = ', '.join(f'%s{k}' for k in range(len(state))), ', '.join(state)
  return [
    f'  func.func public @save() -> ({kinds}) {{', *_loads(state), f'    return {names} : {kinds}', '  }',
  ]  # fmt: skip


def _loads(state: Sequence[str]) -> list[str]:
  return [f'    %s{k} = util.global.load @s{k} : {t}' for k, t in enumerate(state)]
