"""TensorFlow Datasets without TensorFlow: prepared array_record files, decoded once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams.arrays import Arrays, arrays
from cl_jax.streams.cache import cached, digest
from cl_jax.streams.images import black_and_white, shaped

CHUNK = 1000  # examples decoded at a time


def load(
  name: str,
  split: str,
  data_dir: str | Path,
  *,
  domain: str | None = None,
  image: tuple[int, ...] = (),
  cache_dir: Path | None = None,
) -> Arrays:
  """One split of a prepared TFDS dataset, from the cache of decoded arrays if it is there.

  Args:
    name: 'mnist', 'mnist:3.0.1', 'dataset/config'; the newest prepared version by default.
    split: 'train', 'train[:80%]', ...; the cache keeps each apart.
    data_dir: the folder whose `tfds/` holds the prepared datasets.
    domain: the integer feature that becomes `Arrays.domain`, such as 'alphabet'.
    image: (height, width, channels) that images are brought to; () = as they are.
    cache_dir: see `cache.cached`.

  Returns:
    Arrays: x is the first of the supervised keys, y the second.

  Raises:
    UserError: the dataset, split or feature is not there (with the command that prepares it).
  """
  root = Path(data_dir).expanduser() / 'tfds'
  what = f'{name} {split}'
  folder = prepared(root, name)
  if folder is None:  # nothing that could be told apart by its files: mocked data, or an error
    parts = _decode(root, name, split, domain, image, False)
  else:
    parts = cached(
      ('tfds', stem(root, folder, split, domain, image)),
      lambda: _decode(root, name, split, domain, image, True),
      what,
      cache_dir,
    )
  known = json.loads(parts['names'].tobytes())
  x = black_and_white(parts['x'])
  return arrays(x, parts['y'], parts.get('domain'), known['label'], known['domain'], what)


def stem(root: Path, folder: Path, split: str, domain: str | None, image: tuple[int, ...]) -> str:
  """What a cache calls a split of the dataset that is prepared in `folder`."""
  files = sorted((p.name, p.stat().st_size) for p in folder.iterdir() if p.is_file())
  # Versions alone do not identify data: a cut of a dataset may carry the version of the whole.
  shape = str(image) if image else ''
  source = digest(folder / 'dataset_info.json', json.dumps(files), split, str(domain) + shape)
  return f'{folder.relative_to(root).as_posix().replace("/", "-")}-{split}-{source[:16]}'


def prepared(root: Path, name: str) -> Path | None:
  """The folder of the newest (or the named) version with its dataset_info.json."""
  base, _, version = name.partition(':')
  if not re.fullmatch(r'[\w.+-]+(/[\w.+-]+)?', base) or '..' in base:
    raise UserError(
      f"'{name}' is not the name of a TFDS dataset; use NAME, NAME/CONFIG or NAME:1.0.0"
    )
  found = [p.parent for p in (root / base).glob(f'{version or "*"}/dataset_info.json')]
  return max(found, key=lambda p: [int(n) for n in re.findall(r'\d+', p.name)], default=None)


def advice(root: Path, name: str) -> str:
  """What to do where a dataset is not there."""
  base = name.partition(':')[0]
  return (
    f'{name} is not prepared in {root}; on a machine with network run: tfds build {base} '
    f'--data_dir={root} --file_format=array_record, or pass another --data_dir'
  )


def opened(root: Path, name: str, split: str, known: bool) -> tuple[Any, Any]:
  """(builder, source at random access) of a split; `known` where its files are there."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise UserError(
      f'reading {name} needs the extra "data": pip install "cl_jax[data]" ({error})'
    ) from error
  base, hint = name.partition(':')[0], advice(root, name)
  try:
    builder: Any = tfds.builder(name, data_dir=str(root))
  except Exception as error:
    if type(error).__name__ == 'DatasetNotFoundError':
      raise UserError(
        f'{base} is not a TFDS dataset, and {root / base} does not exist; check the name'
      ) from error
    raise UserError(f'{hint} ({line(error)})') from error
  try:
    source = builder.as_data_source(split=split)
    count = len(source)
  except ValueError as error:
    raise UserError(f'{name}: {line(error)}; look at the split') from error
  except Exception as error:
    raise UserError(hint if not known else f'{hint} ({line(error)})') from error
  if known and count != builder.info.splits[split].num_examples:
    raise UserError(
      f'{name} {split} in {root} has {count} examples but dataset_info.json promises '
      f'{builder.info.splits[split].num_examples}; prepare it again'
    )
  if not count:
    raise UserError(f'{name} {split} has no examples; look at the split')
  return builder, source


