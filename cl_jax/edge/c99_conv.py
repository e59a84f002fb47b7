"""Convolutions: forward, and the two gradients that XLA writes as convolutions."""

from __future__ import annotations

import math

from cl_jax.edge.c99_block import Block
from cl_jax.edge.c99_expr import refused
from cl_jax.edge.c99_scope import Scope, linear, times, total
from cl_jax.edge.c99_view import strides_of
from cl_jax.edge.stablehlo import Op


def convolution(b: Block, op: Op, root: Scope) -> None:
  """Every output is one sum in the order of the window, then of the input features."""
  e, (left, right), result = b.e, op.operands, op.results[0]
  if {left.dtype, right.dtype, result.dtype} != {'f32'}:
    raise refused(op, f' of {left.dtype} and {right.dtype}')
  n = op.attrs['dimension_numbers']
  (lb, lf, ls), (ki, ko, ks), (ob, of, os) = n['input'], n['kernel'], n['output']
  groups, batches = op.attrs['feature_group_count'], op.attrs['batch_group_count']
  count = len(ls)
  one = (1,) * count
  steps = op.attrs.get('window_strides', one)
  spread, holes = op.attrs.get('lhs_dilation', one), op.attrs.get('rhs_dilation', one)
  turned = op.attrs.get('window_reversal', (False,) * count)
  low = [int(p[0]) for p in op.attrs['padding']] if 'padding' in op.attrs else [0] * count
  place, (pl, ol, sl), (pr, orr, sr) = b.place(result), e.memory(left), e.memory(right)
  so = strides_of(result.shape)
  many = max(groups, batches)
  width = result.shape[of] // many  # output features of a group
  depth = right.shape[ki]
  window = math.prod(right.shape[k] for k in ks)
  e.macs += e.times * result.size * depth * window // math.prod(spread)
  shape = [result.shape[ob], *(result.shape[k] for k in os), many]
  outer, index = root.loops(shape, 'i')
  batch, out, group = index[0], index[1:-1], index[-1]

  def to(feature: str) -> str:
    axes = [batch, *out, total(times(group, width), feature)]
    return e.element(place, linear(axes, [so[ob], *(so[k] for k in os), so[of]]))

  clear, (f,) = outer.loops([width], 'f')
  clear.add(f'{to(f)} = 0.0f;')
  inner = outer
  source, kernel = [], []
  for d in range(count):
    inner, (w,) = inner.loops([right.shape[ks[d]]], f'w{d}_')
    y = e.name('y')
    position = total(times(out[d], steps[d]), times(w, holes[d]), str(-low[d]))
    inner.declare(y, f'const int32_t {y} = {position};')
    check = f'{y} >= 0 && {y} < {(left.shape[ls[d]] - 1) * spread[d] + 1}'
    if spread[d] > 1:
      check += f' && {y} % {spread[d]} == 0'
    inner = Scope(inner, f'if ({check})')
    source.append(f'{y} / {spread[d]}' if spread[d] > 1 else y)
    kernel.append(total(str(right.shape[ks[d]] - 1), times(w, -1)) if turned[d] else w)
  deep, (c,) = inner.loops([depth], 'c')
  deep, (f,) = deep.loops([width], 'f')
  row = batch if batches == 1 else total(times(group, result.shape[ob]), batch)
  channel = c if groups == 1 else total(times(group, depth), c)
  x = e.element(pl, linear([row, *source, channel], [sl[lb], *(sl[k] for k in ls), sl[lf]], ol))
  axes = [c, total(times(group, width), f), *kernel]
  weight = e.element(pr, linear(axes, [sr[ki], sr[ko], *(sr[k] for k in ks)], orr))
  deep.add(f'{to(f)} += {x} * {weight};')


KERNELS = {'convolution': convolution}
