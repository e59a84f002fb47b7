"""Files of tensors, opened without trusting them: safetensors, whole or in parts, and GGUF."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.models import gguf_file

LOG = logging.getLogger(__name__)  # at DEBUG: which tensors of a file were left out
WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


class Source(NamedTuple):
  """An opened file of tensors.

  Attributes:
    file: what messages name.
    shapes: {name: shape} of what is in it.
    kinds: {name: how it is stored}, 'F32', 'BF16', 'Q4_1', ...
    read: name -> the tensor, f32.
    fields: the file's own description; {} where it has none.
  """

  file: Path
  shapes: dict[str, tuple[int, ...]]
  kinds: dict[str, str]
  read: Callable[[str], np.ndarray]
  fields: dict[str, Any]


def safetensors(folder: str | Path) -> Source:
  """model.safetensors in `folder`, or the parts that model.safetensors.index.json lists.

  Raises:
    UserError: a file that is absent, cut off or damaged, an index that does not fit its parts.
  """
  folder = Path(folder)
  if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
    shapes, kinds, read = _one(folder / WHOLE)
    return Source(folder / WHOLE, shapes, kinds, read, {})
  index = folder / INDEX
  placed, opened = _placed(index), {}
  for part in sorted(set(placed.values())):
    if not (folder / part).is_file():
      raise UserError(f'{folder} has no {part}, which {INDEX} lists: the download is not complete')
    opened[part] = _one(folder / part)
  there = {name: part for part, (shapes, _, _) in opened.items() for name in shapes}
  for name in sorted(there.keys() ^ placed.keys()):
    where = 'is missing' if name in placed else 'is not in the index'
    raise UserError(f'{index}: tensor {name} {where}')
  shapes, kinds = ({n: opened[part][i][n] for n, part in placed.items()} for i in (0, 1))
  return Source(index, shapes, kinds, lambda name: opened[placed[name]][2](name), {})


def _placed(index: Path) -> dict[str, str]:
  """{tensor: the file beside the index that holds it}."""
  try:
    placed = json.loads(index.read_text('utf-8'))['weight_map']
    parts = sorted(set(placed.values()))
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
    raise UserError(f'{index} is not an index of safetensors ({e!r})') from e
  for part in parts:
    if not isinstance(part, str) or Path(part).name != part:
      raise UserError(f'{index} names {part!r}, which is not a file beside it')
  return placed


def files(path: str | Path) -> list[Path]:
  """The files that hold the tensors of a directory or are a whole model; an index comes before its parts."""
  path = Path(path)
  if not path.is_dir():
    return [path]
  index = path / INDEX
  if (path / WHOLE).is_file() or not index.is_file():
    return [path / WHOLE]
  return [index, *(path / part for part in sorted(set(_placed(index).values())))]


def _one(file: Path) -> tuple[dict, dict, Callable[[str], np.ndarray]]:
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError as e:
    raise UserError("reading weights needs safetensors: pip install 'cl_jax[text]'") from e
  shapes, kinds = {}, {}
  try:
    with safe_open(file, framework='numpy') as f:
      for name in f.keys():  # noqa: SIM118 (not a dict)
        part = f.get_slice(name)
        shapes[name], kinds[name] = tuple(part.get_shape()), part.get_dtype()
  except (OSError, SafetensorError) as e:
    raise UserError(f'{file} cannot be read, it may be cut off or damaged: {e}') from e

  def read(name: str) -> np.ndarray:
    try:
      with safe_open(file, framework='numpy') as f:
        a = f.get_tensor(name)
    except (
      OSError,
      SafetensorError,
      AttributeError,
      TypeError,
    ) as e:  # float8, which NumPy has not
      raise UserError(f'{file}: tensor {name} is {kinds[name]}, which cannot be read: {e}') from e
    # bfloat16 is a NumPy extension type of kind 'V'.
    if a.dtype.kind not in 'fV':
      raise UserError(f'{file}: tensor {name} is {a.dtype}, not floating point')
    return a.astype(np.float32)

  return shapes, kinds, read


def opened(path: str | Path) -> Source:
  """The tensors of what `pretrained.find` found: a directory of safetensors or a GGUF file."""
  return gguf(path) if is_gguf(Path(path)) else safetensors(path)


def is_gguf(path: Path) -> bool:
  return path.suffix == '.gguf'


def gguf(file: str | Path) -> Source:
  """A GGUF file: its tensors dequantised one by one, and its fields ('tensors' are the names of the tensors).

  Raises:
    UserError: a file that is cut off or damaged, a quantisation that the gguf library cannot undo.
  """
  try:
    from gguf.quants import dequantize
  except ImportError as e:
    raise UserError("reading GGUF needs the gguf library: pip install 'cl_jax[text]'") from e
  file = Path(file)
  fields, tensors = gguf_file.header(file)

  def read(name: str) -> np.ndarray:
    t = tensors[name]
    try:
      return np.asarray(dequantize(gguf_file.values(file, t), t.kind), np.float32)
    except (NotImplementedError, KeyError, ValueError, OSError) as e:
      raise UserError(f'{file}: tensor {name} is {t.kind.name}, which cannot be read: {e}') from e

  shapes = {name: t.shape for name, t in tensors.items()}
  kinds = {name: t.kind.name for name, t in tensors.items()}
  return Source(file, shapes, kinds, read, {**fields, 'tensors': tuple(tensors)})


def exactly(
  source: Source,
  wanted: dict[str, tuple[int, ...]],
  prefix: str = '',
  ignored: tuple[str, ...] = (),
  ends: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
  """The tensors that are wanted, all of them, and nothing else may be there.

  Args:
    source: where they are.
    wanted: name -> shape.
    prefix: dropped from the names in the file where they have it.
    ignored, ends: how the names of tensors begin and end that may be there and are not read.

  Returns:
    name -> f32 of that shape.

  Raises:
    UserError: naming the file, and the first tensor that is missing, left over, of another shape,
      not of a floating type, or not finite.
  """
  missing, unused, names = difference(source, wanted, prefix, ignored, ends)
  if missing:
    raise UserError(f'{source.file}: tensor {missing[0]} is missing{_more(missing)}')
  other = [name for name, shape in wanted.items() if source.shapes[names[name]] != shape]
  if other:
    raise UserError(
      f'{source.file}: tensor {other[0]} has the shape {source.shapes[names[other[0]]]}, the config '
      f'says {wanted[other[0]]}{_more(other)}'
    )
  if unused:
    raise UserError(f'{source.file}: tensor {unused[0]} has no place in this model{_more(unused)}')
  LOG.debug('left out of %s: %s', source.file, sorted(names.keys() - wanted.keys()))
  found = {}
  for name in wanted:
    found[name] = source.read(names[name])
    if not np.isfinite(found[name]).all():
      raise UserError(f'{source.file}: tensor {name} holds values that are not finite')
  return found


def difference(
  source: Source,
  wanted: dict[str, tuple[int, ...]],
  prefix: str = '',
  ignored: tuple[str, ...] = (),
  ends: tuple[str, ...] = (),
) -> tuple[list[str], list[str], dict[str, str]]:
  """(names that are not there, names that have no use, {our name: the file's}); see `exactly`."""
  names: dict[str, str] = {}
  for name in source.shapes:
    own = _modern(name.removeprefix(prefix))
    if names.setdefault(own, name) != name:
      raise UserError(
        f'{source.file} has {names[own]!r} and {name!r}, which are the same tensor: leave one'
      )
  missing = [name for name in wanted if name not in names]
  left = sorted(names.keys() - wanted.keys())
  unused = [n for n in left if not n.startswith(ignored) and not n.endswith(ends)]
  return missing, unused, names


def _more(names: list[str]) -> str:
  return f', and {len(names) - 1} more: {", ".join(names[1:6])}' if names[1:] else ''


def _modern(name: str) -> str:
  """Old BERT checkpoints call the scale and bias of a norm gamma and beta."""
  return name.replace('LayerNorm.gamma', 'LayerNorm.weight').replace(
    'LayerNorm.beta', 'LayerNorm.bias'
  )
