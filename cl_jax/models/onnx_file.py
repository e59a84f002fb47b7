"""Reads the weights in an ONNX file that torch exported, by the names they had in torch."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from cl_jax.errors import UserError
from cl_jax.models import containers


def read(file: Path, prefix: str = '') -> containers.Source:
  """The initialisers of a graph by name, as torch keeps them; nothing of the graph is run.

  An export names the weights of dense layers, which it transposes, and what it folded into constants by a
  number ('onnx::MatMul_1966'). Such a tensor is called here after the node that reads it: '/a/b/MatMul' has
  'a.b.weight', transposed back, and '/a/Concat_4' has 'a.Concat'.

  Args:
    file: its weights lie inside of it.
    prefix: dropped from the names.

  Raises:
    UserError: without the library, and for a file that is damaged or keeps its weights in other files.
  """
  try:
    import onnx
    from google.protobuf.message import DecodeError
  except ImportError as e:
    raise UserError("reading ONNX files needs onnx: pip install 'cl_jax[vision]'") from e
  try:
    graph = onnx.load(file, load_external_data=False).graph
  except (OSError, DecodeError) as e:
    raise UserError(f'{file} cannot be read, it may be cut off or damaged: {e}') from e
  readers = {name: node for node in reversed(graph.node) for name in node.input}
  found: dict[str, np.ndarray] = {}
  for tensor in graph.initializer:
    name, node = tensor.name, readers.get(tensor.name)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
      raise UserError(f'{file}: tensor {name} lies in another file: save the model as one file')
    try:
      a = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as e:
      raise UserError(f'{file}: tensor {name} cannot be read, it may be damaged: {e}') from e
    if '::' in name and node is not None:
      name = re.sub(r'_\d+$', '', node.name.strip('/').replace('/', '.'))
      if node.op_type == 'MatMul':
        name, a = f'{name.removesuffix(".MatMul")}.weight', a.T
    name = name.removeprefix(prefix)
    if name in found:
      raise UserError(f'{file}: there are two tensors {name}')
    found[name] = a

  def f32(name: str) -> np.ndarray:
    a = found[name]
    if a.dtype.kind not in 'fV':
      raise UserError(f'{file}: tensor {name} is {a.dtype}, not floating point')
    return a.astype(np.float32)

  shapes = {n: a.shape for n, a in found.items()}
  kinds = {n: a.dtype.name for n, a in found.items()}
  return containers.Source(file, shapes, kinds, f32, {})


def shape(source: containers.Source, name: str, axes: int) -> tuple[int, ...]:
  """The shape of a tensor that must be there and have so many axes."""
  there = source.shapes.get(name)
  if there is None or len(there) != axes or not all(there):
    what = 'is missing' if there is None else f'has the shape {there}: not one of {axes} axes'
    raise UserError(f'{source.file}: tensor {name} {what}')
  return there
