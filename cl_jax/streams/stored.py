"""TFDS datasets that stay in their array_record files: labels are read once, examples when asked for."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams import tfds
from cl_jax.streams.arrays import Arrays, arrays
from cl_jax.streams.cache import cached
from cl_jax.streams.images import shaped
from cl_jax.streams.records import Records


def load(
  name: str,
  split: str,
  data_dir: str | Path,
  *,
  domain: str | None = None,
  image: tuple[int, ...] = (),
  cache_dir: Path | None = None,
) -> Arrays:
  """What `tfds.load` returns, with `Records` in the place of the inputs: the same bytes when they are read.

  Labels and domains are read in one pass over the files without decoding images, and kept in the cache.

  Deviations: whether a dataset is black and white, 0 and 1 as in Omniglot, is told by its first 1,000 images;
  inputs that are not images are not searched for NaN.

  Args, Raises: those of `tfds.load`; files that are cut short are refused in that pass.
  """
  root = Path(data_dir).expanduser() / 'tfds'
  what = f'{name} {split}'
  prepared = tfds.prepared(root, name)
  if prepared is None:
    raise UserError(tfds.advice(root, name))
  stem = tfds.stem(root, prepared, split, domain, image)
  parts = cached(
    ('tfds', f'{stem}-labels'), lambda: _scan(root, name, split, domain, image), what, cache_dir
  )
  about = json.loads(parts['about'].tobytes())
  shape = tuple(about['shape'])
  read = Read(str(root), name, split, about['key'], image, shape, about['dtype'], about['white'])
  x = Records(read, np.arange(len(parts['y'])), shape, np.dtype(about['dtype']))
  return arrays(x, parts['y'], parts.get('domain'), about['label'], about['domain'], what)


class Read(NamedTuple):
  """(rows) -> their inputs, from the files of one split: the `read` of `Records`.

  Attributes:
    root, name, split: of the dataset. key: the feature that is the input.
    image: see `tfds.load`. shape, dtype: of an example.
    white: whether 1 is white, see `images.black_and_white`.
  """

  root: str
  name: str
  split: str
  key: str
  image: tuple[int, ...]
  shape: tuple[int, ...]
  dtype: str
  white: bool

  def __call__(self, rows: np.ndarray) -> np.ndarray:
    source, where = _source(self.root, self.name, self.split), f'{self.name} {self.split}'
    out = np.empty((len(rows), *self.shape), self.dtype)
    for i, row in enumerate(rows):
      try:
        x = np.asarray(source[int(row)][self.key])
      except Exception as error:
        raise UserError(
          f'{where}: example {row} cannot be read ({tfds.line(error)}); its file in {self.root} is '
          'damaged: prepare it again'
        ) from error
      x = shaped(x, self.image, where) if self.image else x
      if x.shape != self.shape:
        raise UserError(
          f'{where}: example {row} has shape {x.shape} and example 0 {self.shape}; set image, or '
          'config.data.image, to bring them to one'
        )
      out[i] = 255 * x if self.white else x
    return out


@lru_cache(maxsize=8)
def _source(root: str, name: str, split: str) -> Any:
  """The open files, once in every process."""
  return tfds.opened(Path(root), name, split, True)[1]


def _scan(
  root: Path, name: str, split: str, domain: str | None, image: tuple[int, ...]
) -> dict[str, np.ndarray]:
  """Labels and domains of all examples, and what the first ones look like."""
  builder, source = tfds.opened(root, name, split, True)
  features, x_key, y_key = tfds.keys(builder, name, domain)
  count, where = len(source), f'{name} {split}'
  parts = {key: np.empty(count, np.int64) for key in ('y', *(('domain',) if domain else ()))}
  quick = tfds.undecoded(builder, split, x_key)
  for start in range(0, count, tfds.CHUNK):
    rows = range(start, min(start + tfds.CHUNK, count))
    try:
      if not start:
        images = [np.asarray(e[x_key]) for e in tfds.examples(source, rows)]
      for i, example in zip(rows, tfds.examples(quick, rows), strict=True):
        parts['y'][i] = example[y_key]
        if domain:
          parts['domain'][i] = example[domain]
    except Exception as error:
      raise UserError(
        f'{where}: examples {rows[0]} to {rows[-1]} cannot be read ({tfds.line(error)}); a file in '
        f'{root} is damaged: prepare it again'
      ) from error
  first = shaped(images[0], image, where) if image else images[0]
  white = not image and first.dtype == np.uint8 and max(x.max(initial=0) for x in images) == 1
  wide = {'i': 'int32', 'u': 'int32', 'f': 'float32'}  # what `arrays` stores these as
  small = first.dtype in (np.uint8, np.bool_)
  about = {
    'key': x_key,
    'shape': first.shape,
    'dtype': first.dtype.name if small else wide.get(first.dtype.kind, first.dtype.name),
    'white': bool(white),
    **tfds.names(features, y_key, domain),
  }
  return {**parts, 'about': np.frombuffer(json.dumps(about).encode(), np.uint8)}
