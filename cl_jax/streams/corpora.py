"""Plain text as blocks of tokens, a domain a corpus: what language models learn one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from cl_jax.errors import UserError
from cl_jax.streams import tokenizer as tokenizers
from cl_jax.streams.arrays import Arrays, arrays
from cl_jax.streams.cache import cached, digest

SPLITS = ('train', 'test')
SAMPLE = 64  # pieces of a text, whose tokens are compared with those of the whole


def load(
  folder: str | Path,
  names: tuple[str, ...],
  tokenizer: str | Path,
  length: int,
  cache_dir: Path | None = None,
) -> tuple[Arrays, Arrays]:
  """(train, test) of the corpora folder/NAME/{train,test}.txt.

  The tokens of a file, one long row, are cut into blocks of `length` without gaps (an incomplete last one is
  left out). Inputs are {'tokens': i32[N, L], 'mask': bool[N, L], 'learn': bool[N, L]}; all but the first
  token of a block are to be learnt. Every label is 0, the domain is the corpus.

  Args:
    tokenizer: a tokenizer.json or GGUF file.
    length: L, at least 2.
    cache_dir: see `cache.cached`.

  Raises:
    UserError: an absent or empty file, one that is not UTF-8, or too short for a single block.
  """
  if length < 2:
    raise UserError(
      f'length must be at least 2 tokens, one to predict the other from; got {length}'
    )
  parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
  for name in names:
    for split in SPLITS:
      file = Path(folder) / name / f'{split}.txt'
      parts[split].append(blocks(file, Path(tokenizer).expanduser(), length, cache_dir))
  train, test = (_arrays(parts[split], names, length) for split in SPLITS)
  return train, test


def blocks(file: Path, tokenizer: Path, length: int, cache_dir: Path | None = None) -> np.ndarray:
  """The tokens of a text file, i32[N, L]."""
  if not file.is_file():
    near = ', '.join(sorted(p.name for p in file.parent.parent.glob('*') if p.is_dir()))
    raise UserError(
      f'there is no corpus at {file}; it must be UTF-8 text'
      + (f' (there are {near})' if near else '')
    )
  if not tokenizer.is_file():
    raise UserError(f'there is no tokenizer at {tokenizer}; pass the path of a tokenizer.json')
  key = digest(file, tokenizer, 'as a whole')  # not in pieces, as in earlier versions
  tokens = cached(
    ('corpora', f'{file.parent.name}-{file.stem}-{key[:16]}'),
    lambda: {'tokens': encode(file, tokenizer)},
    f'tokens of {file}',
    cache_dir,
  )['tokens']
  n = len(tokens) // length
  if not n:
    raise UserError(f'{file} has {len(tokens)} tokens, not even one block of {length}')
  return tokens[: n * length].reshape(n, length)


def encode(file: Path, tokenizer: str | Path) -> np.ndarray:
  """All tokens of a text file in one row, i32[N], as of the whole text; no special ones are added.

  The text is encoded in pieces where the first `SAMPLE` of them have the tokens that they have as one text,
  and at once, which is slower, where they do not.
  """
  model = tokenizers.load(tokenizer)
  model.no_padding()
  model.no_truncation()
  try:
    text = file.read_text('utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{file} cannot be read as UTF-8 text ({error})') from error

  def ids(parts: list[str]) -> list[int]:
    return [i for e in model.encode_batch(parts, add_special_tokens=False) for i in e.ids]

  # One long text is slow where a tokenizer has no rules for splitting. A newline between two characters is a
  # token of its own in most rules, where several are merged, and so are spaces beside one. Some tokenizers
  # put a sign before every text (Llama 2), strip it or merge across a newline; a sample of pieces tells.
  parts = re.split(r'(?<=\S\n)(?=\S)', text)
  sample = parts[:SAMPLE]
  apart = ids(sample) == ids([''.join(sample)])
  return np.array(ids(parts if apart else [text]), np.int32)


def _arrays(parts: list[np.ndarray], names: tuple[str, ...], length: int) -> Arrays:
  tokens = np.concatenate(parts)
  n = len(tokens)
  learn = np.ones((n, length), bool)
  learn[:, 0] = False
  x = {'tokens': tokens, 'mask': np.ones((n, length), bool), 'learn': learn}
  domain = np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts])
  return arrays(x, np.zeros(n, np.int32), domain, ('text',), names, '+'.join(names))
