"""The host program of a module for IREE, in MLIR of its VM: blocks, registers, and their last uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Function:
  def __init__(self, op: Any):
    blocks = list(op.regions[0].blocks)
    numbers = {block: k for k, block in enumerate(blocks)}
    self.blocks = [Block(block, numbers) for block in blocks]
    self._liveness()

  def _liveness(self) -> None:
    """Where each register is used for the last time."""
    live: list[set[int]] = [set() for _ in self.blocks]  # at the beginning of a block
    out: list[set[int]] = [set() for _ in self.blocks]
    changed = True
    while changed:
      changed = False
      for k in reversed(range(len(self.blocks))):
        block = self.blocks[k]
        after = set().union(*(live[n] for n in block.next)) if block.next else set()
        now = set(after)
        for op in reversed(block.ops):
          now -= set(op.results)
          now |= set(op.operands)
        now -= set(block.args)
        changed |= now != live[k] or after != out[k]
        live[k], out[k] = now, after
    before: list[set[int]] = [set() for _ in self.blocks]
    for k, block in enumerate(self.blocks):
      now = set(out[k])
      for op in reversed(block.ops):
        op.last = set(op.operands) - now
        op.unused = set(op.results) - now
        now -= set(op.results)
        now |= set(op.operands)
      block.dead = set(block.args) - now
      for n in block.next:
        before[n] |= out[k]
    for k, block in enumerate(self.blocks):
      block.dead |= before[k] - live[k]


class Block:
  def __init__(self, block: Any, numbers: dict):
    self.args = [_key(a) for a in block.arguments]
    self.ops = [Op(view.operation, numbers) for view in block.operations]
    self.next = [n for n, _ in self.ops[-1].jumps]
    self.dead: set[int] = set()


class Op:
  """An operation: registers by number, symbol, constant, and for a jump the blocks and what they get."""

  def __init__(self, op: Any, numbers: dict):
    self.name = op.name
    self.operands = [_key(o) for o in op.operands]
    self.results = [_key(r) for r in op.results]
    self.last: set[int] = set()
    self.unused: set[int] = set()
    attributes = op.attributes
    self.symbol = next((attributes[k].value for k in ('callee', 'global') if k in attributes), None)
    self.constant = None
    if self.name.startswith('vm.const.i'):
      self.constant = attributes['value'].value if 'value' in attributes else 0
    self.jumps = [(numbers[b], len(list(b.arguments))) for b in op.successors]


def _key(value: Any) -> int:
  return hash(value)


def name_of(op: Any) -> str:
  return op.attributes['sym_name'].value


def _unsigned(a: int, bits: int = 64) -> int:
  return a & ((1 << bits) - 1)


ARITHMETIC: dict[str, Callable] = {
  **{f'add.{t}': lambda a, b: a + b for t in ('i32', 'i64')},
  **{f'sub.{t}': lambda a, b: a - b for t in ('i32', 'i64')},
  **{f'mul.{t}': lambda a, b: a * b for t in ('i32', 'i64')},
  **{f'and.{t}': lambda a, b: a & b for t in ('i32', 'i64')},
  **{f'or.{t}': lambda a, b: a | b for t in ('i32', 'i64')},
  **{f'xor.{t}': lambda a, b: a ^ b for t in ('i32', 'i64')},
  **{f'min.{t}.s': min for t in ('i32', 'i64')},
  **{f'max.{t}.s': max for t in ('i32', 'i64')},
  **{f'min.{t}.u': lambda a, b: min(a, b, key=_unsigned) for t in ('i32', 'i64')},
  **{f'max.{t}.u': lambda a, b: max(a, b, key=_unsigned) for t in ('i32', 'i64')},
  **{f'cmp.lt.{t}.s': lambda a, b: int(a < b) for t in ('i32', 'i64')},
  **{f'cmp.lt.{t}.u': lambda a, b: int(_unsigned(a) < _unsigned(b)) for t in ('i32', 'i64')},
  **{f'cmp.eq.{t}': lambda a, b: int(a == b) for t in ('i32', 'i64')},
  **{f'cmp.ne.{t}': lambda a, b: int(a != b) for t in ('i32', 'i64')},
  **{f'cmp.nz.{t}': lambda a: int(a != 0) for t in ('i32', 'i64')},
  **{f'select.{t}': lambda c, a, b: a if c else b for t in ('i32', 'i64', 'ref')},
  'cmp.nz.ref': lambda a: int(a is not None),
  'cmp.eq.ref': lambda a, b: int(a is b),
  'trunc.i64.i32': lambda a: _unsigned(a, 31) - (a & (1 << 31)),
  'ext.i32.i64.s': lambda a: a,
  'ext.i32.i64.u': lambda a: _unsigned(a, 32),
  'shr.i64.u': lambda a, n: _unsigned(a) >> n,
}
