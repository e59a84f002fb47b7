"""Tokenizers of the `tokenizers` library, from a tokenizer.json or out of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_jax.errors import UserError

# What ends a text, by the names that the families give it.
ENDS = ('<|endoftext|>', '</s>', '<|end_of_text|>', '<eos>', '[SEP]')
CONTROL = 3  # the type of a token in GGUF that is never made from text


def load(path: str | Path) -> Any:
  """The `tokenizers.Tokenizer` of a file.

  Raises:
    UserError: no such file, one that is damaged, or a GGUF file whose rules for splitting are not known.
  """
  try:
    from tokenizers import Tokenizer
  except ImportError as error:
    raise UserError(
      f'tokenising needs the extra "text": pip install "cl_jax[text]" ({error})'
    ) from error
  path = Path(path).expanduser()
  if not path.is_file():
    raise UserError(f'there is no tokenizer at {path}; pass the path of a tokenizer.json')
  if path.suffix == '.gguf':
    return _from_gguf(path)
  try:
    return Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises bare Exception
    raise UserError(f'{path} is not a tokenizer.json ({error})') from error


def end_of_text(tokenizer: Any, path: str | Path) -> int:
  """The id of the token that ends a text."""
  for token in ENDS:
    if (found := tokenizer.token_to_id(token)) is not None:
      return found
  raise UserError(f'{path} has none of the tokens {", ".join(ENDS)}, one of which must end a text')


def padding(tokenizer: Any) -> int:
  """The id that fills rows up; no position that it stands at is read."""
  own = (tokenizer.padding or {}).get('pad_id')
  candidates = (tokenizer.token_to_id(token) for token in ('[PAD]', '<pad>', *ENDS))
  return next((i for i in (own, *candidates) if i is not None), 0)


def _from_gguf(file: Path) -> Any:
  """Byte-level BPE as llama.cpp describes it in the file's fields."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

  from cl_jax.models import containers

  fields = containers.gguf(file).fields
  kind, rules = fields.get('tokenizer.ggml.model'), fields.get('tokenizer.ggml.pre', 'default')
  own = pre_tokenizers.ByteLevel(add_prefix_space=False)
  split = {
    'smollm': [pre_tokenizers.Digits(individual_digits=True), own],
    'gpt-2': [own],
  }
  if kind != 'gpt2' or not isinstance(rules, str) or rules not in split:
    raise UserError(
      f'{file}: its tokenizer ({kind!r} with the rules {rules!r}) is not supported here; give the '
      f'tokenizer.json of the model instead (config.data.tokenizer)'
    )
  try:
    tokens, types = fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.token_type']
    merges = [tuple(pair.split(' ', 1)) for pair in fields['tokenizer.ggml.merges']]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    control = [t for t, k in zip(tokens, types, strict=True) if k == CONTROL]
  except Exception as error:  # the library raises bare Exception
    raise UserError(f'{file}: its fields do not describe a tokenizer ({error!r})') from error
  made.pre_tokenizer = pre_tokenizers.Sequence(split[rules])
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens([AddedToken(t, special=True) for t in control])
  return made
