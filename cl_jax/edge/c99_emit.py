"""Values as C expressions: constants, elements of memory, views, elementwise operations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cl_jax.edge.arena import Arena, Place
from cl_jax.edge.c99_expr import ELEMENTWISE, cost, ctype, elementwise, literal
from cl_jax.edge.c99_scope import Scope, linear, times, total
from cl_jax.edge.c99_view import affine, relabels, strides_of, widens
from cl_jax.edge.stablehlo import Op, Region, Value


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
