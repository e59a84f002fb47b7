"""Kernels that move and reduce: reductions, joins, slices and scatters at computed places."""

from __future__ import annotations

from cl_jax.edge.c99_block import Block
from cl_jax.edge.c99_expr import ctype
from cl_jax.edge.c99_scope import Scope, linear, times, total
from cl_jax.edge.c99_view import strides_of
from cl_jax.edge.stablehlo import Op, Value

INDEX = """/* An index kept in [0, last]. */
static inline int32_t h_index(int64_t i, int32_t last) { return i < 0 ? 0 : i > last ? last : (int32_t)i; }"""


def start(b: Block, v: Value, index: list[str], last: int, scope: Scope) -> str:
  """A local: an element of v as an index in [0, last]."""
  if last == 0:
    return '0'
  e = b.e
  e.helpers['h_index'] = INDEX
  text = f'h_index((int64_t){e.at(v, index, scope)}, {last})'
  return scope.local((v, 'start', tuple(index), last), e.name('s'), 'int32_t', text, index)


def reduce(b: Block, op: Op, root: Scope) -> None:
  e, n, dims = b.e, len(op.results), op.attrs['dimensions']
  sources, inits = op.operands[:n], op.operands[n:]
  shape = sources[0].shape
  out = op.results[0].shape
  middle, index = root.loops(out, 'i')
  accs = [e.name('acc') for _ in range(n)]
  for acc, v in zip(accs, inits, strict=True):
    middle.add(f'{ctype(v.dtype, op)} {acc} = {e.at(v, [], middle)};')
  inner, within = middle.loops([shape[d] for d in dims], 'r')
  kept, reduced = iter(index), iter(within)
  full = [next(reduced) if k in dims else next(kept) for k in range(len(shape))]
  items = [e.at(v, full, inner) for v in sources]
  update(b, op, accs, items, inner)
  for acc, v in zip(accs, op.results, strict=True):
    middle.add(f'{e.element(b.place(v), linear(index, strides_of(out)))} = {acc};')


def update(b: Block, op: Op, accs: list[str], items: list[str], scope: Scope) -> None:
  """accs = region(accs, items), all at once."""
  e = b.e
  new = e.region(op.regions[0], [*accs, *items], scope)
  if len(accs) > 1:
    names = [e.name('acc') for _ in new]
    for name, text, v in zip(names, new, op.results, strict=True):
      scope.add(f'const {ctype(v.dtype, op)} {name} = {text};')
    new = names
  scope.add(*(f'{acc} = {text};' for acc, text in zip(accs, new, strict=True)))


def concatenate(b: Block, op: Op, root: Scope) -> None:
  e, d, result = b.e, op.attrs['dimension'], op.results[0]
  place, begin = b.place(result), 0
  for v in op.operands:
    inner, index = Scope(root, wall=True).loops(v.shape, 'i')
    value = e.at(v, index, inner)
    to = [total(i, str(begin)) if k == d else i for k, i in enumerate(index)]
    inner.add(f'{e.element(place, linear(to, strides_of(result.shape)))} = {value};')
    begin += v.shape[d]


def pad(b: Block, op: Op, root: Scope) -> None:
  e, (v, blank), result = b.e, op.operands, op.results[0]
  low, inside = op.attrs['edge_padding_low'], op.attrs['interior_padding']
  place = b.place(result)
  inner, index = Scope(root, wall=True).loops(result.shape, 'i')
  inner.add(
    f'{e.element(place, linear(index, strides_of(result.shape)))} = {e.at(blank, [], inner)};'
  )
  inner, index = Scope(root, wall=True).loops(v.shape, 'i')
  to = [total(times(i, t + 1), str(lo)) for i, t, lo in zip(index, inside, low, strict=True)]
  checks = []
  for k, n in enumerate(result.shape):
    if low[k] < 0:
      checks.append(f'{to[k]} >= 0')
    if low[k] + (v.shape[k] - 1) * (inside[k] + 1) >= n:
      checks.append(f'{to[k]} < {n}')
  value = e.at(v, index, inner)
  if checks:
    inner = Scope(inner, f'if ({" && ".join(checks)})')
  inner.add(f'{e.element(place, linear(to, strides_of(result.shape)))} = {value};')


def dynamic_slice(b: Block, op: Op, root: Scope) -> None:
  e, v, result = b.e, op.operands[0], op.results[0]
  at = [start(b, s, [], v.shape[k] - result.shape[k], root) for k, s in enumerate(op.operands[1:])]
  inner, index = root.loops(result.shape, 'i')
  value = e.at(v, [total(s, i) for s, i in zip(at, index, strict=True)], inner)
  inner.add(f'{e.element(b.place(result), linear(index, strides_of(result.shape)))} = {value};')


