"""What a GGUF file says about a Llama: its shape, and what its rotary frequencies are divided by."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.models.containers import Source

# llama.cpp's converter writes Llama 3's stretched RoPE as this tensor and nothing else.
FACTORS = 'rope_freqs.weight'


def config(source: Source) -> Config:
  """The shape, without `factors`.

  Raises:
    UserError: another architecture, a field that is missing or no size, or positions that are rotated in
      another way.
  """
  file, fields = source.file, source.fields
  if fields.get('general.architecture') != 'llama':
    raise UserError(
      f"{file}: the architecture is {fields.get('general.architecture')!r}, a decoder reads 'llama' from GGUF"
    )

  def value(key: str, default: Any = None) -> Any:
    found = fields.get(f'llama.{key}', default)
    if found is None:
      raise UserError(f'{file}: llama.{key} is missing')
    return found

  def count(key: str, default: Any = None) -> int:
    found = value(key, default)
    if type(found) is not int or found < 1:
      raise UserError(f'{file}: llama.{key} must be a positive integer, not {found!r}')
    return found

  def number(key: str, default: Any = None) -> float:
    found = value(key, default)
    if type(found) not in (int, float) or not 0 < found < math.inf:
      raise UserError(f'{file}: llama.{key} must be a positive number, not {found!r}')
    return float(found)

  tokens = fields.get('tokenizer.ggml.tokens')
  if not isinstance(tokens, list):
    raise UserError(f'{file}: tokenizer.ggml.tokens, the vocabulary, is missing')
  heads, d = count('attention.head_count'), count('embedding_length')
  size = count('attention.key_length', max(d // heads, 1))
  if fields.get('llama.rope.scaling.type', 'none') != 'none':
    raise UserError(
      f'{file}: llama.rope.scaling.type is {fields["llama.rope.scaling.type"]!r}, of rope scaling only the '
      f'tensor {FACTORS} is supported for GGUF files'
    )
  for key in ('rope.scaling.factor', 'rope.scale_linear'):  # without a type it is a linear one
    if 'llama.rope.scaling.type' not in fields and value(key, 1) not in (0, 1):
      raise UserError(
        f'{file}: llama.{key} is {value(key)!r}, linear rope scaling is not supported'
      )
  if (rotated := count('rope.dimension_count', size)) != size:
    raise UserError(
      f'{file}: llama.rope.dimension_count is {rotated}, only whole heads of {size} channels are rotated here'
    )
  return Config(
    len(tokens),
    d,
    count('block_count'),
    heads,
    count('attention.head_count_kv', heads),
    count('feed_forward_length'),
    count('context_length'),
    0 if size == d // heads else size,
    eps=number('attention.layer_norm_rms_epsilon'),
    theta=number('rope.freq_base', 1e4),
    tied='output.weight' not in fields['tensors'],
  )


def factors(source: Source, config: Config) -> dict[str, tuple[int, ...]]:
  """The name and shape of the divisors, {} where the file has none."""
  return {FACTORS: (config.size // 2,)} if FACTORS in source.shapes else {}


def stretched(source: Source, config: Config, tensors: dict[str, np.ndarray]) -> Config:
  """The shape with the divisors among `tensors`, where they are."""
  if FACTORS not in tensors:
    return config
  if not (tensors[FACTORS] > 0).all():
    raise UserError(f'{source.file}: tensor {FACTORS} holds values that are not positive')
  return config._replace(factors=tuple(tensors[FACTORS].tolist()))
