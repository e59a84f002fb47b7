"""A block of StableHLO as C: kernels in order, values in places, state overwritten where it is dead."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from cl_jax.edge.arena import Place
from cl_jax.edge.c99_emit import Emitter
from cl_jax.edge.c99_expr import ctype, refused
from cl_jax.edge.c99_fuse import Fusion, Kernel
from cl_jax.edge.c99_scope import Scope, linear
from cl_jax.edge.c99_view import strides_of
from cl_jax.edge.stablehlo import Region, Value

END = 1 << 60  # of what is returned: it is needed after the last kernel


class Block:
  """Emits a block into a scope.

  Args:
    e: what the blocks of the function share; it knows the places of the block's arguments.
    region: the block.
    ties: the place of each thing that it returns, or None: then the caller reads it where it is.
    scope: where the code goes.
  """

  def __init__(self, e: Emitter, region: Region, ties: Sequence[Place] | None, scope: Scope):
    self.e, self.outs, self.scope = e, region.outs, scope
    self.ties = ties
    inside = {r for op in region.ops for r in op.results}
    keep = [] if ties is None else [v for v in region.outs if v in inside]
    self.fusion = Fusion(region, set(e.places), keep)
    self.now = 0
    self.last: dict[Value, int] = {}
    for k, kernel in enumerate(self.fusion.kernels):
      for v in kernel.reads:
        self.last[v] = k
    for v in region.outs:
      found: dict[Value, bool] = {}
      self.fusion._walk(v, False, frozenset(), found, set())
      self.last.update(dict.fromkeys(found, END))
    # A condition, which has no ties, reads what the body reads after it.
    self.mine = set() if ties is None else {a for a in region.args if e.places[a].owned}
    self.occupant: dict[Place, Value] = {e.places[a]: a for a in region.args}
    for now, kernel in enumerate(self.fusion.kernels):
      self.now, self.kernel = now, kernel
      e.arena.position += 1
      self._emit(kernel)
    if ties is not None:
      e.arena.position += 1
      self._finish(ties)

  def _emit(self, kernel: Kernel) -> None:
    op = kernel.op
    if op is None:
      self._loop(kernel)
      return
    if op.name not in self.e.kernels:
      raise refused(op)
    root = Scope(self.scope, f'/* {op.name}, {op.where()} */', wall=True)
    self.e.kernels[op.name](self, op, root)

  def place(self, v: Value, there: bool = False) -> Place:
    """Where to write a result of this kernel.

    Args:
      v: the result.
      there: every element is written after the last read of the same element, so that it may replace what it
        is made of.
    """
    e, reads = self.e, self.kernel.reads
    chosen = None
    for out, tie in zip(self.outs, self.ties or (), strict=False):
      held = self.occupant.get(tie)
      if (
        out is v
        and tie.dtype == v.dtype
        and (
          held is None
          or (
            held in self.mine
            and held not in self.kernel.values
            and self._over(held, there and reads.get(held, True))
          )
        )
      ):
        chosen = tie
        break
    if chosen is None and there:
      for u, same in reads.items():
        p = e.places[u]
        if (
          same and u in self.mine and self.occupant.get(p) is u and p.inside
          and (p.size, p.dtype) == (v.size, v.dtype) and self._over(u, True)
        ):  # fmt: skip
          chosen = p
          break
    return self.put(v, chosen or e.arena.new(v.size, v.dtype))

  def _over(self, v: Value, now: bool) -> bool:
    last = self.last.get(v, -1)
    return last < self.now or (now and last == self.now)

  def put(self, v: Value, place: Place) -> Place:
    self.e.places[v] = place
    self.occupant[place] = v
    self.mine.add(v)
    return place

  def over(self, v: Value, result: Value, others: Sequence[Value]) -> Place:
    """A place that holds v and that `result` may change: v's own where v is not read again, else a copy."""
    base = v
    while base not in self.e.places and base.op is not None and base.op.name == 'reshape':
      base = base.op.operands[0]
    read: dict[Value, bool] = {}
    for other in others:
      self.fusion._walk(other, False, frozenset(), read, set())
    place = self.e.places.get(base)
    if (
      place is not None and base in self.mine and self.occupant.get(place) is base and base not in read
      and (place.size, place.dtype) == (result.size, result.dtype) and self._over(base, True)
    ):  # fmt: skip
      self.e.arena.touch(place)
      return self.put(result, place)
    if place is not None and result.size >= 64:
      self.e.copies.append(f'{result.size} elements of {result.dtype}')
    target = self.place(result)
    self.fill(target, v)
    return target

  def fill(self, place: Place, v: Value, scope: Scope | None = None) -> None:
    """Writes every element of v."""
    inner, index = Scope(scope or self.scope, wall=True).loops(v.shape, 'i')
    value = self.e.at(v, index, inner)
    inner.add(f'{self.e.element(place, linear(index, strides_of(v.shape)))} = {value};')

  def _loop(self, kernel: Kernel) -> None:
    e, shape = self.e, kernel.values[0].shape
    e.computing = frozenset(kernel.values)
    root = Scope(self.scope, wall=True)
    inner, index = root.loops(shape, 'i')
    found = []
    for v in kernel.values:
      text = e.at(v, index, inner)
      key = (v, tuple(index))
      if len(kernel.values) > 1 and not re.fullmatch(r'v\d+', text):
        text = inner.local(key, e.name('v'), ctype(v.dtype, v.op), text, index)
      found.append(text)
    for v, text in zip(kernel.values, found, strict=True):
      target = e.element(self.place(v, there=True), linear(index, strides_of(shape)))
      inner.add(f'{target} = {text};')
    e.computing = frozenset()

  def _finish(self, ties: Sequence[Place]) -> None:
    """Copies what is not yet where it is to be returned; first aside what another copy would overwrite."""
    e = self.e
    rest = [(v, tie) for v, tie in zip(self.outs, ties, strict=True) if e.places.get(v) is not tie]
    targets = {tie for _, tie in rest}
    moves = []
    for v, tie in rest:
      read: dict[Value, bool] = {}
      self.fusion._walk(v, False, frozenset(), read, set())
      if any(e.places[u] in targets for u in read):
        aside = e.arena.new(v.size, v.dtype)
        self.fill(aside, v)
        moves.append((aside, v, tie))
      else:
        moves.append((None, v, tie))
    e.arena.position += 1
    for aside, v, tie in moves:
      if aside is None:
        self.fill(tie, v)
        continue
      n = math.prod(v.shape)
      inner, (i,) = Scope(self.scope, wall=True).loops([n], 'i')
      inner.add(f'{e.element(tie, i)} = {e.element(aside, i)};')
