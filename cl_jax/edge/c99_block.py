"""A block of StableHLO as C: kernels in order, values in places, state overwritten where it is dead."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cl_jax.edge.arena import Arena, Place
from cl_jax.edge.c99_expr import ELEMENTWISE, cost, ctype, elementwise, literal, refused
from cl_jax.edge.c99_fuse import Fusion, Kernel, affine, relabels, strides_of, widens
from cl_jax.edge.c99_scope import Scope, linear, times, total
from cl_jax.edge.stablehlo import Op, Region, Value

END = 1 << 60


class Tables:
  """The constants of a file, each once."""

  def __init__(self, prefix: str):
    self.prefix, self.names, self.lines = prefix, {}, []
    self.bytes = 0

  def place(self, array: np.ndarray, dtype: str) -> Place:
    array = np.ascontiguousarray(array)
    if dtype == 'f32' and np.isnan(array).any():  # no constant expression is a NaN
      bits = self.place(array.view(np.uint32), 'ui32')
      return Place(array.size, dtype, lambda index: f'm_float({bits.text(index)})', owned=False)
    key = (dtype, array.tobytes())
    if key not in self.names:
      name = self.names[key] = f'{self.prefix}_k{len(self.names)}'
      values = ', '.join(literal(v, dtype) for v in array.ravel())
      self.lines.append(f'static const {ctype(dtype)} {name}[{array.size}] = {{{values}}};')
      self.bytes += array.nbytes
    name = self.names[key]
    return Place(array.size, dtype, lambda index: f'{name}[{index}]', owned=False)


class Emitter:
  """What the blocks of one function share.

  Attributes:
    places: where values are.
    bound: scalars of a region that are C expressions.
    macs: multiply-adds of products and convolutions; of a loop of unknown length one turn.
    helpers: functions that the code calls besides those of `c99_math`, by name.
  """

  def __init__(self, tables: Tables, kernels: dict[str, Callable], helpers: dict[str, str]):
    self.tables, self.kernels, self.helpers = tables, kernels, helpers
    self.arena = Arena()
    self.places: dict[Value, Place] = {}
    self.bound: dict[Value, str] = {}
    self.computing: frozenset = frozenset()
    self.uses: dict[Value, int] = {}
    self.fresh = 0
    self.macs = 0
    self.times = 1
    self.copies: list[str] = []

  def name(self, prefix: str) -> str:
    self.fresh += 1
    return f'{prefix}{self.fresh}'

  def count(self, region: Region) -> None:
    for v in region.outs:
      self.uses[v] = self.uses.get(v, 0) + 1
    for op in region.ops:
      for v in op.operands:
        self.uses[v] = self.uses.get(v, 0) + 1
      for inner in op.regions:
        self.count(inner)

  def element(self, place: Place, index: str) -> str:
    self.arena.touch(place)
    return place.text(index)

  def pointer(self, place: Place, index: str) -> str:
    return f'&{self.element(place, index)}'

  def memory(self, v: Value) -> tuple[Place, int, list[int]]:
    """v as memory: place, offset, strides."""
    view = affine(v, set(self.places))
    assert view is not None
    if view.base not in self.places:
      op = view.base.op
      assert op is not None and op.name == 'constant'
      array = op.attrs['value']
      whole = array if any(view.strides) or view.offset else array.ravel()[:1]
      return self.tables.place(whole, view.base.dtype), view.offset, view.strides
    return self.places[view.base], view.offset, view.strides

  def at(self, v: Value, index: Sequence[str], scope: Scope) -> str:
    """The C expression of an element, for use in that scope."""
    if v in self.bound:
      return self.bound[v]
    if v in self.places and v not in self.computing:
      return self.element(self.places[v], linear(index, strides_of(v.shape)))
    key = (v, tuple(index))
    if found := scope.find(key):
      return found
    op = v.op
    assert op is not None
    text = self._lazy(op, v, list(index), scope)
    simple = op.name not in ELEMENTWISE or (
      self.uses.get(v, 0) <= 1 and len(text) < 60 and cost(op) < 10
    )
    if simple:
      return text
    return scope.local(key, self.name('v'), ctype(v.dtype, op), text, index)

  def _lazy(self, op: Op, v: Value, index: list[str], scope: Scope) -> str:
    below = op.operands[0] if op.operands else v
    if op.name == 'constant':
      array: Any = op.attrs['value']
      if array.size and (array.ravel()[:1].tobytes() * array.size == array.tobytes()):
        return literal(array.ravel()[0], v.dtype)
      return self.tables.place(array, v.dtype).text(linear(index, strides_of(v.shape)))
    if op.name == 'iota':
      return f'({ctype(v.dtype, op)})({index[op.attrs["iota_dimension"]]})'
    if op.name == 'transpose':
      source = [''] * len(index)
      for k, d in enumerate(op.attrs['permutation']):
        source[d] = index[k]
      return self.at(below, source, scope)
    if op.name == 'slice':
      starts, steps = op.attrs['start_indices'], op.attrs['strides']
      source = [total(times(i, t), str(a)) for i, a, t in zip(index, starts, steps, strict=True)]
      return self.at(below, source, scope)
    if op.name == 'reverse':
      turned = op.attrs['dimensions']
      source = [
        total(str(v.shape[k] - 1), times(i, -1)) if k in turned else i for k, i in enumerate(index)
      ]
      return self.at(below, source, scope)
    if op.name == 'broadcast_in_dim':
      dims = op.attrs['broadcast_dimensions']
      source = ['0' if below.shape[k] == 1 else index[d] for k, d in enumerate(dims)]
      return self.at(below, source, scope)
    if op.name == 'reshape':
      return self._reshape(op, v, below, index, scope)
    if op.name == 'bitcast_convert' and widens(op):
      return self._bytes(op, v, below, index, scope)
    args = [
      self.at(u, index if u.shape == v.shape else ['0'] * len(u.shape), scope) for u in op.operands
    ]
    return elementwise(op, args)

  def _reshape(self, op: Op, v: Value, below: Value, index: list[str], scope: Scope) -> str:
    if relabels(op):
      rest = iter([i for i, n in zip(index, v.shape, strict=True) if n != 1])
      return self.at(below, [next(rest) if n != 1 else '0' for n in below.shape], scope)
    at = linear(index, strides_of(v.shape))
    if len(below.shape) == 1:
      return self.at(below, [at], scope)
    if affine(v, set(self.places)) is None:  # of an outer block: the index is taken apart
      steps = zip(strides_of(below.shape), below.shape, strict=True)
      return self.at(below, [f'(({at}) / {s} % {n})' for s, n in steps], scope)
    place, offset, strides = self.memory(v)
    return self.element(place, linear(index, strides, offset))

  def _bytes(self, op: Op, v: Value, below: Value, index: list[str], scope: Scope) -> str:
    """A bitcast between widths: the lowest bytes come first."""
    narrow = ctype(v.dtype, op)
    bits = lambda d: int(re.sub(r'\D', '', d))  # noqa: E731
    if len(v.shape) > len(below.shape):
      value = self.at(below, index[:-1], scope)
      value = f'm_bits({value})' if below.dtype == 'f32' else f'(uint{bits(below.dtype)}_t){value}'
      return f'({narrow})({value} >> ({index[-1]}) * {bits(v.dtype)})'
    word, small = f'uint{bits(v.dtype)}_t', f'uint{bits(below.dtype)}_t'
    parts = [
      f'(({word})({small}){self.at(below, [*index, str(k)], scope)} << {k * bits(below.dtype)})'
      for k in range(below.shape[-1])
    ]
    value = f'({" | ".join(parts)})'
    return f'm_float({value})' if v.dtype == 'f32' else f'({narrow}){value}'

  def region(self, region: Region, args: Sequence[str], scope: Scope) -> list[str]:
    """What a region of scalars returns for these arguments."""
    self.bound.update(zip(region.args, args, strict=True))
    return [self.at(v, ['0'] * len(v.shape), scope) for v in region.outs]


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
    self.mine = {a for a in region.args if e.places[a].owned}
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
          held is None or (held in self.mine and self._over(held, there and reads.get(held, True)))
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
