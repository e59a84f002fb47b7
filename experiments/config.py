"""Configurations: loaded, overridden, completed from signatures, checked; plain dicts throughout."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optax

from cl_jax import methods, models
from cl_jax.errors import UserError
from cl_jax.idle import idle
from cl_jax.models import pretrained
from cl_jax.types import Model
from configs import common
from experiments import fields, rules
from experiments.fields import Field

# What the stream knows about a method's arguments; see `experiments.build.known`.
KNOWN = ('classes', 'tasks', 'task_classes', 'steps_per_epoch', 'prune_after')


def load(source: str) -> dict[str, Any]:
  """The dict of FILE.py, FILE.py:ARG or FILE.json, as it is written there."""
  path, _, arg = source.partition(':')
  file = Path(path)
  if not file.is_file():
    near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob('*.py')], 2, 0.5)
    hint = f'; did you mean {" or ".join(str(file.parent / n) for n in near)}?' if near else ''
    raise UserError(f'--config: there is no file {path}{hint}')
  if file.suffix == '.json':
    if arg:
      raise UserError(f'--config: {path} is JSON and takes no words: leave out :{arg}')
    try:
      raw = json.loads(file.read_text())
    except ValueError as error:
      raise UserError(f'--config: {path} is not JSON ({error})') from error
    raw = tuples(raw)
  else:
    raw = _run(file, path, arg)
  if hasattr(raw, 'to_dict'):
    raw = raw.to_dict()
  if not isinstance(raw, Mapping):
    raise UserError(f'--config: {path} gives a {type(raw).__name__}; get_config must return a dict')
  return dict(raw)


def _run(file: Path, path: str, arg: str) -> Any:
  spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
  if spec is None or spec.loader is None:
    raise UserError(f'--config: {path} is neither .py nor .json')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise UserError(f'--config: {path} cannot be read ({type(error).__name__}: {error})') from error
  if not callable(getattr(module, 'get_config', None)):
    raise UserError(f"--config: {path} has no function get_config(arg='')")
  try:
    return module.get_config(arg) if arg else module.get_config()
  # Most often a word that is looked up in a table.
  except (LookupError, ValueError, TypeError) as error:
    source = f'{path}:{arg}' if arg else path
    near = difflib.get_close_matches(arg, getattr(module, 'CELLS', ()), 2, 0.5)
    hint = 'its docstring should say what words there are; ' if arg else ''
    hint = f'did you mean {" or ".join(f"{path}:{n}" for n in near)}? ' if near else hint
    raise UserError(
      f'--config: {source} gives no configuration ({type(error).__name__}: {error}); '
      f'{hint}--debug shows where it fails'
    ) from error


def resolve(raw: Mapping[str, Any]) -> dict[str, Any]:
  """Every field with its value, each checked by itself and against the others.

  Raises:
    UserError: an unknown field (with close matches), a wrong type, a value out of range.
  """
  chosen = methods_of(raw)
  resolved = complete('config', raw, schema_of(raw, chosen), chosen)
  rules.check(resolved, chosen)
  return resolved


def methods_of(raw: Mapping[str, Any]) -> tuple[str, ...]:
  """The methods that a configuration names."""
  chosen = fields.fit('config.methods', raw.get('methods', ()), Field((), (tuple,)))
  if any(not isinstance(name, str) for name in chosen) or len(set(chosen)) < len(chosen):
    raise UserError(f'config.methods must be different names; got {chosen!r}')
  return chosen


def schema_of(raw: Mapping[str, Any], chosen: tuple[str, ...]) -> dict[str, Any]:
  """The fields of this configuration: those of `common`, and those of what it names."""
  schema: dict[str, Any] = {}
  for name, default in common.defaults().items():
    if name == 'sweep':
      continue
    nested = isinstance(default, dict)
    schema[name] = (
      {k: fields.field(v) for k, v in default.items()} if nested else fields.field(default)
    )
  schema['model'] = model_fields(_dict(raw, 'model', common.defaults()['model']))
  schema['optimizer'] |= optimizer_fields(_dict(raw, 'optimizer', {}).get('name', 'sgd'))
  for name in chosen:
    if name in schema:
      raise UserError(f'config.methods: a method cannot be called {name!r}, which is a field')
    schema[name] = {'gate': Field(None, (float,), optional=True)}
    schema[name] |= fields.of(methods.find(name), KNOWN, ('wires', 'codec'))
  return schema


def _dict(raw: Mapping[str, Any], name: str, default: Mapping[str, Any]) -> Mapping[str, Any]:
  found = raw.get(name, default)
  if not isinstance(found, Mapping):
    raise UserError(f'config.{name} must be a dict of fields; got {found!r}')
  return found


def model_fields(model: Mapping[str, Any]) -> dict[str, Any]:
  name = model.get('name', 'mlp')
  factory = find_model(name)
  own = fields.of(factory, left_out=('classes', 'weights'))
  if 'weights' in inspect.signature(factory).parameters:
    own = {'pretrained': Field('', (str,))} | own
    if model.get('pretrained'):
      own = {k: v for k, v in own.items() if not isinstance(v, dict)}  # the weights have a shape
      own |= said_by_weights(factory, model['pretrained'], own)
  if name == 'mlp':
    own['sizes'] = Field(common.defaults()['model']['sizes'], (tuple,))
  return {'name': Field(name, (str,))} | own


def said_by_weights(factory: Callable, name: Any, own: Mapping[str, Field]) -> dict[str, Field]:
  """The fields of the model whose default the files beside its weights say, or why there is none."""
  read = getattr(importlib.import_module(factory.__module__), 'arguments', None)
  place = pretrained.place(name) if isinstance(name, str) else None
  if read is None or place is None:
    return {}
  try:
    said = read(place)
  except UserError as error:
    said = {k: error for k in ('mean', 'std', 'pool', 'normalise') if k in own}
  return {k: own[k]._replace(default=value) for k, value in said.items()}


def find_model(name: str) -> Callable[..., Any]:
  """The factory of a model: the function of its module's name in cl_jax.models that returns a Model."""
  modules = sorted(m.name for m in pkgutil.iter_modules(models.__path__))
  if name in modules and (found := _model_of(name)) is not None:
    return found
  known = [m for m in modules if _model_of(m) is not None]
  near = difflib.get_close_matches(str(name), known, 2, 0.5)
  hint = f'did you mean {" or ".join(near)}?' if near else f'there are {", ".join(known)}'
  raise UserError(f'config.model.name: no model {name!r}: {hint}')