def dynamic_update_slice(b: Block, op: Op, root: Scope) -> None:
  e, (v, part), result = b.e, op.operands[:2], op.results[0]
  place = _base(b, op, root)
  at = [start(b, s, [], v.shape[k] - part.shape[k], root) for k, s in enumerate(op.operands[2:])]
  inner, index = root.loops(part.shape, 'i')
  value = e.at(part, index, inner)
  to = [total(s, i) for s, i in zip(at, index, strict=True)]
  inner.add(f'{e.element(place, linear(to, strides_of(result.shape)))} = {value};')


def _base(b: Block, op: Op, root: Scope, k: int = 0, others=None):
  """The first operand in a place that may be changed; a copy goes before this kernel's code."""
  others = op.operands[1:] if others is None else others
  b.scope.items.remove(root)
  place = b.over(op.operands[k], op.results[k], others)
  b.scope.items.append(root)
  return place


def gather(b: Block, op: Op, root: Scope) -> None:
  e, (v, at), result = b.e, op.operands, op.results[0]
  n, sizes = op.attrs['dimension_numbers'], op.attrs['slice_sizes']
  window, vector = n.get('offset_dims', ()), n.get('index_vector_dim', 0)
  collapsed, paired = n.get('collapsed_slice_dims', ()), n.get('operand_batching_dims', ())
  inner, index = root.loops(result.shape, 'i')
  batch = [i for k, i in enumerate(index) if k not in window]
  moved = [k for k in range(len(v.shape)) if k not in collapsed and k not in paired]
  full = ['0'] * len(v.shape)
  for k, d in zip(moved, window, strict=True):
    full[k] = index[d]
  for k, d in zip(paired, n.get('start_indices_batching_dims', ()), strict=True):
    full[k] = batch[d if d < vector else d - 1]
  for q, k in enumerate(n.get('start_index_map', ())):
    where = [*batch[:vector], str(q), *batch[vector:]] if vector < len(at.shape) else batch
    full[k] = total(start(b, at, where, v.shape[k] - sizes[k], inner), full[k])
  value = e.at(v, full, inner)
  inner.add(f'{e.element(b.place(result), linear(index, strides_of(result.shape)))} = {value};')


def scatter(b: Block, op: Op, root: Scope) -> None:
  """In the order of the updates; one whose window does not fit is left out, as StableHLO has it."""
  e, n = b.e, len(op.results)
  at, parts = op.operands[n], op.operands[n + 1 :]
  numbers = op.attrs['scatter_dimension_numbers']
  window, vector = numbers.get('update_window_dims', ()), numbers.get('index_vector_dim', 0)
  paired = numbers.get('input_batching_dims', ())
  inserted = {*numbers.get('inserted_window_dims', ()), *paired}
  rest = [*op.operands[n:]]
  places = [
    _base(b, op, root, k, [*rest, *op.operands[:k], *op.operands[k + 1 : n]]) for k in range(n)
  ]
  target, shape = op.operands[0].shape, parts[0].shape
  inner, index = root.loops(shape, 'i')
  batch = [i for k, i in enumerate(index) if k not in window]
  moved = [k for k in range(len(target)) if k not in inserted]
  full = ['0'] * len(target)
  for k, d in zip(moved, window, strict=True):
    full[k] = index[d]
  for k, d in zip(paired, numbers.get('scatter_indices_batching_dims', ()), strict=True):
    full[k] = batch[d if d < vector else d - 1]
  checks = []
  for q, k in enumerate(numbers.get('scatter_dims_to_operand_dims', ())):
    where = [*batch[:vector], str(q), *batch[vector:]] if vector < len(at.shape) else batch
    last = target[k] - (1 if k in inserted else shape[window[moved.index(k)]])
    raw = f'(int64_t){e.at(at, where, inner)}'
    key = (at, 'raw', tuple(where))
    name = inner.find(key) or inner.local(key, e.name('s'), 'int64_t', raw, where)
    checks.append(f'{name} >= 0 && {name} <= {last}')
    full[k] = total(f'(int32_t){name}', full[k])
  if checks:
    inner = Scope(inner, f'if ({" && ".join(checks)})')
  items = [e.at(v, index, inner) for v in parts]
  cells = [e.element(p, linear(full, strides_of(target))) for p in places]
  old = [e.name('acc') for _ in range(n)]
  body = op.regions[0]
  if any(a in body.outs or any(a in o.operands for o in body.ops) for a in body.args[:n]):
    for name, cell, v in zip(old, cells, op.results, strict=True):
      inner.add(f'const {ctype(v.dtype, op)} {name} = {cell};')
  new = e.region(body, [*old, *items], inner)
  inner.add(*(f'{cell} = {text};' for cell, text in zip(cells, new, strict=True)))


KERNELS = {
  f.__name__: f
  for f in (reduce, concatenate, pad, dynamic_slice, dynamic_update_slice, gather, scatter)
}
