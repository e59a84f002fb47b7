"""Fields of a configuration: what type each has, and which ones a factory's signature adds."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from cl_jax.errors import UserError
from configs.common import Maybe

PLAIN = {'int': int, 'float': float, 'str': str, 'bool': bool, 'tuple': tuple}


class Field(NamedTuple):
  """One field.

  Attributes:
    default: its value unless given; None where `required` or left to the stream, an error where it must be
      given because of that.
    types: what it may hold, the first being what the command line makes of a text.
    optional: whether it may be None.
    required: whether it must be given.
  """

  default: Any
  types: tuple[type, ...]
  optional: bool = False
  required: bool = False


def field(default: Any) -> Field:
  """The field of a default value in `configs.common`."""
  if isinstance(default, Maybe):
    return Field(default.default, (default.type,), optional=True)
  return Field(default, (type(default),))


def of(
  factory: Callable, filled: tuple[str, ...] = (), left_out: tuple[str, ...] = ()
) -> dict[str, Any]:
  """The arguments of a factory as fields by name.

  A NamedTuple argument is a nested dict of fields; a function of jax.nn is its name, a dtype is
  its name. What no command line can say (other functions, masks) is left out.

  Args:
    factory: its parameters have annotations or defaults.
    filled: arguments that are None unless given, because something else knows them.
    left_out: arguments that are not fields.
  """
  fields: dict[str, Any] = {}
  for name, p in inspect.signature(factory).parameters.items():
    if name in left_out:
      continue
    hint = p.annotation if isinstance(p.annotation, str) else getattr(p.annotation, '__name__', '')
    parts = re.sub(r'\[.*\]', '', hint).split('|')  # 'tuple[int, ...] | None' is a tuple or None
    types = tuple(PLAIN[part.strip()] for part in parts if part.strip() in PLAIN)
    default = None if p.default is p.empty else p.default
    if name in filled:
      fields[name] = Field(None, types or (int,), optional=True)
    elif p.default is p.empty:
      shape = _named_tuple(factory, hint)
      if shape is not None:
        fields[name] = of(shape)
      else:
        fields[name] = Field(None, types or (str,), optional=True, required=True)
    elif isinstance(default, int | float | str | tuple):
      own = type(default)
      also = (tuple,) if hint == 'Any' else types
      fields[name] = Field(default, (own, *(t for t in also if t is not own)))
    elif default is None:
      if types or hint == 'Any':
        fields[name] = Field(None, types or (tuple,), optional=True)
    elif name == 'dtype':
      fields[name] = Field(jax.numpy.dtype(default).name, (str,))
    elif getattr(jax.nn, getattr(default, '__name__', ''), None) is default:
      fields[name] = Field(default.__name__, (str,))
  return fields


def _named_tuple(factory: Callable, hint: str) -> type | None:
  found = inspect.getmodule(factory)
  kind = getattr(found, hint, None) if hint.isidentifier() else None
  return kind if isinstance(kind, type) and hasattr(kind, '_fields') else None


def arguments(factory: Callable, values: Mapping[str, Any]) -> dict[str, Any]:
  """Values of fields as what the factory takes: the names that `of` gives become things again."""
  ready = {}
  for name, value in values.items():
    p = inspect.signature(factory).parameters[name]
    if name == 'dtype' and isinstance(value, str):
      value = jax.numpy.dtype(value)
    elif isinstance(value, str) and callable(p.default) and p.default is not p.empty:
      value = getattr(jax.nn, value, None)
      if value is None:
        raise UserError(f'config.{name}: jax.nn has no {values[name]!r}')
    elif isinstance(value, Mapping):
      shape = _named_tuple(factory, str(p.annotation))
      value = shape(**value) if shape is not None else dict(value)
    ready[name] = value
  return ready


def fit(where: str, value: Any, f: Field) -> Any:
  """The value as the field's type, or a UserError that names the field and what it takes."""
  if isinstance(value, UserError):
    raise value
  if value is None:
    if f.required:
      raise UserError(f'{where} must be given, a value of type {_names(f)}')
    if f.optional:
      return None
    raise UserError(f'{where} cannot be None; give a value of type {_names(f)}')
  if isinstance(value, list):
    raise UserError(f'{where} is a list, which cannot be fixed: write a tuple, {tuple(value)!r}')
  if type(value) not in f.types:
    if float in f.types and type(value) is int:
      value = float(value)
    elif str not in f.types or not isinstance(value, str):
      raise UserError(
        f'{where} must be of type {_names(f)}; got {value!r} ({type(value).__name__})'
      )
  if isinstance(value, str) and float in f.types:
    try:
      value = float(value)  # 'he' stays a word, '0.02' is a number
    except ValueError:
      pass
  _finite(where, value)
  return value


def _finite(where: str, value: Any) -> None:
  if isinstance(value, float) and not math.isfinite(value):
    raise UserError(f'{where} is {value}: give a finite number')
  if isinstance(value, list | dict | set):
    raise UserError(f'{where} holds a {type(value).__name__}: write tuples, numbers and texts only')
  if isinstance(value, tuple):
    for part in value:
      _finite(where, part)


def _names(f: Field) -> str:
  return ' or '.join(t.__name__ for t in f.types)
