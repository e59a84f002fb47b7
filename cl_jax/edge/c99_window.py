"""Kernels over windows: pooling, its gradient, cumulative sums."""

from __future__ import annotations

from cl_jax.edge.c99_block import Block
from cl_jax.edge.c99_expr import ctype
from cl_jax.edge.c99_ops import update
from cl_jax.edge.c99_scope import Scope, linear, times, total
from cl_jax.edge.c99_view import strides_of
from cl_jax.edge.stablehlo import Op


def window(b: Block, op: Op, out: list[str], shape: tuple[int, ...], scope: Scope):
  """Loops over the window of an output; the innermost scope runs for places inside the operand only."""
  one = (1,) * len(shape)
  sizes, steps = op.attrs['window_dimensions'], op.attrs.get('window_strides', one)
  spread = op.attrs.get('base_dilations', one)
  holes = op.attrs.get('window_dilations', one)
  low = [int(p[0]) for p in op.attrs['padding']] if 'padding' in op.attrs else [0] * len(shape)
  inner, within = scope.loops(sizes, 'w')
  source, checks = [], []
  for d, n in enumerate(shape):
    position = total(times(out[d], steps[d]), times(within[d], holes[d]), str(-low[d]))
    if (sizes[d], steps[d], low[d], spread[d]) == (1, 1, 0, 1):
      source.append(position)
      continue
    y = inner.declare(b.e.name('y'), '')
    inner.items[-1] = f'const int32_t {y} = {position};'
    check = f'{y} >= 0 && {y} < {(n - 1) * spread[d] + 1}'
    checks.append(check + (f' && {y} % {spread[d]} == 0' if spread[d] > 1 else ''))
    source.append(f'{y} / {spread[d]}' if spread[d] > 1 else y)
  if checks:
    inner = Scope(inner, f'if ({" && ".join(checks)})', source)
  return inner, source


def reduce_window(b: Block, op: Op, root: Scope) -> None:
  e, n = b.e, len(op.results)
  sources, inits = op.operands[:n], op.operands[n:]
  out = op.results[0].shape
  middle, index = root.loops(out, 'i')
  accs = [e.name('acc') for _ in range(n)]
  for acc, v in zip(accs, inits, strict=True):
    middle.add(f'{ctype(v.dtype, op)} {acc} = {e.at(v, [], middle)};')
  inner, source = window(b, op, index, sources[0].shape, middle)
  update(b, op, accs, [e.at(v, source, inner) for v in sources], inner)
  for acc, v in zip(accs, op.results, strict=True):
    middle.add(f'{e.element(b.place(v), linear(index, strides_of(out)))} = {acc};')


def select_and_scatter(b: Block, op: Op, root: Scope) -> None:
  """The gradient of max pooling: each value goes to the first element of its window that wins."""
  e, (v, part, init), result = b.e, op.operands, op.results[0]
  choose, combine = op.regions
  kind, place = ctype(v.dtype, op), b.place(result)
  clear, index = Scope(root, wall=True).loops(result.shape, 'i')
  clear.add(f'{e.element(place, linear(index, strides_of(v.shape)))} = {e.at(init, [], clear)};')
  middle, index = root.loops(part.shape, 'i')
  best, where = e.name('acc'), e.name('acc')
  middle.add(f'{kind} {best} = 0;', f'int32_t {where} = -1;')
  inner, source = window(b, op, index, v.shape, middle)
  at = linear(source, strides_of(v.shape))
  item = e.at(v, source, inner)
  keep = e.region(choose, [best, item], inner)[0]
  take = Scope(inner, f'if ({where} < 0 || !{keep})')
  take.add(f'{best} = {item};', f'{where} = {at};')
  value = e.at(part, index, middle)
  last = Scope(middle, f'if ({where} >= 0)')
  cell, old = e.element(place, where), e.name('acc')
  last.add(f'const {ctype(result.dtype, op)} {old} = {cell};')
  last.add(f'{cell} = {e.region(combine, [old, value], last)[0]};')


KERNELS = {f.__name__: f for f in (reduce_window, select_and_scatter)}
