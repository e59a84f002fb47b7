"""`dataset` finds a dataset by its name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams import audio, builtin, corpora, folders, stored, text, tfds
from cl_jax.streams.arrays import DAMAGED, Arrays, arrays, check_pair, compact, hold_out
from cl_jax.streams.images import check_shape

SHIPPED = ('fashion_mnist_small', 'clinc150')


def dataset(name: str, data_dir: str | Path | None = None, **options) -> tuple[Arrays, Arrays]:
  """(train, test) of a dataset.

  | name | what | options |
  |---|---|---|
  | fashion_mnist_small | shipped, 6,000 / 2,000 images | |
  | clinc150 | shipped, 15,000 / 4,500 sentences, 150 intents, 10 domains | tokenizer, length, template |
  | NAME, tfds:NAME | data_dir/tfds | train, test, domain, hold_out, seed, image, in_files |
  | tiny_imagenet, core50, notmnist | data_dir/images, the archive as published | image |
  | spoken_digit | data_dir/audio: 3,000 clips, 10 words by 6 speakers (domains) | |
  | NAME+NAME+... | all of them, the labels one after the other; a domain each | image |
  | text:NAME | data_dir/text/classify/NAME/{train,test}.jsonl | tokenizer, length, template |
  | jsonl:DIR | DIR/{train,test}.jsonl | tokenizer, length, template |
  | corpora:NAME+NAME+... | data_dir/text/corpora/NAME/{train,test}.txt, a domain each | tokenizer, length |
  | npz:PATH | arrays x_train, y_train, x_test, y_test; domain_*, names, domain_names | |

  Args:
    data_dir: None = the environment variable CL_JAX_DATA.
    options:
      tokenizer: path of a tokenizer.json or GGUF file. length: tokens per sentence (32).
      template: spells the label out after the text, for language models; see `text.answered`.
      train, test: split names ('train', 'test'). domain: the feature that names the domain.
      hold_out: fraction of `train` per class that becomes the test data, for datasets without a
        test split; its `seed` is 0. Classes without a training example are dropped.
      image: (height, width, channels) that images are brought to (() = as they are).
      in_files: leave the examples in their files, for `grain_feed`; see `Records`.

  Raises:
    UserError: unknown names (with close matches) and options, absent or unusable data.
  """
  if name.startswith('corpora:'):
    names = tuple(name.removeprefix('corpora:').split('+'))
    options = _known(name, options, tokenizer=None, length=32)
    if options['tokenizer'] is None:
      raise UserError(f'{name} is text: pass tokenizer, the path of a tokenizer.json')
    return corpora.load(_root(name, data_dir) / 'text/corpora', names, **options)
  if '+' in name and not _one_place(name):
    return _joined(name.split('+'), data_dir, **_known(name, options, image=()))
  kind, _, rest = (
    name.partition(':')
    if name.split(':')[0] in ('tfds', 'text', 'jsonl', 'npz')
    else ('', '', name)
  )
  if kind == 'npz':
    return _npz(Path(rest).expanduser(), **_known(name, options))
  if kind in ('text', 'jsonl') or name == 'clinc150':
    options = _known(name, options, tokenizer=None, length=32, template='')
    if name == 'clinc150':
      paths = [builtin.file(f'clinc150_{split}.jsonl.gz') for split in ('train', 'test')]
    else:
      folder = _root(name, data_dir) / 'text/classify' / rest if kind == 'text' else Path(rest)
      if not folder.is_dir():
        near = _near(rest, folder.parent)
        raise UserError(
          f'{name}: there is no folder {folder}{near}; it must hold train.jsonl and test.jsonl'
        )
      paths = [folder / f'{split}.jsonl' for split in ('train', 'test')]
    return _sentences(name, paths, **options)
  if name == 'fashion_mnist_small':
    return _npz(builtin.file('fashion_mnist_small.npz'), **_known(name, options))
  if name == 'spoken_digit':
    _known(name, options)
    return audio.spoken_digit(_root(name, data_dir))
  if name in folders.KINDS:
    options = _known(name, options, image=())
    return folders.load(name, _root(name, data_dir), check_shape(options['image'], name))
  options = _known(
    name, options, train='train', test='test', domain=None, hold_out=None, seed=0, image=(), in_files=False
  )  # fmt: skip
  return _tfds(rest, _root(name, data_dir), **options)


def _one_place(name: str) -> bool:
  """Whether it is one dataset of the user's, whose path has a + in it."""
  kind, _, rest = name.partition(':')
  return kind in ('npz', 'jsonl') and Path(rest).expanduser().exists()


def _joined(names: list[str], data_dir, image) -> tuple[Arrays, Arrays]:
  """Several datasets as one: label l of the second is l + the number of classes of the first."""
  plain = {'fashion_mnist_small', 'spoken_digit'} | {n for n in names if n.startswith('npz:')}
  pairs = [dataset(n, data_dir, **({} if n in plain else {'image': image})) for n in names]
  shapes = {n: pair[0].x.shape[1:] for n, pair in zip(names, pairs, strict=True)}
  if len(set(shapes.values())) > 1:
    fixed = ', '.join(n for n in names if n in plain)
    raise UserError(
      f'{"+".join(names)}: images of different shapes {shapes}; bring them to one by image='
      f'(height, width, channels){f", but for {fixed}, which stay as they are" if fixed else ""}'
    )
  kinds = {n: str(pair[0].x.dtype) for n, pair in zip(names, pairs, strict=True)}
  if len(set(kinds.values())) > 1:
    raise UserError(
      f'{"+".join(names)}: inputs of different types {kinds}, which the network reads on different scales: '
      'store them in the same one'
    )
  offsets = np.cumsum([0, *(len(train.names) for train, _ in pairs)])

  def join(parts: list[Arrays]) -> Arrays:
    return Arrays(
      np.concatenate([p.x for p in parts]),
      np.concatenate([p.y + o for p, o in zip(parts, offsets, strict=False)]).astype(np.int32),
      np.repeat(np.arange(len(parts), dtype=np.int32), [len(p.y) for p in parts]),
      tuple(f'{n} {label}' for n, p in zip(names, parts, strict=True) for label in p.names),
      tuple(names),
    )

  train, test = (join([pair[i] for pair in pairs]) for i in (0, 1))
  return train, test


