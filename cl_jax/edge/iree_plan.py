"""What a module for IREE allocates, before it runs: its host program is followed, allocation by allocation.

IREE plans the temporary values of each stretch of a program into one buffer of fixed size; which buffers
there are at the same time is decided by the program that issues the work. That program is small and its
control flow depends on counters only, so it can be followed here: a buffer lives from its allocation to the
last use of the last reference to it, in registers, in globals, in views and in command buffers. The result
is what the allocator of IREE's local devices counts, to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cl_jax.edge.iree_compile import extra
from cl_jax.edge.iree_vm import ARITHMETIC, Function, Op, name_of
from cl_jax.errors import UserError

HOST_LOCAL = 1 << 6  # bit of a memory type
TURNS = 1_000_000  # operations of one call, before it is said to have no end


class Heap:
  """Bytes by kind of memory, as the runtime's statistics have them.

  Attributes:
    live, peak, total: {'device', 'host'}: now, at most, and all that was ever allocated. Constants that are
      mapped from the module's file count nothing.
  """

  def __init__(self):
    self.live = {'device': 0, 'host': 0}
    self.peak = {'device': 0, 'host': 0}
    self.total = {'device': 0, 'host': 0}

  def mark(self) -> None:
    """From now on `peak` is that of what follows."""
    self.peak = dict(self.live)


class Buffer:
  """Bytes of a heap for as long as Python refers to it; it refers to what it keeps alive itself."""

  def __init__(self, heap: Heap, nbytes: int, kind: str = 'device', keeps: Any = None):
    self.heap, self.nbytes, self.kind, self.keeps = heap, nbytes, kind, keeps
    heap.live[kind] += nbytes
    heap.total[kind] += nbytes
    heap.peak[kind] = max(heap.peak[kind], heap.live[kind])

  def __del__(self):
    self.heap.live[self.kind] -= self.nbytes


class Keeper:
  """A view, a command buffer or a device: something that is no memory itself."""

  def __init__(self, *kept: Any):
    self.kept = list(kept)


class Host:
  """The program that a module runs on the host.

  Attributes:
    heap: what is allocated now and was at most.
  """

  def __init__(self, vm: bytes, others: Mapping[str, Host] | None = None):
    """`others` are modules that this one calls, by name; they share their heap with it."""
    ir = extra('compiler.ir')
    module = ir.Module.parse(vm, ir.Context())
    body = [op.operation for op in module.body.operations[0].regions[0].blocks[0].operations]
    self._keep = module
    self.functions = {name_of(op): Function(op) for op in body if op.name == 'vm.func'}
    self.globals: dict[str, Any] = {}
    for op in body:
      if op.name.startswith('vm.global.'):
        first = op.attributes['initial_value'].value if 'initial_value' in op.attributes else None
        self.globals[name_of(op)] = first if op.name.endswith('ref') else (first or 0)
    self.others = dict(others or {})
    self.heap = next((other.heap for other in self.others.values()), None) or Heap()
    if '__init' in self.functions:
      self.run('__init', [])

  def call(self, name: str, sizes: Sequence[int], counted: bool = True) -> list[Any]:
    """Calls a function with buffers of these sizes, which the caller holds until it returns.

    Args:
      name: of a public function.
      sizes: bytes of its arguments.
      counted: the arguments are allocated by the runtime; otherwise they are memory of the caller.

    Returns:
      The results; their memory is held for as long as the caller keeps them.
    """
    given = [Buffer(self.heap, n if counted else 0) for n in sizes]
    return self.run(name, [Keeper(b) for b in given])

  def run(self, name: str, given: list[Any]) -> list[Any]:
    function = self.functions[name]
    block, registers, turns = 0, {}, 0
    registers.update(zip(function.blocks[0].args, given, strict=True))
    given.clear()
    while True:
      code = function.blocks[block]
      for op in code.ops:
        turns += 1
        if turns > TURNS:
          raise UserError(f'the memory of {name} cannot be planned: its loops have no end in sight')
        operands = [registers[o] for o in op.operands]
        for o in op.last:
          registers.pop(o, None)
        if op.name in ENDS:
          break
        results = self.operation(op, operands, name)
        del operands
        registers.update(
          (r, v) for r, v in zip(op.results, results, strict=True) if r not in op.unused
        )
        del results
      else:
        raise AssertionError(f'a block of {name} without an end')
      if op.name == 'vm.return':
        return operands
      block, passed = _jump(op, operands, name)
      del operands
      registers.update(zip(function.blocks[block].args, passed, strict=True))
      del passed
      for o in function.blocks[block].dead:
        registers.pop(o, None)

  def operation(self, op: Op, operands: list[Any], name: str) -> list[Any]:
    if op.symbol is not None and op.name.startswith('vm.global.'):
      if 'load' in op.name:
        return [self.globals[op.symbol]]
      self.globals[op.symbol] = operands[0]
      return []
    if op.name.startswith('vm.call'):
      assert op.symbol is not None
      if op.symbol in self.functions:
        passed = list(operands)
        operands.clear()
        return self.run(op.symbol, passed)
      return self.native(op.symbol, operands, len(op.results))
    if op.constant is not None:
      return [op.constant]
    rule = ARITHMETIC.get(op.name.removeprefix('vm.'))
    if rule is None:
      return [None] * len(op.results)
    known = op.name.endswith('.ref') or None not in operands
    return [rule(*operands) if known else None]

  def native(self, symbol: str, operands: list[Any], results: int) -> list[Any]:
    """A function of the runtime. Whatever is not memory gives a number that is not known, or a token."""
    match symbol:
      case 'hal.device.queue.alloca':
        kind = 'host' if operands[5] & HOST_LOCAL else 'device'
        return [Buffer(self.heap, operands[7], kind)]
      case 'hal.allocator.allocate':
        kind = 'host' if operands[2] & HOST_LOCAL else 'device'
        return [Buffer(self.heap, operands[4], kind)]
      case 'hal.allocator.import':  # of constants in the file, where they are
        return [Buffer(self.heap, 0)]
      case 'hal.buffer.subspan' | 'hal.buffer_view.create':
        return [Keeper(operands[0])]
      case 'hal.buffer_view.buffer':
        return [operands[0].kept[0]]
      case 'hal.fence.await' | 'hal.fence.query':
        return [0]
      case 'hal.devices.count':
        return [1]
      case 'hal.device.query.i64':
        return [1, 1]
      case _ if symbol.startswith('hal.command_buffer.') and results == 0:
        operands[0].kept += [o for o in operands[1:] if isinstance(o, Buffer | Keeper)]
        return []
    module, _, function = symbol.partition('.')
    if other := self.others.get(module):
      passed = list(operands)
      operands.clear()
      return other.run(function, passed)
    if symbol in NUMBERS:
      return [None] * results
    return [Keeper() for _ in range(results)]


def _jump(op: Op, operands: list[Any], name: str) -> tuple[int, list[Any]]:
  """(the next block, its arguments)."""
  if op.name == 'vm.call.variadic.yieldable':
    return op.jumps[0][0], [0]
  if op.name == 'vm.br':
    return op.jumps[0][0], operands
  condition, rest = operands[0], operands[1:]
  if condition is None:
    raise UserError(f'the memory of {name} cannot be planned: a branch depends on data')
  first = op.jumps[0][1]
  if condition:
    return op.jumps[0][0], rest[:first]
  return op.jumps[1][0], rest[first:]


ENDS = ('vm.return', 'vm.br', 'vm.cond_br', 'vm.call.variadic.yieldable', 'vm.fail')
NUMBERS = ('hal.buffer.load', 'hal.buffer_view.dim', 'hal.buffer_view.rank', 'hal.buffer.length')
