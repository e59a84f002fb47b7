"""StableHLO as IREE runs it right: indices kept in range, decompositions written out.

StableHLO clamps the indices of a gather and drops updates of a scatter that are out of range. IREE does
neither: it reads and writes what is there, without a word. So the indices of every gather are clamped in the
module itself, and every scatter gets an operand with rows to waste, unless its source says that it is in
bounds (`mode='promise_in_bounds'`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.edge import iree_solve
from cl_jax.edge.stablehlo import DTYPES, where


class Safe(NamedTuple):
  """The functions of a program, and what was changed in it.

  Attributes:
    text: MLIR functions, private, whose names begin with a prefix; PREFIXmain is the program.
    guarded: places of the scatters that got rows to waste.
  """

  text: str
  guarded: tuple[str, ...]


def safe(module: Any, prefix: str, kept: set[str]) -> Safe:
  """The functions of a StableHLO module with indices in range and without calls into libraries.

  Args:
    module: as `learner.lower` returns it; it is not changed.
    prefix: of the functions' names.
    kept: see `lint.promised`.
  """
  from jaxlib.mlir import ir

  text = module.operation.get_asm(enable_debug_info=True)
  rewrite = _Rewrite(prefix, kept)
  with module.context, ir.Location.unknown():
    copy = ir.Module.parse(text)
    for op in list(copy.body):
      rewrite.function(op.operation)
    texts = [str(op) for op in copy.body]
  return Safe('\n'.join([*texts, *rewrite.helpers.values()]), tuple(dict.fromkeys(rewrite.guarded)))


class _Rewrite:
  """Of one module; `helpers` are functions that were added, by what they do."""

  def __init__(self, prefix: str, kept: set[str]):
    self.prefix, self.kept = prefix, kept
    self.helpers: dict[Any, str] = {}
    self.guarded: list[str] = []

  def function(self, op: Any) -> None:
    from jaxlib.mlir import ir

    op.attributes['sym_name'] = ir.StringAttr.get(self.prefix + op.attributes['sym_name'].value)
    op.attributes['sym_visibility'] = ir.StringAttr.get('private')
    for name in ('arg_attrs', 'res_attrs'):  # memory kinds and names, which mean nothing here
      if name in op.attributes:
        del op.attributes[name]
    self.inside(op)

  def inside(self, op: Any) -> None:
    from jaxlib.mlir import ir

    for region in op.regions:
      for block in region.blocks:
        for view in list(block.operations):
          inner = view.operation
          for name in ('callee', 'decomposition'):
            if name in inner.attributes:
              symbol = self.prefix + inner.attributes[name].value
              inner.attributes[name] = ir.FlatSymbolRefAttr.get(symbol)
          self.inside(inner)
          kind = inner.name.removeprefix('stablehlo.')
          if rule := RULES.get(kind):
            rule(self, inner)

  def call(self, before: Any, key: tuple, f: Callable, operands: Sequence[Any]) -> list[Any]:
    """Inserts a call of f, as JAX lowers it, before an operation."""
    from jaxlib.mlir import ir

    kinds = [shape_of(o) for o in operands]
    key = (*key, *map(str, kinds))
    name = f'{self.prefix}safe{list(self.helpers).index(key) if key in self.helpers else len(self.helpers)}_'
    if key not in self.helpers:
      self.helpers[key] = ''  # its place
      lowered = jax.jit(f, keep_unused=True).trace(*kinds).lower(lowering_platforms=('tpu',))
      inner = _Rewrite(name, set())
      own = ir.Module.parse(str(lowered.compiler_ir('stablehlo')))
      for op in own.body:
        inner.function(op.operation)
      self.helpers[key] = '\n'.join([*map(str, own.body), *inner.helpers.values()])
    outs = [
      ir.RankedTensorType.get(a.shape, _element(a.dtype))
      for a in jax.tree.leaves(jax.eval_shape(f, *kinds))
    ]
    with ir.InsertionPoint(before):
      made = ir.Operation.create(
        'func.call', outs, list(operands), {'callee': ir.FlatSymbolRefAttr.get(f'{name}main')}
      )
    return list(made.results)


def gather(r: _Rewrite, op: Any) -> None:
  from jaxlib.mlir.dialects import stablehlo

  operand, index = op.operands
  n = stablehlo.GatherDimensionNumbers(op.attributes['dimension_numbers'])
  dims = tuple(n.start_index_map)
  sizes = tuple(op.attributes['slice_sizes'])
  last = np.array([operand.type.shape[d] - sizes[d] for d in dims])
  op.operands[1] = r.call(
    op,
    ('clamp', n.index_vector_dim, *last),
    lambda i: clamped(i, last, n.index_vector_dim),
    [index],
  )[0]


def scatter(r: _Rewrite, op: Any) -> None:
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import stablehlo

  line, place = where(str(op.location))
  if line in r.kept:
    return
  many = (len(op.operands) - 1) // 2
  operand, index, update = op.operands[0], op.operands[many], op.operands[many + 1]
  n = stablehlo.ScatterDimensionNumbers(op.attributes['scatter_dimension_numbers'])
  dims, axis = tuple(n.scattered_dims_to_operand_dims), n.index_vector_dim
  if not dims:
    return
  r.guarded.append(place)
  shape = operand.type.shape
  single = {*n.inserted_window_dims, *n.input_batching_dims}
  windows = iter(update.type.shape[d] for d in n.update_window_dims)
  sizes = [1 if d in single else next(windows) for d in range(len(shape))]
  last = np.array([shape[d] - sizes[d] for d in dims])
  waste = np.array([shape[dims[0]], *([0] * (len(dims) - 1))])
  op.operands[many] = r.call(
    op, ('waste', axis, *last, *waste), lambda i: wasted(i, last, waste, axis), [index]
  )[0]
  pad = [(0, sizes[d] if d == dims[0] else 0, 0) for d in range(len(shape))]
  for k in range(many):
    widen = lambda a: jax.lax.pad(a, jnp.zeros((), a.dtype), pad)  # noqa: E731
    op.operands[k] = r.call(op, ('pad', *pad), widen, [op.operands[k]])[0]
  kinds = [op.operands[k].type for k in range(many)]
  with ir.InsertionPoint(op):
    wide = ir.Operation.create(
      'stablehlo.scatter', kinds, list(op.operands),
      {name: op.attributes[name] for name in op.attributes}, regions=1,
    )  # fmt: skip
    op.regions[0].blocks[0].append_to(wide.regions[0])
  for k in range(many):
    cut = lambda a: a[tuple(slice(0, d) for d in shape)]  # noqa: E731
    op.results[k].replace_all_uses_with(r.call(op, ('cut', *shape), cut, [wide.results[k]])[0])
  op.erase()


def clamped(index: jax.Array, last: np.ndarray, axis: int) -> jax.Array:
  """Indices of a gather between 0 and `last`, as StableHLO has them."""
  return jnp.clip(index, 0, _along(last, index, axis))


def wasted(index: jax.Array, last: np.ndarray, waste: np.ndarray, axis: int) -> jax.Array:
  """Indices of a scatter; those that are out of range become `waste`."""
  out = (index < 0) | (index > _along(last, index, axis))
  if axis < index.ndim:
    out = out.any(axis, keepdims=True)
  return jnp.where(out, _along(waste, index, axis), index)


def _along(values: np.ndarray, index: jax.Array, axis: int) -> jax.Array:
  """One value for each entry of the index vector; without an axis for them there is one entry."""
  shape = [len(values) if d == axis else 1 for d in range(index.ndim)]
  return jnp.asarray(values, index.dtype).reshape(shape)


def reshape(r: _Rewrite, op: Any) -> None:
  """A barrier after a reshaped slice of bytes: IREE moves the conversion of images through the reshape.

  In 3.13 the result may then have the shape of before, and the module does not compile.
  """
  from jaxlib.mlir import ir

  owner = op.operands[0].owner
  sliced = ('stablehlo.slice', 'stablehlo.dynamic_slice')
  if isinstance(owner, ir.Block) or owner.operation.name not in sliced:
    return
  if str(op.results[0].type.element_type) not in ('i8', 'ui8'):
    return
  with ir.InsertionPoint.after(op):
    barrier = ir.Operation.create(
      'stablehlo.optimization_barrier', [op.results[0].type], [op.results[0]]
    )
  op.results[0].replace_all_uses_except(barrier.results[0], barrier)


def custom_call(r: _Rewrite, op: Any) -> None:
  if op.attributes['call_target_name'].value == 'LuDecomposition' and _plain(op):
    _replace(op, r.call(op, ('lu',), _mapped(iree_solve.lu, op), list(op.operands)))


def cholesky(r: _Rewrite, op: Any) -> None:
  lower = bool(op.attributes['lower'].value) if 'lower' in op.attributes else False
  if _plain(op):
    f = _mapped(lambda a: iree_solve.cholesky(a, lower), op)
    _replace(op, r.call(op, ('cholesky', lower), f, list(op.operands)))


def triangular_solve(r: _Rewrite, op: Any) -> None:
  flags = [bool(op.attributes[k].value) for k in ('left_side', 'lower', 'unit_diagonal')]
  flags.append('NO_TRANSPOSE' not in str(op.attributes['transpose_a']))
  if _plain(op):
    f = _mapped(lambda a, b: iree_solve.triangular(a, b, *flags), op)
    _replace(op, r.call(op, ('triangular', *flags), f, list(op.operands)))


RULES: dict[str, Callable[[_Rewrite, Any], None]] = {
  f.__name__: f for f in (gather, scatter, reshape, custom_call, cholesky, triangular_solve)
}


def _mapped(f: Callable, op: Any) -> Callable:
  for _ in range(len(op.operands[0].type.shape) - 2):
    f = jax.vmap(f)
  return f


def _plain(op: Any) -> bool:
  """A square f32 matrix, or a stack of them: what `iree_solve` is written for."""
  kind = op.operands[0].type
  return str(kind.element_type) == 'f32' and kind.shape[-1] == kind.shape[-2]


def _replace(op: Any, results: Sequence[Any]) -> None:
  for old, new in zip(op.results, results, strict=True):
    old.replace_all_uses_with(new)
  op.erase()


def shape_of(value: Any) -> jax.ShapeDtypeStruct:
  name = str(value.type.element_type)
  return jax.ShapeDtypeStruct(
    tuple(value.type.shape), jnp.bfloat16 if name == 'bf16' else DTYPES[name]
  )


def _element(dtype: Any) -> Any:
  from jax.interpreters import mlir

  return mlir.dtype_to_ir_type(np.dtype(dtype))
