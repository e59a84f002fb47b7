"""What the small files beside weights say of their use: how pixels are normalised and hidden states pooled.

Each function returns arguments of a model, {} where its files say nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax import durable
from cl_jax.errors import UserError
from cl_jax.models import pretrained

PIXELS, MODULES, POOLING = pretrained.BESIDE
# sentence-transformers' names, before 5.4 as flags 'pooling_mode_...' -> those of `bert`.
_POOLS = {'cls': 'cls', 'cls_token': 'cls', 'mean': 'mean', 'mean_tokens': 'mean'}


def pixels(path: str | Path) -> dict[str, Any]:
  """'mean' and 'std' of pixels from 0 to 1: a number, or a tuple of one for each channel.

  Args:
    path: a directory with preprocessor_config.json (Hugging Face), or with the config.json of timm, whose
      pretrained_cfg says it.

  Raises:
    UserError: a file that cannot be read, or pixels on another scale.
  """
  path = Path(path)
  file = path / PIXELS
  if file.is_file():
    known = pretrained.described(file)
    scale = known.get('rescale_factor', 1 / 255) if known.get('do_rescale', True) else 1
    if type(scale) not in (int, float) or not math.isclose(scale, 1 / 255, rel_tol=1e-4):
      raise UserError(
        f'{file}: pixels are multiplied by {scale!r}, only 1/255 is supported here: set config.model.mean '
        'and config.model.std, of pixels from 0 to 1'
      )
    if not known.get('do_normalize', True):
      return {'mean': 0.0, 'std': 1.0}
    names = {'mean': 'image_mean', 'std': 'image_std'}
  elif (path / 'config.json').is_file() and 'architecture' in (
    known := pretrained.config(path, {})
  ):
    file, names = path / 'config.json', {'mean': 'mean', 'std': 'std'}
    known = pretrained.section(path, known, 'pretrained_cfg') or known
  else:
    return {}
  found = {k: _channels(file, v, known[v]) for k, v in names.items() if known.get(v) is not None}
  if not np.all(np.asarray(found.get('std', 1)) > 0):
    raise UserError(f'{file}: {names["std"]} holds values that are not positive')
  return found


def write_pixels(folder: Path, image: int, channels: int, mean: Any, std: Any) -> None:
  """Writes the preprocessor_config.json that `pixels` reads."""
  about = {
    'image_processor_type': 'ViTImageProcessor',
    'do_resize': True,
    'size': {'height': image, 'width': image},
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': np.broadcast_to(mean, channels).tolist(),
    'image_std': np.broadcast_to(std, channels).tolist(),
  }
  durable.write(folder / PIXELS, json.dumps(about, indent=1) + '\n')


def _channels(file: Path, key: str, value: Any) -> float | tuple[float, ...]:
  """One number where all channels have the same."""
  each = value if isinstance(value, list) else [value]
  if not each or not all(type(a) in (int, float) and 0 <= a < pretrained.MOST for a in each):
    raise UserError(
      f'{file}: {key} must be numbers, not {value!r}: set config.model.mean and config.model.std'
    )
  found = tuple(float(a) for a in each)
  return found[0] if len(set(found)) == 1 else found


def pooling(path: str | Path) -> dict[str, Any]:
  """'pool' and 'normalise' of a directory of sentence-transformers.

  Args:
    path: where modules.json and 1_Pooling/config.json are, if any.

  Raises:
    UserError: a file that cannot be read or is missing, or that asks for more than a pooling of `bert` and a
      length of 1.
  """
  path, found = Path(path), {}
  instead = (
    'set config.model.pool and config.model.normalise to use what the encoder itself computes'
  )
  if (path / MODULES).is_file():
    kinds = _kinds(path / MODULES)
    other = [k for k in kinds if k not in ('Transformer', 'Pooling', 'Normalize', 'Dropout')]
    if other:
      raise UserError(f'{path / MODULES}: {other[0]} is not supported here: {instead}')
    if 'Pooling' in kinds and not (path / POOLING).is_file():
      raise UserError(f'{path} has no {POOLING}, which {MODULES} needs: the copy is not complete')
    found['normalise'] = 'Normalize' in kinds
  if (path / POOLING).is_file():
    modes = _modes(pretrained.described(path / POOLING))
    if len(modes) != 1 or modes[0] not in _POOLS:
      what = ' and '.join(modes) or 'none'
      raise UserError(
        f"{path / POOLING}: the pooling is {what}, 'cls' and 'mean' are supported here: {instead}"
      )
    found['pool'] = _POOLS[modes[0]]
  return found


def _kinds(file: Path) -> list[str]:
  """The last part of the modules' types, in which versions of sentence-transformers agree."""
  modules = pretrained.parsed(file)
  if not isinstance(modules, list) or not all(
    isinstance(m, Mapping) and isinstance(m.get('type'), str) for m in modules
  ):
    raise UserError(f'{file} is not a list of modules with a type each')
  return [m['type'].rpartition('.')[2] for m in modules]


def _modes(known: Mapping[str, Any]) -> list[str]:
  start = 'pooling_mode'
  if start in known:
    return [str(m) for m in (known[start] if isinstance(known[start], list) else [known[start]])]
  return [k.removeprefix(f'{start}_') for k, on in known.items() if k.startswith(start) and on]
