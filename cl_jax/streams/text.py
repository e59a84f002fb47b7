"""Labelled sentences as fixed-length token ids."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams.arrays import Arrays, arrays
from cl_jax.streams.cache import cached, digest


class Sentences(NamedTuple):
  """One file of labelled sentences.

  Attributes:
    texts, labels: one entry per line. domains: likewise, or () if no line has one.
  """

  texts: tuple[str, ...]
  labels: tuple[str, ...]
  domains: tuple[str, ...]


def read(path: str | Path) -> Sentences:
  """Reads lines {"text": ..., "label": ..., "domain": ...} (domain optional); .gz is unpacked.

  Raises:
    UserError: no such file, or a malformed line, with its number.
  """
  path = Path(path).expanduser()
  rows, domains = [], []
  try:
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8') as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        row = _row(path, number, line)
        rows.append(row)
        if 'domain' in row:
          domains.append(row['domain'])
        if domains and len(domains) != len(rows):
          raise UserError(
            f'{path}:{number}: some lines have a domain and some do not; give all or none'
          )
  except (OSError, EOFError, UnicodeDecodeError) as error:
    raise UserError(
      f'{path} cannot be read ({error}); check the path, it must be UTF-8 JSON lines'
    ) from error
  if not rows:
    raise UserError(f'{path} has no sentences')
  return Sentences(tuple(r['text'] for r in rows), tuple(r['label'] for r in rows), tuple(domains))


def load(
  path: str | Path,
  tokenizer: str | Path,
  length: int,
  *,
  names=None,
  domain_names=None,
  cache_dir: Path | None = None,
) -> Arrays:
  """Sentences of a JSON-lines file as {'tokens': i32[N, L], 'mask': bool[N, L]}.

  Longer sentences are truncated to `length` tokens (special ones included), shorter ones padded
  with the tokenizer's padding token and mask False. Label and domain names are sorted.

  Args:
    tokenizer: a tokenizer.json of the `tokenizers` library.
    length: L.
    names, domain_names: the names of another split, to number labels alike; None = this file's.
    cache_dir: see `cache.cached`. The entry depends on the contents of both files and on L.
  """
  path, tokenizer = Path(path).expanduser(), Path(tokenizer).expanduser()
  if isinstance(length, bool) or not isinstance(length, int) or length < 1:
    raise UserError(f'length must be a whole number of tokens, at least 1; got {length!r}')
  data = read(path)
  if not tokenizer.is_file():
    raise UserError(f'there is no tokenizer at {tokenizer}; pass the path of a tokenizer.json')
  key = digest(path, tokenizer, f'length {length}')
  tokens = cached(
    ('text', f'{path.name.split(".")[0]}-{length}-{key[:16]}'),
    lambda: encode(data.texts, tokenizer, length),
    f'tokens of {path}',
    cache_dir,
  )
  y, names = _numbered(data.labels, names, path, 'label')
  domain = None
  if data.domains:
    domain, domain_names = _numbered(data.domains, domain_names, path, 'domain')
  return arrays(
    {'tokens': tokens['tokens'], 'mask': tokens['mask']},
    y,
    domain,
    names,
    domain_names if data.domains else (),
    str(path),
  )


def encode(texts, tokenizer: str | Path, length: int) -> dict[str, np.ndarray]:
  """{'tokens': i32[N, L], 'mask': bool[N, L]}; see `load`."""
  try:
    from tokenizers import Tokenizer
  except ImportError as error:
    raise UserError(
      f'tokenising needs the extra "text": pip install "cl_jax[text]" ({error})'
    ) from error
  try:
    model = Tokenizer.from_file(str(tokenizer))
  except Exception as error:  # the library raises bare Exception
    raise UserError(f'{tokenizer} is not a tokenizer.json ({error})') from error
  padding = (model.padding or {}).get('pad_id')
  candidates = (model.token_to_id(token) for token in ('[PAD]', '<pad>', '<|endoftext|>'))
  pad = next((i for i in (padding, *candidates) if i is not None), 0)
  model.no_padding()
  model.enable_truncation(length)
  tokens = np.full((len(texts), length), pad, np.int32)
  mask = np.zeros((len(texts), length), bool)
  for i, encoding in enumerate(model.encode_batch(list(texts))):
    ids = encoding.ids
    tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
  return {'tokens': tokens, 'mask': mask}


def _row(path: Path, number: int, line: str) -> dict[str, str]:
  try:
    row = json.loads(line.rstrip())
  except json.JSONDecodeError as error:
    raise UserError(
      f'{path}:{number}: not a line of JSON ({error.msg} at column {error.colno})'
    ) from error
  if not isinstance(row, dict):
    raise UserError(f'{path}:{number}: expected an object with text and label')
  for key in ('text', 'label', 'domain'):
    if key == 'domain' and key not in row:
      continue
    if not isinstance(row.get(key), str) or not row[key].strip():
      raise UserError(
        f'{path}:{number}: {key!r} must be a text that is not empty; got {row.get(key)!r}'
      )
  return row


def _numbered(values, names, path: Path, what: str) -> tuple[np.ndarray, tuple[str, ...]]:
  names = tuple(sorted(set(values))) if names is None else tuple(names)
  place = {name: i for i, name in enumerate(names)}
  try:
    return np.array([place[value] for value in values], np.int32), names
  except KeyError as error:
    raise UserError(
      f'{path}: {what} {error.args[0]!r} does not occur in the training data'
    ) from error