def _tfds(
  name, root, train, test, domain, hold_out, seed, image, in_files
) -> tuple[Arrays, Arrays]:
  image, load = check_shape(image, name), stored.load if in_files else tfds.load
  try:
    first = load(name, train, root, domain=domain, image=image)
  except UserError as error:
    base = name.partition(':')[0]
    near = '' if (root / 'tfds' / base).is_dir() else _near(base, root / 'tfds')
    raise UserError(f'{error}{near}') from error
  if hold_out is None:
    second = load(name, test, root, domain=domain, image=image)
  else:
    first, second = _cut(first, hold_out, seed, name)
  first, second = compact(first, second)
  check_pair(first, second, name)
  return first, second


def _cut(data: Arrays, fraction: float, seed: int, name: str) -> tuple[Arrays, Arrays]:
  return hold_out(data, fraction, seed, f'test data of {name}')


def _sentences(name, paths, tokenizer, length, template) -> tuple[Arrays, Arrays]:
  if tokenizer is None:
    raise UserError(f'{name} is text: pass tokenizer, the path of a tokenizer.json')
  train = text.load(paths[0], tokenizer, length, template=template)
  known = {'names': train.names, 'domain_names': train.domain_names or None}
  test = text.load(paths[1], tokenizer, length, template=template, **known)
  check_pair(train, test, name)
  return train, test


def _npz(path: Path) -> tuple[Arrays, Arrays]:
  try:
    with path.open('rb') as file:
      stored = np.load(file, allow_pickle=False)
      if not isinstance(stored, np.lib.npyio.NpzFile):
        raise ValueError('it holds a single array')
      parts = {key: stored[key] for key in stored.files}
  except DAMAGED as error:
    raise UserError(f'{path} cannot be read as an .npz of plain arrays ({error})') from error
  if missing := [k for k in ('x_train', 'y_train', 'x_test', 'y_test') if k not in parts]:
    raise UserError(f'{path} lacks {", ".join(missing)}; it has {", ".join(parts) or "nothing"}')
  for key in ('y_train', 'y_test', 'names', 'domain_names', 'domain_train', 'domain_test'):
    if key in parts and parts[key].ndim != 1:
      raise UserError(f'{path}: {key} must be a row of values; it has the shape {parts[key].shape}')
  names = tuple(map(str, parts['names'])) if 'names' in parts else ()
  for s in ('train', 'test'):
    if not np.issubdtype(parts[f'y_{s}'].dtype, np.integer):
      raise UserError(f'{path} {s}: labels must be integers, not {parts[f"y_{s}"].dtype}')
  if not names:
    top = max(int(parts[f'y_{s}'].max(initial=0)) for s in ('train', 'test'))
    if top >= len(parts['y_train']):  # before as many names are made
      raise UserError(
        f'{path}: label {top} of {len(parts["y_train"])} training examples: number the labels from 0 without '
        "gaps, or give 'names'"
      )
    names = tuple(map(str, range(1 + top)))
  domain_names = tuple(map(str, parts['domain_names'])) if 'domain_names' in parts else ()
  train, test = (
    arrays(
      parts[f'x_{s}'], parts[f'y_{s}'], parts.get(f'domain_{s}'), names, domain_names, f'{path} {s}'
    )
    for s in ('train', 'test')
  )
  check_pair(train, test, str(path))
  return train, test


def _root(name: str, data_dir: str | Path | None) -> Path:
  near = difflib.get_close_matches(name, SHIPPED, 2, 0.6)
  shipped = f' (did you mean {" or ".join(near)}?)' if near else ''
  shipped = f'{name} is not one of the shipped datasets {", ".join(SHIPPED)}{shipped}'
  return root_of(data_dir, f'{shipped}; to look for it elsewhere')


def root_of(data_dir: str | Path | None, why: str) -> Path:
  """The data directory, above tfds/, text/ and edit/: `data_dir`, or what CL_JAX_DATA says.

  Raises:
    UserError: neither is given (`why` begins the message), or it is not there.
  """
  root = data_dir or os.environ.get('CL_JAX_DATA')
  if not root:
    raise UserError(f'{why} pass --data_dir or set CL_JAX_DATA')
  root = Path(root).expanduser()
  if not root.is_dir():
    raise UserError(
      f'the data directory {root} does not exist; pass another --data_dir or CL_JAX_DATA'
    )
  return root


def _near(name: str, folder: Path) -> str:
  there = [p.name for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
  near = difflib.get_close_matches(name, [*there, *SHIPPED, 'spoken_digit', *folders.KINDS], 3, 0.6)
  return f'; did you mean {" or ".join(near)}?' if near else ''


def _known(name: str, options: dict, **known) -> dict:
  for key in options:
    if key not in known:
      near = difflib.get_close_matches(key, known, 1, 0.5)
      hint = f'; did you mean {near[0]}?' if near else ''
      raise UserError(f'{name} has no option {key!r}{hint} (options: {", ".join(known) or "none"})')
  return {**known, **options}