def undecoded(builder: Any, split: str, x_key: str) -> Any:
  """The source without the work of decoding its images."""
  import tensorflow_datasets as tfds

  skip = isinstance(builder.info.features[x_key], tfds.features.Image)
  decoders = {x_key: tfds.decode.SkipDecoding()} if skip else None
  return builder.as_data_source(split=split, decoders=decoders)


def keys(builder: Any, name: str, domain: str | None) -> tuple[Any, str, str]:
  """(features, the one that is the input, the one that is the label), checked."""
  features: Any = builder.info.features
  pair = builder.info.supervised_keys
  if not pair or len(pair) != 2:
    raise UserError(
      f'{name} has no supervised (input, label) pair; its features are {", ".join(features)}'
    )
  x_key, y_key = pair
  for key in filter(None, (y_key, domain)):
    if key not in features or not np.issubdtype(features[key].np_dtype, np.integer):
      raise UserError(f'{name}: {key!r} is not an integer feature; there are {", ".join(features)}')
  return features, x_key, y_key


def names(features: Any, y_key: str, domain: str | None) -> dict[str, Any]:
  """The names of labels and of domains."""
  return {
    'label': getattr(features[y_key], 'names', None) or (),
    'domain': (getattr(features[domain], 'names', None) or ()) if domain else (),
  }


def _decode(
  root: Path, name: str, split: str, domain: str | None, image: tuple[int, ...], known: bool
) -> dict[str, Any]:
  builder, source = opened(root, name, split, known)
  features, x_key, y_key = keys(builder, name, domain)
  count = len(source)
  parts: dict[str, Any] = {'x': None, 'y': np.empty(count, np.int64)}
  if domain:
    parts['domain'] = np.empty(count, np.int64)
  for start in range(0, count, CHUNK):
    stop = min(start + CHUNK, count)
    try:
      some = examples(source, range(start, stop))
    except Exception as error:
      raise UserError(
        f'{name} {split}: examples {start} to {stop - 1} cannot be decoded '
        f'({line(error)}); prepare it again'
      ) from error
    for i, example in enumerate(some, start):
      x = np.asarray(example[x_key])
      x = shaped(x, image, f'{name} {split}') if image else x
      if parts['x'] is None:
        parts['x'] = np.empty((count, *x.shape), x.dtype)
      if x.shape != parts['x'].shape[1:]:
        raise UserError(
          f'{name} {split}: example {i} has shape {x.shape} and example 0 '
          f'{parts["x"].shape[1:]}; only datasets of one size can be used'
        )
      parts['x'][i] = x
      parts['y'][i] = example[y_key]
      if domain:
        parts['domain'][i] = example[domain]
  parts['names'] = np.frombuffer(json.dumps(names(features, y_key, domain)).encode(), np.uint8)
  return parts


def examples(source: Any, rows: range) -> list[dict[str, Any]]:
  try:
    return source.__getitems__(rows)  # twice as fast as one by one
  except TypeError:  # what tfds.testing.mock_data puts in its place cannot be called
    return [source[i] for i in rows]


def line(error: BaseException) -> str:
  return ' '.join(str(error).split())[:200] or type(error).__name__
