"""Kernels of linear algebra: products, convolutions, triangular systems."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cl_jax.edge.arena import Place
from cl_jax.edge.c99_block import Block
from cl_jax.edge.c99_expr import ctype, refused
from cl_jax.edge.c99_scope import Scope, linear
from cl_jax.edge.c99_view import strides_of
from cl_jax.edge.stablehlo import Op, Value

# Every element is one sum over k in order, whatever the blocks: the blocks only share what is loaded.
PRODUCT = """/* c[m, n] = sum over k of a[m * am + k * ak] b[k * bk + n * bn], in blocks of 4 x 4. */
static void h_product_NAME(TC *c, const TA *a, const TB *b, int32_t rows, int32_t columns, int32_t depth,
                           int32_t am, int32_t ak, int32_t bk, int32_t bn) {
  for (int32_t m = 0; m < rows; m += 4) {
    for (int32_t n = 0; n < columns; n += 4) {
      const int32_t height = rows - m < 4 ? rows - m : 4, width = columns - n < 4 ? columns - n : 4;
      ACC sum[4][4] = {{0}};
      const TA *p = a + m * am;
      const TB *q = b + n * bn;
      if (height == 4 && width == 4) {
        for (int32_t k = 0; k < depth; k++)
          for (int32_t i = 0; i < 4; i++)
            for (int32_t j = 0; j < 4; j++)
              sum[i][j] += (ACC)p[i * am + k * ak] * (ACC)q[k * bk + j * bn];
      } else {
        for (int32_t k = 0; k < depth; k++)
          for (int32_t i = 0; i < height; i++)
            for (int32_t j = 0; j < width; j++)
              sum[i][j] += (ACC)p[i * am + k * ak] * (ACC)q[k * bk + j * bn];
      }
      for (int32_t i = 0; i < height; i++)
        for (int32_t j = 0; j < width; j++) c[(m + i) * columns + n + j] = (TC)sum[i][j];
    }
  }
}"""

CHOLESKY = """/* In place: l with l l^T = a, the other half zero; all NaN where a is not positive definite. */
static void h_cholesky(float *a, int32_t n, int32_t row, int32_t column) {
  int32_t fine = 1;
  for (int32_t j = 0; j < n; j++) {
    float d = a[j * row + j * column];
    for (int32_t k = 0; k < j; k++) d -= a[j * row + k * column] * a[j * row + k * column];
    fine = fine && d > 0;
    d = m_sqrt(d);
    a[j * row + j * column] = d;
    for (int32_t i = j + 1; i < n; i++) {
      float s = a[i * row + j * column];
      for (int32_t k = 0; k < j; k++) s -= a[i * row + k * column] * a[j * row + k * column];
      a[i * row + j * column] = s / d;
    }
  }
  for (int32_t i = 0; i < n; i++)
    for (int32_t j = 0; j < n; j++) {
      if (j > i) a[i * row + j * column] = 0.0f;
      if (!fine) a[i * row + j * column] = m_float(0x7fc00000u);
    }
}"""

TRIANGULAR = """/* x <- a^-1 x for a triangular a: n unknowns, m right sides. */
static void h_triangular(float *x, const float *a, int32_t n, int32_t m, int32_t xrow, int32_t xcolumn,
                         int32_t arow, int32_t acolumn, int32_t lower, int32_t unit) {
  for (int32_t t = 0; t < n; t++) {
    const int32_t i = lower ? t : n - 1 - t;
    for (int32_t c = 0; c < m; c++) {
      float s = x[i * xrow + c * xcolumn];
      for (int32_t u = 0; u < t; u++) {
        const int32_t k = lower ? u : n - 1 - u;
        s -= a[i * arow + k * acolumn] * x[k * xrow + c * xcolumn];
      }
      x[i * xrow + c * xcolumn] = unit ? s : s / a[i * arow + i * acolumn];
    }
  }
}"""

LU = """/* In place: a[permutation] = l u with partial pivoting. */
static void h_lu(float *a, int32_t *pivots, int32_t *permutation, int32_t n) {
  for (int32_t i = 0; i < n; i++) permutation[i] = i;
  for (int32_t j = 0; j < n; j++) {
    int32_t best = j;
    for (int32_t i = j + 1; i < n; i++)
      if (m_abs(a[i * n + j]) > m_abs(a[best * n + j])) best = i;
    pivots[j] = best;
    if (best != j) {
      const int32_t p = permutation[j];
      permutation[j] = permutation[best];
      permutation[best] = p;
      for (int32_t k = 0; k < n; k++) {
        const float t = a[j * n + k];
        a[j * n + k] = a[best * n + k];
        a[best * n + k] = t;
      }
    }
    for (int32_t i = j + 1; i < n; i++) {
      const float f = a[i * n + j] = a[i * n + j] / a[j * n + j];
      for (int32_t k = j + 1; k < n; k++) a[i * n + k] -= f * a[j * n + k];
    }
  }
}"""


def merged(shape: Sequence[int], strides: Sequence[int]) -> int | None:
  """The one stride of axes that are walked as one; None where they cannot be."""
  axes = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
  if any(a[1] != b[0] * b[1] for a, b in zip(axes, axes[1:], strict=False)):
    return None
  return axes[-1][1] if axes else 0


def dot_general(b: Block, op: Op, root: Scope) -> None:
  e, (left, right), result = b.e, op.operands, op.results[0]
  n = op.attrs['dot_dimension_numbers']
  sides = []
  for v, side in ((left, 'lhs'), (right, 'rhs')):
    batch = n.get(f'{side}_batching_dimensions', ())
    summed = n.get(f'{side}_contracting_dimensions', ())
    free = [k for k in range(len(v.shape)) if k not in batch and k not in summed]
    sides.append((v, *_packed(b, v, [list(batch), free, list(summed)], root)))
  (_, pa, oa, sa, fa, ka, rows, depth), (_, pb, ob, sb, fb, kb, columns, _) = sides
  kinds = [v.dtype for v in (result, left, right)]
  real = result.dtype == 'f32'
  if 'i1' in kinds:  # which is any or not, where this counts
    raise refused(op, ' of i1')
  if real and kinds != ['f32'] * 3:
    raise refused(op, f' of {left.dtype} and {right.dtype}')
  name = '_'.join(dict.fromkeys(kinds))
  acc = 'float' if real else 'uint64_t' if result.dtype.endswith('64') else 'uint32_t'
  text = PRODUCT.replace('NAME', name).replace('ACC', acc)
  for mark, dtype in zip(('TC', 'TA', 'TB'), kinds, strict=True):
    text = text.replace(mark, ctype(dtype, op))
  e.helpers[f'h_product_{name}'] = text
  lead = [left.shape[k] for k in n.get('lhs_batching_dimensions', ())]
  e.macs += e.times * math.prod(lead) * rows * columns * depth
  inner, index = root.loops(lead, 'i')
  block = [s * rows * columns for s in strides_of(tuple(lead))]
  place = b.place(result)
  inner.add(
    f'h_product_{name}({e.pointer(place, linear(index, block))}, {e.pointer(pa, linear(index, sa, oa))}, '
    f'{e.pointer(pb, linear(index, sb, ob))}, {rows}, {columns}, {depth}, {fa}, {ka}, {kb}, {fb});'
  )


def _packed(b: Block, v: Value, groups: list[list[int]], root: Scope):
  """(place, offset, batch strides, stride of the free axes, of the summed ones, their sizes).

  A copy in the order of the groups where the axes of a group are no single stride apart.
  """
  place, offset, strides = b.e.memory(v)
  pick = lambda axes: ([v.shape[k] for k in axes], [strides[k] for k in axes])  # noqa: E731
  free, summed = merged(*pick(groups[1])), merged(*pick(groups[2]))
  sizes = [math.prod(v.shape[k] for k in axes) for axes in groups[1:]]
  if free is not None and summed is not None:
    return place, offset, [strides[k] for k in groups[0]], free, summed, *sizes
  order = [k for axes in groups for k in axes]
  shape = tuple(v.shape[k] for k in order)
  copy = b.e.arena.new(v.size, v.dtype)
  inner, index = Scope(root, wall=True).loops(shape, 'p')
  source = ['0'] * len(order)
  for i, k in zip(index, order, strict=True):
    source[k] = i
  value = b.e.element(place, linear(source, strides, offset))
  inner.add(f'{b.e.element(copy, linear(index, strides_of(shape)))} = {value};')
  lead = strides_of(shape)[: len(groups[0])]
  return copy, 0, lead, sizes[1], 1, *sizes


def cholesky(b: Block, op: Op, root: Scope) -> None:
  e, result = b.e, op.results[0]
  e.helpers['h_cholesky'] = CHOLESKY
  place, n = _into(b, op, 0, root), result.shape[-1]
  row, column = (n, 1) if op.attrs.get('lower') else (1, n)
  inner, at = _matrices(result, root)
  inner.add(f'h_cholesky({e.pointer(place, at)}, {n}, {row}, {column});')


def triangular_solve(b: Block, op: Op, root: Scope) -> None:
  e, a, result = b.e, op.operands[0], op.results[0]
  e.helpers['h_triangular'] = TRIANGULAR
  place = _into(b, op, 1, root)
  pa, offset, sa = e.memory(a)
  left, lower = op.attrs['left_side'], op.attrs['lower']
  n, m = result.shape[-2:] if left else result.shape[:-3:-1]
  arow, acolumn = sa[-2:]
  xrow, xcolumn = (result.shape[-1], 1) if left else (1, result.shape[-1])
  turned = (op.attrs['transpose_a'] != 'NO_TRANSPOSE') != (not left)
  if turned:
    arow, acolumn, lower = acolumn, arow, not lower
  inner, index = root.loops(result.shape[:-2], 'i')
  at = linear(index, strides_of(result.shape)[:-2])
  matrix = e.pointer(pa, linear(index, sa[:-2], offset))
  inner.add(
    f'h_triangular({e.pointer(place, at)}, {matrix}, {n}, {m}, {xrow}, {xcolumn}, {arow}, {acolumn}, '
    f'{int(lower)}, {int(op.attrs["unit_diagonal"])});'
  )


def custom_call(b: Block, op: Op, root: Scope) -> None:
  """LU decomposition; every other call is into a library that a device does not have."""
  e = b.e
  square = op.operands and op.operands[0].shape[-1:] == op.operands[0].shape[-2:-1]
  if op.attrs['call_target_name'] != 'LuDecomposition' or not square:
    raise refused(op)
  e.helpers['h_lu'] = LU
  matrix, pivots, order = op.results
  place = _into(b, op, 0, root)
  n = matrix.shape[-1]
  inner, index = root.loops(matrix.shape[:-2], 'i')
  lead = strides_of(pivots.shape)[:-1]
  rest = [e.pointer(b.place(v), linear(index, lead)) for v in (pivots, order)]
  at = e.pointer(place, linear(index, strides_of(matrix.shape)[:-2]))
  inner.add(f'h_lu({at}, {", ".join(rest)}, {n});')


def _into(b: Block, op: Op, k: int, root: Scope) -> Place:
  """A copy of operand k as the first result, written before."""
  if op.results[0].dtype != 'f32':
    raise refused(op, f' on {op.results[0].dtype}')
  place = b.place(op.results[0])
  b.fill(place, op.operands[k], root)
  return place


def _matrices(v: Value, root: Scope) -> tuple[Scope, str]:
  inner, index = root.loops(v.shape[:-2], 'i')
  return inner, linear(index, strides_of(v.shape)[:-2])


KERNELS = {f.__name__: f for f in (dot_general, cholesky, triangular_solve, custom_call)}
