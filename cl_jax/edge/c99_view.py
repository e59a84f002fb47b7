"""Views: values that are index arithmetic over memory."""

from __future__ import annotations

import dataclasses
import math

from cl_jax.edge.c99_expr import ELEMENTWISE
from cl_jax.edge.stablehlo import Op, Value

SOURCES = {'constant', 'iota'}
VIEWS = {'broadcast_in_dim', 'transpose', 'slice', 'reverse', 'reshape'}
LAZY = {*ELEMENTWISE, *SOURCES, *VIEWS}


def lazy(v: Value) -> bool:
  return v.op is not None and v.op.name in LAZY


def is_elementwise(v: Value) -> bool:
  return v.op is not None and v.op.name in ELEMENTWISE and not widens(v.op)


def widens(op: Op) -> bool:
  """A bitcast between widths, which has an axis more on one side."""
  return op.name == 'bitcast_convert' and op.operands[0].shape != op.results[0].shape


def without_ones(shape: tuple[int, ...]) -> list[int]:
  return [n for n in shape if n != 1]


def relabels(op: Op) -> bool:
  """A reshape that only adds or drops axes of one, so that it needs no linear index."""
  return without_ones(op.operands[0].shape) == without_ones(op.results[0].shape)


def flat_view(op: Op) -> bool:
  """A reshape that may be evaluated element by element whatever its operand is."""
  return relabels(op) or len(op.operands[0].shape) == 1


def strides_of(shape: tuple[int, ...]) -> list[int]:
  return [math.prod(shape[k + 1 :]) for k in range(len(shape))]


@dataclasses.dataclass
class Affine:
  """A view as memory: element idx is base[offset + sum of strides * idx]."""

  base: Value
  offset: int
  strides: list[int]


def affine(v: Value, stored: set[Value]) -> Affine | None:
  """The view of a stored value or a constant that v is; None where it is something else."""
  if v in stored or not lazy(v):
    return Affine(v, 0, strides_of(v.shape))
  op = v.op
  assert op is not None
  if op.name == 'constant':
    if v.size > 1 and op.attrs['value'].strides.count(0) == len(v.shape):
      return Affine(v, 0, [0] * len(v.shape))
    return Affine(v, 0, strides_of(v.shape))
  if op.name not in VIEWS:
    return None
  below = affine(op.operands[0], stored)
  if below is None:
    return None
  source, strides = op.operands[0].shape, below.strides
  if op.name == 'transpose':
    return Affine(below.base, below.offset, [strides[p] for p in op.attrs['permutation']])
  if op.name == 'slice':
    offset = sum(a * s for a, s in zip(op.attrs['start_indices'], strides, strict=True))
    steps = [s * t for s, t in zip(strides, op.attrs['strides'], strict=True)]
    return Affine(below.base, below.offset + offset, steps)
  if op.name == 'reverse':
    offset, turned = below.offset, list(strides)
    for d in op.attrs['dimensions']:
      offset += (source[d] - 1) * strides[d]
      turned[d] = -strides[d]
    return Affine(below.base, offset, turned)
  if op.name == 'broadcast_in_dim':
    out = [0] * len(v.shape)
    for k, d in enumerate(op.attrs['broadcast_dimensions']):
      out[d] = strides[k] if source[k] != 1 else 0
    return Affine(below.base, below.offset, out)
  if relabels(op):
    rest = iter([s for s, n in zip(strides, source, strict=True) if n != 1])
    return Affine(below.base, below.offset, [next(rest) if n != 1 else 0 for n in v.shape])
  steps = [(s, n) for s, n in zip(strides, source, strict=True) if n != 1]
  if all(a[0] == b[0] * b[1] for a, b in zip(steps, steps[1:], strict=False)):
    last = steps[-1][0] if steps else 1
    return Affine(below.base, below.offset, [last * s for s in strides_of(v.shape)])
  return None
