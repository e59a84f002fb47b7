"""StableHLO as a few plain objects: a module is parsed and its calls are inlined."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np

from cl_jax.errors import UserError

DTYPES = {
  'i1': np.bool_,
  'f32': np.float32,
  'f64': np.float64,
  'bf16': np.float32,
  **{f'i{n}': np.dtype(f'int{n}') for n in (8, 16, 32, 64)},
  **{f'ui{n}': np.dtype(f'uint{n}') for n in (8, 16, 32, 64)},
}


@dataclasses.dataclass(eq=False, repr=False)
class Value:
  """A tensor of the program.

  Attributes:
    shape: dimensions.
    dtype: as MLIR writes it: 'f32', 'i32', 'ui32', 'i1', ...
    op: what computes it; None of arguments.
  """

  shape: tuple[int, ...]
  dtype: str
  op: Op | None = None

  @property
  def size(self) -> int:
    return math.prod(self.shape)


@dataclasses.dataclass(eq=False, repr=False)
class Op:
  """An operation: name without its dialect, attributes as Python values, nested regions."""

  name: str
  operands: list[Value]
  results: list[Value]
  attrs: dict[str, Any]
  regions: list[Region]
  places: tuple  # MLIR locations: of the operation, then of the calls around it

  def where(self) -> str:
    """'file.py:12 (method ewc)': the Python source, and the method where one is on the stack."""
    return where(' '.join(str(place) for place in self.places))[1]


def where(text: str) -> tuple[str, str]:
  """Of an MLIR location: the first 'FILE:LINE', and 'file.py:12 (method ewc)' to print."""
  lines = re.findall(r'"([^"]+\.py)":(\d+)', text)
  if not lines:
    return '', 'an unknown line'
  file, line = lines[0]
  found = re.search(r'cl_jax/methods/(?:\w+/)*(\w+)\.py', text)
  method = f' (method {found[1]})' if found else ''
  short = re.sub(r'^.*/(?=(?:cl_jax|tests|jax)/)', '', file)
  return f'{file}:{line}', f'{short}:{line}{method}'


@dataclasses.dataclass(eq=False, repr=False)
class Region:
  """A block: its arguments, operations in order, and what it returns."""

  args: list[Value]
  ops: list[Op]
  outs: list[Value]


def parse(module: Any) -> Region:
  """The `main` function of a StableHLO module.

  Args:
    module: an MLIR module, as `lowered.compiler_ir('stablehlo')` gives it, or its text.

  Raises:
    UserError: text that is no module.
  """
  from jaxlib.mlir import ir

  if isinstance(module, str):
    from jax.interpreters import mlir

    context = mlir.make_ir_context()
    context.enable_multithreading(False)  # or every context starts threads of its own
    try:
      with context:
        module = ir.Module.parse(module)
    except ir.MLIRError as error:
      raise UserError(
        f'this is no StableHLO module ({str(error).splitlines()[-1]}): give what lower() returns'
      ) from error
  functions = {op.operation.attributes['sym_name'].value: op.operation for op in module.body}
  main = functions['main'].regions[0].blocks[0]
  region = _block(main, {}, functions, ())
  return region


def _block(block: Any, env: dict, functions: dict, calls: tuple) -> Region:
  args = [_value(a.type) for a in block.arguments]
  env.update(zip(block.arguments, args, strict=True))
  ops: list[Op] = []
  outs = _inline(block, env, functions, calls, ops)
  return Region(args, ops, outs)


def _inline(block: Any, env: dict, functions: dict, calls: tuple, ops: list[Op]) -> list[Value]:
  """Appends the operations of an MLIR block to `ops`; returns what the block returns."""
  for view in block.operations:
    op = view.operation
    name = op.name.split('.', 1)[1]
    operands = [env[o] for o in op.operands]
    if name == 'return':
      return operands
    if name in ('call', 'composite'):
      symbol = op.attributes['callee' if name == 'call' else 'decomposition'].value
      body = functions[symbol].regions[0].blocks[0]
      inner = {**env, **dict(zip(body.arguments, operands, strict=True))}
      results = _inline(body, inner, functions, (op.location, *calls), ops)
      env.update(zip(op.results, results, strict=True))
      continue
    results = [_value(r.type) for r in op.results]
    if name == 'optimization_barrier' or (
      name in ('reshape', 'convert')
      and (operands[0].shape, operands[0].dtype) == (results[0].shape, results[0].dtype)
    ):
      env.update(zip(op.results, operands, strict=True))
      continue
    regions = [_block(r.blocks[0], dict(env), functions, calls) for r in op.regions]
    attrs = {name: _attribute(op.attributes[name]) for name in op.attributes}
    new = Op(name, operands, results, attrs, regions, (op.location, *calls))
    for result in results:
      result.op = new
    ops.append(new)
    env.update(zip(op.results, results, strict=True))
  raise AssertionError('a block without a return')


def _value(kind: Any) -> Value:
  from jaxlib.mlir import ir

  try:
    tensor = ir.RankedTensorType(kind)
  except ValueError as error:
    raise UserError(f'a value of type {kind} has no C99 form: only tensors have one') from error
  if not tensor.has_static_shape:
    raise UserError(f'a value of type {kind} has no static shape: export with fixed shapes')
  return Value(tuple(tensor.shape), str(tensor.element_type))


def _attribute(a: Any) -> Any:
  """An MLIR attribute as numbers, text, tuples, dicts or a NumPy array."""
  from jaxlib.mlir import ir
  from jaxlib.mlir.dialects import stablehlo

  for kind in (ir.IntegerAttr, ir.BoolAttr, ir.StringAttr, ir.FloatAttr, ir.FlatSymbolRefAttr):
    if isinstance(a, kind):
      return a.value
  for kind in (ir.DenseI64ArrayAttr, ir.DenseBoolArrayAttr):
    if isinstance(a, kind):
      return tuple(a)
  if isinstance(a, ir.DenseElementsAttr):
    return _dense(a)
  text = str(a)
  if text.startswith('#stablehlo.conv<'):
    n = stablehlo.ConvDimensionNumbers(a)
    sides = {}
    for side, first, second in (
      ('input', 'batch', 'feature'),
      ('kernel', 'input_feature', 'output_feature'),
      ('output', 'batch', 'feature'),
    ):
      sides[side] = (
        getattr(n, f'{side}_{first}_dimension'),
        getattr(n, f'{side}_{second}_dimension'),
        tuple(getattr(n, f'{side}_spatial_dimensions')),
      )
    return sides
  if found := re.fullmatch(r'#(?:stablehlo|chlo)<\w+ (\w+)>', text):
    return found[1]
  if re.match(r'#stablehlo\.\w+<', text):
    fields = re.findall(r'(\w+) = (\[[^\]]*\]|\d+)', text)
    number = lambda s: tuple(map(int, re.findall(r'\d+', s))) if s[0] == '[' else int(s)  # noqa: E731
    return {name: number(value) for name, value in fields}
  return text


def _dense(a: Any) -> np.ndarray:
  """A constant."""
  shape = tuple(a.type.shape)
  kind = str(a.type.element_type)
  if kind not in DTYPES:
    raise UserError(f'a constant of type {kind} has no C99 form: convert it to float32')
  if a.is_splat:
    value = a.get_splat_value().value
    array = np.full(shape, value, DTYPES[kind])
  elif kind == 'bf16':
    raise UserError('a bfloat16 table of constants has no C99 form: convert it from float32')
  else:
    array = np.array(a)
  return array.astype(bool) if kind == 'i1' else array


def captured(op: Op) -> set[Value]:
  """What the regions of an operation read from outside."""
  found: set[Value] = set()
  for region in op.regions:
    own = set(region.args)
    read = set(region.outs)
    for inner in region.ops:
      own.update(inner.results)
      read.update(inner.operands)
      read |= captured(inner)
    found |= read - own
  return found