def _model_of(module: str) -> Callable[..., Any] | None:
  found = getattr(importlib.import_module(f'cl_jax.models.{module}'), module, None)
  is_model = callable(found) and inspect.signature(found).return_annotation in ('Model', Model)
  return found if is_model else None


def optimizer_fields(name: str) -> dict[str, Any]:
  factory: Any = getattr(optax, str(name), None)
  takes = inspect.signature(factory).parameters if inspect.isfunction(factory) else {}
  if not str(name).islower() or 'learning_rate' not in takes:
    near = difflib.get_close_matches(str(name), ('sgd', 'adam', 'adamw', 'rmsprop', 'lion'), 1, 0.4)
    hint = f'did you mean {near[0]}?' if near else 'for example sgd, adam or adamw'
    raise UserError(f'config.optimizer.name: optax has no optimiser {name!r}: {hint}')
  found = fields.of(factory, left_out=('learning_rate', 'mask'))
  # optax annotates with types, not with texts: a None default with a number's annotation is a float.
  for key, p in takes.items():
    if p.default is None and 'dtype' not in key and key not in ('mask', *found):
      found[key] = Field(None, (float,), optional=True)
  return {k: v for k, v in found.items() if 'dtype' not in k}


def complete(where: str, raw: Any, schema: Mapping[str, Any], chosen: tuple[str, ...] = ()) -> dict:
  if not isinstance(raw, Mapping):
    raise UserError(f'{where} must be a dict of fields; got {raw!r}')
  for name in raw:
    if name not in schema and not (where == 'config' and name == 'sweep'):
      raise UserError(_unknown(where, name, schema, chosen))
  done = {}
  for name, entry in schema.items():
    if isinstance(entry, dict):
      done[name] = complete(f'{where}.{name}', raw.get(name, {}), entry)
    else:
      done[name] = fields.fit(f'{where}.{name}', raw.get(name, entry.default), entry)
  return done


