"""The fields of an editing experiment, and what makes an editor of them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cl_jax import editing
from cl_jax.editing.write import Editor
from cl_jax.errors import UserError
from experiments import config, fields
from experiments.fields import Field

# What the command knows about an editor's arguments.
KNOWN = ('config', 'moments', 'unrelated', 'rounds')
# Of the others, by their names.
COUNTS = ('steps', 'width', 'rank', 'capacity', 'shards')
POSITIVE = ('rate', 'coef', 'clamp', 'eps', 'alpha', 'norm', 'bound')
DEFAULTS: dict[str, Any] = {
  'name': 'edit',
  'seeds': (0,),  # each draws other edits
  'model': 'SmolLM2-135M-Instruct',  # see pretrained.find
  'data': 'counterfact',  # of streams.edits: a name, or FILE.jsonl with facts of one's own
  'known': False,  # only facts whose true answer is what the model says
  'edits': 10,
  'batch': 10,  # edits at a time
  'apart': False,  # every batch from the first model
  'length': 64,  # tokens that a prompt and its target may have
  'prefixes': 3,  # texts by the model that prompts are put behind
  'prefix_tokens': 5,
  'undo': True,  # keep the terms of every edit; False sums them up, and going on may differ in last bits
  # What E[k k^T] is measured on; `sketch` > 0 keeps so many rows a layer in place of the whole sum.
  'moments': {'corpus': 'wiki', 'tokens': 57344, 'block': 128, 'sketch': 0},
  'editor': 'memit',  # a module of cl_jax.editing, or 'none': only ask
  'label': '',  # what tables call it; '' is the editor's name
  'evaluate': {
    'edits': 200,  # at most so many are asked about
    'points': 10,  # times in a sequence of batches
    'neighbours': 5,
    'texts': ('wiki', 'math'),  # corpora whose perplexity is measured before and after
    'blocks': 16,
    'block': 128,  # tokens
    'written': 10,  # edits about which the model goes on writing
    'tokens': 50,  # that it writes
  },
}


def names() -> list[str]:
  """The editors: modules of cl_jax.editing with a function that returns an Editor."""
  found = (m.name for m in pkgutil.iter_modules(editing.__path__))
  return sorted(name for name in found if _factory(name) is not None)


def factory(name: str) -> Callable[..., Editor]:
  made = _factory(name) if name.isidentifier() else None
  if made is None:
    near = difflib.get_close_matches(name, [*names(), 'none'], 2, 0.5)
    hint = f'did you mean {" or ".join(near)}?' if near else f'there are {", ".join(names())}, none'
    raise UserError(f'config.editor: no editor {name!r}: {hint}')
  return made


def _factory(module: str) -> Any:
  try:
    found = importlib.import_module(f'cl_jax.editing.{module}')
  except ModuleNotFoundError:
    return None
  for name in (module, f'{module}_edit'):
    made: Any = getattr(found, name, None)
    if callable(made) and inspect.signature(made).return_annotation in ('Editor', Editor):
      return made
  return None


def with_editor(
  raw: Mapping[str, Any], overrides: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
  """The configuration with the editor that overrides name, which decides what fields there are; the rest.

  Arguments and label of the editor that it had go with it.
  """
  for dotted, text in overrides:
    if dotted == 'editor' and text != raw.get('editor'):
      left = {k: v for k, v in raw.items() if k not in (raw.get('editor'), 'label')}
      raw = left | {'editor': text}
  return dict(raw), [(dotted, text) for dotted, text in overrides if dotted != 'editor']


def schema(raw: Mapping[str, Any]) -> dict[str, Any]:
  """The fields of this configuration: the common ones and the arguments of its editor."""
  found: dict[str, Any] = {
    name: {k: fields.field(v) for k, v in default.items()}
    if isinstance(default, dict)
    else fields.field(default)
    for name, default in DEFAULTS.items()
  }
  editor = raw.get('editor', DEFAULTS['editor'])
  if editor != 'none':
    found[editor] = arguments(factory(str(editor)))
  return found


def arguments(make: Callable[..., Editor]) -> dict[str, Any]:
  """The arguments of an editor as fields; a NamedTuple with defaults is a dict of fields."""
  found = fields.of(make, left_out=KNOWN)
  for name, p in inspect.signature(make).parameters.items():
    if hasattr(p.default, '_asdict'):
      found[name] = {k: fields.field(v) for k, v in p.default._asdict().items()}
    elif 'Sequence' in str(p.annotation):
      found[name] = Field(None, (tuple,), required=p.default is p.empty, optional=True)
  return found


def resolve(raw: Mapping[str, Any]) -> dict[str, Any]:
  """Every field with its value, checked.

  Raises:
    UserError: an unknown field (with close matches), a wrong type, a value out of range.
  """
  resolved = config.complete('config', raw, schema(raw))
  for name in ('edits', 'batch', 'length', 'prefixes', 'prefix_tokens'):
    least = 0 if name.startswith('prefix') else 1
    if resolved[name] < least:
      raise UserError(f'config.{name} must be at least {least}; got {resolved[name]}')
  for name in ('edits', 'points', 'neighbours', 'blocks', 'written', 'tokens'):
    least = 1 if name in ('edits', 'points', 'blocks') else 0
    if resolved['evaluate'][name] < least:
      got = resolved['evaluate'][name]
      raise UserError(f'config.evaluate.{name} must be at least {least}; got {got}')
  # A block holds a token and one to predict from it.
  for part, name, least in (
    ('evaluate', 'block', 2), ('moments', 'block', 1), ('moments', 'tokens', 1), ('moments', 'sketch', 0)
  ):  # fmt: skip
    if resolved[part][name] < least:
      raise UserError(f'config.{part}.{name} must be at least {least}; got {resolved[part][name]}')
  if not resolved['seeds']:
    raise UserError('config.seeds names no seed: there is nothing to do')
  _sensible(f'config.{resolved["editor"]}', resolved.get(resolved['editor'], {}))
  if resolved['batch'] > resolved['edits']:
    raise UserError(
      f'config.batch={resolved["batch"]} is more than config.edits={resolved["edits"]}'
    )
  return resolved


def _sensible(where: str, given: Mapping[str, Any]) -> None:
  """Refuses arguments of an editor with which it does nothing, or walks uphill."""
  for name, value in given.items():
    if isinstance(value, Mapping):
      _sensible(f'{where}.{name}', value)
    elif name in COUNTS and value < 1:
      raise UserError(f'{where}.{name} must be at least 1; got {value}')
    elif name in POSITIVE and value is not None and not value > 0:
      raise UserError(f'{where}.{name} must be above 0; got {value}')


def needs(resolved: Mapping[str, Any], argument: str) -> bool:
  """Whether the editor takes one of `KNOWN`."""
  name = resolved['editor']
  return name != 'none' and argument in inspect.signature(factory(name)).parameters


def make(resolved: Mapping[str, Any], known: Mapping[str, Any]) -> Editor:
  """The editor of a configuration, with what the command knows; 'none' writes nothing."""
  name = resolved['editor']
  if name == 'none':
    none = lambda backbone, state, requests, key: ([], state, {})  # noqa: E731
    return Editor(lambda backbone: (), none)
  build = factory(name)
  parameters = inspect.signature(build).parameters
  given = {
    k: type(parameters[k].default)(**v) if isinstance(v, Mapping) else v
    for k, v in resolved[name].items()
    if v is not None or parameters[k].default is None
  }
  return build(**{k: v for k, v in known.items() if k in parameters}, **given)


def layers(resolved: Mapping[str, Any]) -> tuple[int, ...]:
  """The layers whose E[k k^T] the editor needs; () for one that needs none."""
  if not needs(resolved, 'moments'):
    return ()
  own = resolved[resolved['editor']]
  return tuple(own['layers']) if 'layers' in own else (own['layer'],)
