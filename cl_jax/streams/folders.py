"""Benchmarks that TFDS does not have, from their archives as they are published, decoded once.

Each lies unpacked below `data_dir/images`; see `KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams.arrays import Arrays, arrays
from cl_jax.streams.cache import cached, digest
from cl_jax.streams.images import image_module, shaped
from cl_jax.streams.order import shuffled


class Entry(NamedTuple):
  """An image file and what it shows."""

  path: Path
  label: int
  domain: int = 0


class Listing(NamedTuple):
  train: list[Entry]
  test: list[Entry]
  names: tuple[str, ...]
  domain_names: tuple[str, ...] = ()


class Kind(NamedTuple):
  """A benchmark: its folder below data_dir/images, where it comes from, its images and how it is read."""

  folder: str
  source: str
  image: tuple[int, int, int]
  read: Callable[[Path], Listing]


def tiny_imagenet(root: Path) -> Listing:
  """200 classes of 500 images, 64 x 64; the 10,000 images of `val` are the test data."""
  words = {}
  if (root / 'words.txt').is_file():
    pairs = (line.split('\t') for line in (root / 'words.txt').read_text().splitlines() if line)
    words = {pair[0]: pair[1].split(',')[0] for pair in pairs if len(pair) > 1}
  labels = sorted(p.name for p in (root / 'train').iterdir() if p.is_dir())
  number = {label: i for i, label in enumerate(labels)}
  train = [
    Entry(path, number[label])
    for label in labels
    for path in sorted((root / 'train' / label / 'images').glob('*.JPEG'))
  ]
  test = []
  for line in (root / 'val/val_annotations.txt').read_text().splitlines():
    file, label = line.split('\t')[:2]
    test.append(Entry(root / 'val/images' / file, number[label]))
  return Listing(train, test, tuple(words.get(n, n) for n in labels))


def core50(root: Path) -> Listing:
  """50 objects filmed in 11 sessions; 3, 7 and 10 are the test data. The domain is the session."""
  found = []
  for path in sorted(root.glob('s*/o*/C_*.png')):
    match = re.fullmatch(r'C_(\d\d)_(\d\d)_\d+', path.stem)
    if match is None:
      raise ValueError(f'{path.name} is not named C_SESSION_OBJECT_FRAME.png')
    found.append(Entry(path, int(match[2]) - 1, int(match[1]) - 1))
  tested = (2, 6, 9)
  kinds = 'plug phone scissors bulb can glasses ball marker cup remote'.split()
  names = tuple(f'{kinds[i // 5]} {i % 5 + 1}' for i in range(50))
  return Listing(
    [e for e in found if e.domain not in tested],
    [e for e in found if e.domain in tested],
    names,
    tuple(f'session {i + 1}' for i in range(11)),
  )


def notmnist(root: Path) -> Listing:
  """The letters A to J in many fonts, 28 x 28; a tenth of each class, drawn once, is the test data.

  The archive has a few empty files, which are left out.
  """
  train, test, names = [], [], tuple('ABCDEFGHIJ')
  for i, letter in enumerate(names):
    paths = [p for p in sorted((root / letter).glob('*.png')) if p.stat().st_size]
    order = shuffled(0, f'test data of notmnist {letter}', len(paths))
    held = set(order[: len(paths) // 10].tolist())
    for n, path in enumerate(paths):
      (test if n in held else train).append(Entry(path, i))
  return Listing(train, test, names)


KINDS = {
  'tiny_imagenet': Kind(
    'tiny-imagenet-200',
    'http://cs231n.stanford.edu/tiny-imagenet-200.zip',
    (64, 64, 3),
    tiny_imagenet,
  ),
  'core50': Kind(
    'core50_128x128',
    'http://bias.csr.unibo.it/maltoni/download/core50/core50_128x128.zip',
    (128, 128, 3),
    core50,
  ),
  'notmnist': Kind(
    'notMNIST_small',
    'http://yaroslavvb.com/upload/notMNIST/notMNIST_small.tar.gz',
    (28, 28, 1),
    notmnist,
  ),
}


def load(
  name: str, data_dir: Path, image: tuple[int, ...] = (), cache_dir: Path | None = None
) -> tuple[Arrays, Arrays]:
  """(train, test) of one of `KINDS`, from the cache of decoded arrays if it is there.

  Args:
    image: (height, width, channels) that images are brought to; () = as they are published.
    cache_dir: see `cache.cached`.

  Raises:
    UserError: it is not there (with where to get it), or not as it was published.
  """
  kind = KINDS[name]
  image = image or kind.image
  root = data_dir / 'images' / kind.folder
  advice = f'{name} is not in {root}: download {kind.source} and unpack it in {root.parent}'
  if not root.is_dir():
    raise UserError(advice)
  try:
    listing = kind.read(root)
  except (OSError, ValueError, KeyError, IndexError) as error:
    raise UserError(
      f'{name} in {root} is not as it was published ({error!r}); unpack it again'
    ) from error
  if not listing.train or not listing.test:
    raise UserError(f'{name} in {root} has no images where they should be; {advice}')

  def part(split: str, entries: list[Entry]) -> Arrays:
    what = f'{name} {split}'
    files = ''.join(f'{e.path.relative_to(root)} {e.path.stat().st_size}\n' for e in entries)
    stem = f'{name}-{split}-{digest(files, str(image))[:16]}'
    x = cached(('images', stem), lambda: {'x': decoded(entries, image, what)}, what, cache_dir)['x']
    if len(x) != len(entries):
      raise UserError(f'{what}: the cache has {len(x)} images for {len(entries)} files; remove it')
    y, domain = (np.array([getattr(e, f) for e in entries]) for f in ('label', 'domain'))
    known = listing.domain_names
    return arrays(x, y, domain if known else None, listing.names, known, what)

  try:
    return part('train', listing.train), part('test', listing.test)
  except OSError as error:
    raise UserError(f'{name} in {root} cannot be read ({error}); unpack it again') from error


def decoded(entries: list[Entry], image: tuple[int, ...], what: str) -> np.ndarray:
  """u8[N, H, W, C]."""
  library, found = image_module(), np.empty((len(entries), *image), np.uint8)
  for i, entry in enumerate(entries):
    with library.open(entry.path) as picture:
      found[i] = shaped(picture, image, what)
  return found
