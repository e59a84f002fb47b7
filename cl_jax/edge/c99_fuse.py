"""What becomes a loop and what an expression inside one: fusion of elementwise chains, order of the loops.

Every operation is one of three kinds. *Kernels* (products, reductions, scatters, loops, ...) write memory.
*Views* (transposes, slices, broadcasts) are index arithmetic. *Elementwise* operations are expressions; those
over the same shape that depend on each other form one loop nest, and only what is read outside of it is
written to memory.
"""

from __future__ import annotations

import dataclasses

from cl_jax.edge.c99_expr import ELEMENTWISE, cost
from cl_jax.edge.c99_view import LAZY, VIEWS, affine, flat_view, is_elementwise, lazy
from cl_jax.edge.stablehlo import Op, Region, Value, captured

CHEAP = 2  # additions that are rather done again than written to memory
DEAR = 4  # what is not done again for every element that it is broadcast to


@dataclasses.dataclass(eq=False)
class Kernel:
  """A step of a block: a loop nest that writes `values`, or one operation.

  Attributes:
    values: what it writes.
    op: the operation; None of a loop nest.
    reads: stored values, and whether each is read at the very element that is written.
  """

  values: list[Value]
  op: Op | None
  reads: dict[Value, bool]


class Fusion:
  """The kernels of one block in order, and which values they write (`stored`).

  Args:
    region: the block.
    outer: values stored around it.
    keep: what must be written although nothing in the block reads it.
  """

  def __init__(self, region: Region, outer: set[Value], keep: list[Value]):
    self.region = region
    self.inside = {r: op for op in region.ops for r in op.results}
    self.stored = {*outer, *region.args}
    self.stored |= {r for op in region.ops if op.name not in LAZY for r in op.results}
    self.users: dict[Value, list[Op]] = {}
    for op in region.ops:
      for v in {*op.operands, *captured(op)}:
        self.users.setdefault(v, []).append(op)
    self._estimate()
    for v in keep:
      self._force(v)
    self._forced()
    self._levels()
    self._share()
    self.kernels = self._order()

  def _force(self, v: Value) -> None:
    if v in self.inside and lazy(v):
      self.stored.add(v)
      self.price[v] = 0

  def _estimate(self) -> None:
    """`price[v]`: additions to compute an element of v from memory, if what is dear and shared is stored."""
    self.price: dict[Value, int] = {}
    for op in self.region.ops:
      if op.name in LAZY:
        own = cost(op) if op.name in ELEMENTWISE else 0
        paid = [
          0
          if len(self.users.get(v, ())) > 1 and self.price.get(v, 0) > CHEAP
          else self.price.get(v, 0)
          for v in op.operands
        ]
        self.price[op.results[0]] = min(own + sum(paid), 1000)

  def _forced(self) -> None:
    """What an operation wants in memory: operands read again and again, or at a linear index."""
    for op in self.region.ops:
      if op.name == 'reshape' and not flat_view(op):
        self._linear(op)
      if op.name in ('dot_general', 'convolution', 'cholesky', 'triangular_solve', 'custom_call'):
        for v in op.operands:
          self._memory(v)
      if op.name in ('sort', 'top_k', 'reduce_window', 'select_and_scatter'):
        for v in op.operands:
          if self.price.get(v, 0) > 0:
            self._memory(v)
      if op.name in ('gather', 'scatter', 'dynamic_slice', 'dynamic_update_slice'):
        indices = op.operands[1:2] if op.name in ('gather', 'scatter') else ()
        heavy = [v for v in indices if self.price.get(v, 0) > CHEAP]
        if op.name == 'gather' and op.results[0].size > op.operands[0].size:
          heavy += [v for v in op.operands[:1] if self.price.get(v, 0) > CHEAP]
        for v in heavy:
          self._force(v)
      if op.regions:
        for v in captured(op):
          if v in self.inside and self.price.get(v, 0) > 0:
            self._force(v)
          elif v in self.inside:
            self._memory(v)

  def _memory(self, v: Value) -> None:
    """Makes v a view of memory, by storing as far down as that takes."""
    if affine(v, self.stored) is not None:
      return
    op = v.op
    assert op is not None
    if op.name in VIEWS:
      below = op.operands[0]
      if op.name == 'broadcast_in_dim' or below.op is None or below.op.name != 'iota':
        self._memory(below)
        if affine(v, self.stored) is not None:
          return
      if op.name == 'reshape':
        self._linear(op)
        if affine(v, self.stored) is not None:
          return
    if v in self.inside:
      self._force(v)
      return
    raise AssertionError(f'{op.name} of a value of an outer block that is not in memory')

  def _linear(self, op: Op) -> None:
    """Stores what a reshape reads, where it is no view of memory that a linear index can walk."""
    v, below = op.results[0], op.operands[0]
    if affine(v, self.stored - {v}) is None:
      if below.op is not None and below.op.name != 'iota':
        self._memory(below)
      if affine(v, self.stored - {v}) is None:
        self._force(below)

  def _inline(self, v: Value) -> bool:
    """An elementwise value that is surely computed where it is used."""
    return v not in self.stored and self.price.get(v, 0) <= CHEAP

  def _levels(self) -> None:
    """Groups of elementwise values that one loop nest can compute: no way leads out of a group and back."""
    near: dict[Value, int] = {}
    far: dict[Value, int] = {}
    self.parent: dict[Value, Value] = {}
    for op in self.region.ops:
      reads = {*op.operands, *captured(op)}
      out = op.results[0]
      if is_elementwise(out):
        fusable = {
          v for v in reads if v in self.inside and is_elementwise(v) and v.shape == out.shape
        }
        level = max([near[v] if v in fusable else far.get(v, 0) for v in reads], default=0)
        near[out] = level
        beyond = max([far.get(v, 0) for v in reads], default=0)
        far[out] = beyond if self._inline(out) else level + 1
        self.parent[out] = out
        for v in fusable:
          if near[v] == level:
            self.parent[self._find(v)] = self._find(out)
      else:
        level = max([far.get(v, 0) for v in reads], default=0)
        for r in op.results:
          near[r] = far[r] = level

  def _find(self, v: Value) -> Value:
    while self.parent[v] is not v:
      self.parent[v] = self.parent[self.parent[v]]
      v = self.parent[v]
    return v

  def _share(self) -> None:
    """Stores what several kernels would compute."""
    self.sites: dict[Value, set] = {}
    for op in reversed(self.region.ops):
      for v in op.results:
        sites: set = set()
        again = False
        for user in self.users.get(v, ()):
          if user.name not in LAZY:
            sites.add(user)
            continue
          out = user.results[0]
          if out in self.stored:
            sites.add(self._find(out) if is_elementwise(out) else out)
          else:
            sites |= self.sites[out]
          if user.name == 'broadcast_in_dim' and 1 < v.size < out.size:
            again = True
        self.sites[v] = sites
        if v in self.stored or not is_elementwise(v) or self._inline(v):
          continue
        if len(sites) > 1 or (again and self.price[v] >= DEAR):
          self.stored.add(v)
          self.sites[v] = {self._find(v)}

  def _order(self) -> list[Kernel]:
    """Kernels after those that they read from; otherwise in the program's order."""
    groups: dict[Value, list[Value]] = {}
    for op in self.region.ops:
      for v in op.results:
        if v in self.stored and lazy(v):
          groups.setdefault(self._find(v) if is_elementwise(v) else v, []).append(v)
    makers: dict[Value, Kernel] = {}
    kernels: list[Kernel] = []
    for op in self.region.ops:
      if op.name not in LAZY:
        kernel = Kernel(op.results, op, self.reads_of(op))
      else:
        members = groups.get(
          self._find(op.results[0]) if is_elementwise(op.results[0]) else op.results[0]
        )
        if not members or members[0] is not op.results[0]:
          continue
        kernel = Kernel(members, None, self.reads(members))
      kernels.append(kernel)
      for v in kernel.values:
        makers[v] = kernel
    done: dict[Kernel, None] = {}
    busy: set[Kernel] = set()

    def visit(kernel: Kernel) -> None:
      if kernel in done:
        return
      assert kernel not in busy, 'kernels depend on each other'
      busy.add(kernel)
      for v in kernel.reads:
        if v in makers and makers[v] is not kernel:
          visit(makers[v])
      done[kernel] = None

    position = {r: k for k, op in enumerate(self.region.ops) for r in op.results}
    for kernel in sorted(kernels, key=lambda kernel: max(position[v] for v in kernel.values)):
      visit(kernel)
    return list(done)

  def reads_of(self, op: Op) -> dict[Value, bool]:
    found: dict[Value, bool] = {}
    for v in (*op.operands, *captured(op)):
      self._walk(v, False, frozenset(), found, set())
    return found

  def reads(self, members: list[Value]) -> dict[Value, bool]:
    """The memory that a loop nest reads."""
    found: dict[Value, bool] = {}
    seen: set = set()
    own = frozenset(members)
    for v in members:
      assert v.op is not None
      same = is_elementwise(v)
      for u in v.op.operands:
        self._walk(u, same and u.shape == v.shape, own, found, seen)
    return found

  def _walk(self, v: Value, same: bool, own: frozenset, found: dict, seen: set) -> None:
    if (v, same) in seen:
      return
    seen.add((v, same))
    if v in self.stored and v not in own:
      found[v] = found.get(v, True) and same
      return
    if v.op is None:
      return
    if v.op.name not in LAZY:  # of an outer block, stored there
      found[v] = found.get(v, True) and same
      return
    keeps = is_elementwise(v) or v.op.name == 'reshape'  # a reshape keeps the linear index
    for u in v.op.operands:
      inner = same and keeps and (u.shape == v.shape or v.op.name == 'reshape')
      self._walk(u, inner, own, found, seen)