def _unknown(where: str, name: str, schema: Mapping[str, Any], chosen: tuple[str, ...]) -> str:
  if where == 'config' and name in methods.names():
    return (
      f'config.{name} belongs to a method that is not used: add {name!r} to config.methods '
      f'(now {chosen!r}) or leave it out'
    )
  near = difflib.get_close_matches(str(name), schema, 3, 0.5)
  deep = [f'{k}.{name}' for k, entry in schema.items() if isinstance(entry, dict) and name in entry]
  options = [f'{where}.{n}' for n in (*near, *deep)]
  hint = f'did you mean {" or ".join(options)}?' if options else f'there are {", ".join(schema)}'
  return f'there is no field {where}.{name}: {hint}'


def override(raw: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
  """The configuration with one more field set, before it is resolved.

  What decides which fields there are takes the old ones with it: another `methods` drops the
  sub-dicts of methods that are gone, another model or optimiser the arguments of the old one.
  """
  new = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()}
  if dotted == 'methods' and isinstance(value, tuple):
    for gone in set(new.get('methods', ())) - set(value):
      new.pop(gone, None)
  if dotted in ('model.name', 'optimizer.name'):
    sub = dotted.split('.')[0]
    if new.get(sub, {}).get('name') != value:
      keep = ('lr', 'weight_decay', 'schedule', 'groups', 'reset') if sub == 'optimizer' else ()
      new[sub] = {k: v for k, v in new.get(sub, {}).items() if k in keep}
  *parents, last = dotted.split('.')
  node = new
  for parent in parents:
    node[parent] = dict(node.get(parent, {}))
    node = node[parent]
  node[last] = value
  return new


def entry(schema: Mapping[str, Any], dotted: str, chosen: tuple[str, ...] = ()) -> Any:
  """What the schema has at a dotted name; UserError with close matches where it has nothing."""
  node, where = schema, 'config'
  for part in dotted.split('.'):
    if not isinstance(node, Mapping) or part not in node:
      raise UserError(_unknown(where, part, node if isinstance(node, Mapping) else {}, chosen))
    node, where = node[part], f'{where}.{part}'
  return node


def dumps(config: Mapping[str, Any]) -> str:
  """The configuration as one line of JSON, the same for equal configurations."""
  return json.dumps(config, sort_keys=True, separators=(',', ':'))


def sha256(config: Mapping[str, Any]) -> str:
  return hashlib.sha256(dumps(identity(config)).encode()).hexdigest()


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
  """What tells a run from others; younger fields only where they do something: older runs have none."""
  nothing = idle(config)
  return {k: v for k, v in config.items() if k not in nothing}


def tuples(node: Any) -> Any:
  """JSON's lists as the tuples that they were."""
  if isinstance(node, list):
    return tuple(tuples(v) for v in node)
  return {k: tuples(v) for k, v in node.items()} if isinstance(node, dict) else node


def difference(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = '') -> list[str]:
  """'field: a / b' for every field in which two configurations differ."""
  found = []
  for key in sorted({*a, *b}):
    x, y = a.get(key), b.get(key)
    if isinstance(x, Mapping) and isinstance(y, Mapping):
      found += difference(x, y, f'{prefix}{key}.')
    elif tuples(x) != tuples(y):
      found.append(f'{prefix}{key}: {x!r} / {y!r}')
  return found
