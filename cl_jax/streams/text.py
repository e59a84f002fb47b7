"""Labelled sentences as fixed-length token ids."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams import tokenizer as tokenizers
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
  except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
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
  template: str = '',
  names=None,
  domain_names=None,
  cache_dir: Path | None = None,
) -> Arrays:
  """Sentences of a JSON-lines file as {'tokens': i32[N, L], 'mask': bool[N, L]}.

  Longer sentences are truncated to `length` tokens (special ones included), shorter ones padded
  with the tokenizer's padding token and mask False. Label and domain names are sorted.

  Args:
    tokenizer: a tokenizer.json of the `tokenizers` library, or a GGUF file.
    length: L.
    template: '' or, for language models, how the label is spelt out after the text; see `answered`.
    names, domain_names: the names of another split, to number labels alike; None = this file's.
    cache_dir: see `cache.cached`. The entry depends on the contents of both files and on L.
  """
  path, tokenizer = Path(path).expanduser(), Path(tokenizer).expanduser()
  if isinstance(length, bool) or not isinstance(length, int) or length < 1:
    raise UserError(f'length must be a whole number of tokens, at least 1; got {length!r}')
  data = read(path)
  if not tokenizer.is_file():
    raise UserError(f'there is no tokenizer at {tokenizer}; pass the path of a tokenizer.json')
  key = digest(path, tokenizer, f'length {length}', *([template] if template else []))

  def encoded() -> dict[str, np.ndarray]:
    if template:
      return answered(data.texts, data.labels, tokenizer, length, template)
    return encode(data.texts, tokenizer, length)

  tokens = cached(
    ('text', f'{path.name.split(".")[0]}-{length}-{key[:16]}'),
    encoded,
    f'tokens of {path}',
    cache_dir,
  )
  y, names = _numbered(data.labels, names, path, 'label')
  domain = None
  if data.domains:
    domain, domain_names = _numbered(data.domains, domain_names, path, 'domain')
  return arrays(
    {name: tokens[name] for name in ('tokens', 'mask', *(('learn',) if template else ()))},
    y,
    domain,
    names,
    domain_names if data.domains else (),
    str(path),
  )


def encode(texts, tokenizer: str | Path, length: int) -> dict[str, np.ndarray]:
  """{'tokens': i32[N, L], 'mask': bool[N, L]}; see `load`."""
  model = tokenizers.load(tokenizer)
  pad = tokenizers.padding(model)
  model.no_padding()
  special = model.num_special_tokens_to_add(False)
  if length <= special:
    raise UserError(
      f'length={length} leaves no room for a word: {tokenizer} adds {special} special tokens to a text'
    )
  model.enable_truncation(length)
  return filled([e.ids for e in model.encode_batch(list(texts))], length, pad)


def answered(
  texts, labels, tokenizer: str | Path, length: int, template: str
) -> dict[str, np.ndarray]:
  """Sentences with their labels spelt out, for a language model to learn to write them.

  Args:
    texts, labels: what `template` is filled with; '_' in labels becomes a space.
    template: '{text}' first, '{label}' last, for instance '{text}\nIntent: {label}'.

  Returns:
    {'tokens': i32[N, L], 'mask': bool[N, L], 'learn': bool[N, L]}: the label and the token that ends a text
    are to be learnt. What is too long loses the end of its text, never of the template or the label.

  Raises:
    UserError: another template, or a length that leaves no room for a text.
  """
  text_at, label_at = template.find('{text}'), template.find('{label}')
  once = template.count('{text}') == template.count('{label}') == 1
  if not once or label_at < text_at or not template.endswith('{label}'):
    raise UserError(
      'config.data.template must have {text} in it, end with {label}, and have both once; '
      f'got {template!r}'
    )
  before, between = template[:text_at], template[text_at + 6 : label_at]
  gap = between[
    len(between.rstrip(' ')) :
  ]  # belongs to the label: byte-level BPE joins it to the word
  model = tokenizers.load(tokenizer)
  model.no_padding()
  model.no_truncation()
  ids = lambda rows: [e.ids for e in model.encode_batch(list(rows), add_special_tokens=False)]  # noqa: E731
  start, middle = ids([before, between.rstrip(' ')])
  end = tokenizers.end_of_text(model, tokenizer)
  spelt = {y: [*one, end] for y, one in zip(
    sorted(set(labels)), ids(gap + y.replace('_', ' ') for y in sorted(set(labels))), strict=True
  )}  # fmt: skip
  room = length - len(start) - len(middle) - max(map(len, spelt.values()))
  if room < 1:
    raise UserError(
      f'config.data.length={length} leaves no room for a text beside template and label'
    )
  rows = [
    ([*start, *body[:room], *middle], spelt[y]) for body, y in zip(ids(texts), labels, strict=True)
  ]
  found = filled(
    [question + answer for question, answer in rows], length, tokenizers.padding(model)
  )
  learn = np.zeros_like(found['mask'])
  for i, (question, answer) in enumerate(rows):
    learn[i, len(question) : len(question) + len(answer)] = True
  return {**found, 'learn': learn}


def filled(rows: list[list[int]], length: int, pad: int) -> dict[str, np.ndarray]:
  """Rows of token ids, none longer than `length`, with `pad` after them and the mask of what is not that."""
  tokens = np.full((len(rows), length), pad, np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, ids in enumerate(rows):
    tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
  return {'tokens': tokens, 'mask': mask}


def _row(path: Path, number: int, line: str) -> dict[str, str]:
  try:
    row = json.loads(line.rstrip())
  except json.JSONDecodeError as error:
    raise UserError(
      f'{path}:{number}: not a line of JSON ({error.msg} at column {error.colno})'
    ) from error
  except (
    RecursionError,
    ValueError,
  ) as error:  # nested too deeply, a number of thousands of digits
    raise UserError(f'{path}:{number}: not a line of JSON that can be read ({error})') from error
  if not isinstance(row, dict):
    raise UserError(f'{path}:{number}: expected an object with text and label')
  for key in ('text', 'label', 'domain'):
    if key == 'domain' and key not in row:
      continue
    if not isinstance(row.get(key), str) or not row[key].strip():
      raise UserError(
        f'{path}:{number}: {key!r} must be a text that is not empty; got {row.get(key)!r}'
      )
    if any('\ud800' <= c <= '\udfff' for c in row[key]):  # JSON may spell them out, UTF-8 has none
      raise UserError(f'{path}:{number}: {key!r} has half of a surrogate pair in it: {row[key]!r}')
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
