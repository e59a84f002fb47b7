"""What the values of a configuration may be, each alone and together."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from cl_jax import codecs, compression
from cl_jax.distillation import RAW
from cl_jax.errors import UserError
from cl_jax.masks import matches
from cl_jax.sparse import CHOICES
from configs.common import SCHEDULES, SEPARATE, Maybe, defaults
from experiments import apart

Rule = tuple[Callable[[Any], bool], str]


def least(n: float) -> Rule:
  return lambda v: v >= n, f'must be at least {n}'


def above(n: float) -> Rule:
  return lambda v: v > n, f'must be greater than {n}'


def fraction(low: bool = True) -> Rule:
  """In [0, 1) or (0, 1)."""
  return lambda v: (0 <= v if low else 0 < v) and v < 1, (
    f'must lie in {"[0" if low else "(0"}, 1)'
  )


def one_of(*names: str) -> Rule:
  return lambda v: v in names, f'must be one of {", ".join(map(repr, names))}'


def whole(v: Any, n: int = 0) -> bool:
  return type(v) is int and v >= n


def _positive(values: Any) -> bool:
  return all(isinstance(v, int | float) and v > 0 for v in values)


RULES: dict[str, Rule] = {
  'seeds': (
    lambda v: v and all(map(whole, v)) and len(set(v)) == len(v),
    'must be different whole numbers of at least 0, as in (0, 1, 2)',
  ),
  'data.examples_per_class': least(1),
  'data.examples_per_task': least(1),
  'data.test_per_task': least(1),
  'data.test_batch': least(1),
  'data.seed': least(0),
  'data.length': least(1),
  'data.hold_out': fraction(),
  'feed.name': one_of('', 'grain'),
  'feed.workers': least(0),
  'feed.ahead': least(1),
  'validation': fraction(),
  'evaluate': one_of('test', 'valid'),
  'scenario': one_of(*SEPARATE, *SCHEDULES),
  'base': one_of('', *SEPARATE),
  'tasks': least(1),
  'task_sizes': (lambda v: all(whole(n, 1) for n in v), 'must be whole numbers of at least 1'),
  'by': one_of('label', 'domain'),
  'order': (
    lambda v: v in ('fixed', 'seed') or v.isdigit(),
    "must be 'fixed', 'seed' or a whole number (as a text)",
  ),
  'transform.name': one_of('none', 'permuted', 'rotated'),
  'transform.pad': least(0),
  'transform.degrees': (
    lambda v: all(isinstance(d, int | float) for d in v),
    'must be numbers, as in (0.0, 90.0)',
  ),
  'blurry.segments': least(1),
  'blurry.by': one_of('task', 'class'),
  'blurry.width': least(0.0),
  'epochs': least(1),
  'iterations': least(1),
  'batch': least(1),
  'ends_batch': least(1),
  'budget_bytes': least(1),
  'compress.memory': (
    lambda v: v in ('', *codecs.ROWS) or bool(re.fullmatch(r'pq[1-9]\d*x\d+', v)),
    f"must be '', {', '.join(map(repr, codecs.ROWS))} or pqMxK: M parts of a row, K codewords of each",
  ),
  'compress.state': (
    lambda v: all(
      isinstance(r, tuple) and len(r) == 2 and isinstance(r[0], str) and r[1] in codecs.TENSORS
      for r in v
    ),
    f'must be ((pattern, codec), ...) with a codec of {", ".join(map(repr, codecs.TENSORS))}',
  ),
  'compress.optimizer': one_of('', *compression.MOMENTS),
  'budget.state_bytes': least(1),
  'budget.peak_bytes': least(1),
  'budget.macs_per_step': least(1),
  'head': one_of('all', 'seen', 'current', 'task'),
  'optimizer.lr': above(0.0),
  'optimizer.weight_decay': least(0.0),
  'optimizer.schedule': one_of('constant', 'cosine'),
  'optimizer.groups': (
    lambda v: all(
      isinstance(g, tuple)
      and len(g) == 2
      and isinstance(g[0], str)
      and isinstance(g[1], int | float)
      and g[1] >= 0
      for g in v
    ),
    'must be ((pattern, factor), ...) with factors of at least 0',
  ),
  'freeze': (lambda v: all(isinstance(p, str) for p in v), 'must be patterns, as in (".*/w",)'),
  'update.parts': (
    lambda v: all(
      isinstance(p, tuple) and len(p) == 2 and all(isinstance(w, str) for w in p) for p in v
    ),
    "must be ((pattern, words), ...), as in (('l0/.*', 'in 0.25'), ('.*', 'all'))",
  ),
  'update.channels': one_of(*CHOICES),
  'micro_batches': least(1),
  'frozen_bits': (lambda v: v in (16, 8, 4), 'must be 16, 8, 4 or None'),
  'tuning.rates': (lambda v: v and _positive(v), 'must be positive numbers, as in (0.1, 0.01)'),
  'tuning.first_rates': (lambda v: _positive(v), 'must be positive numbers, as in (0.1, 0.01)'),
  'tuning.drop': fraction(),
  'tuning.decay': fraction(low=False),
  'tuning.attempts': least(1),
  'tuning.patience': (
    lambda v: not v or (len(v) == 3 and whole(v[0], 1) and whole(v[1], 1) and 0 < v[2] < 1),
    'must be (epochs, epochs, factor), as in (5, 10, 0.1), or ()',
  ),
  'tuning.start': (
    lambda v: (
      all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in v)
      and _positive([p[1] for p in v])
    ),
    "must be ((field, value), ...), as in (('ewc.coef', 400.0),)",
  ),
  'chunk': least(1),
  'eval_every': least(0),
}
# Methods that compare or store what the network says of rows in training.
ON_LOGITS = ('lwf', 'ebll', 'der', 'derpp', 'rehearsal', 'dgr', 'dreamnet', 'icarl')
# Lists of regular expressions, or of pairs that begin with one.
PATTERNS = ('compress.state', 'update.parts', 'freeze', 'optimizer.groups')
# By the name of an argument, of optimisers and of methods alike. Others follow from their default: what
# is a positive number there may not become 0 or negative (0.0 may stay where a float is concerned).
ARGUMENTS: dict[str, Rule] = {
  **dict.fromkeys(('momentum', 'b1', 'b2', 'nesterov_momentum'), fraction()),
  **dict.fromkeys(('eps', 'temperature', 'alpha', 'smax', 'xi', 'damping'), above(0.0)),
  **dict.fromkeys(('prune', 'first'), fraction(low=False)),
  **dict.fromkeys(('decay', 'retrain', 'shrinkage'), (lambda v: 0 <= v <= 1, 'must lie in [0, 1]')),
  **dict.fromkeys(('tasks', 'classes', 'steps_per_epoch', 'prune_after'), least(1)),
}


def check(config: Mapping[str, Any], chosen: tuple[str, ...]) -> None:
  """Raises UserError for the first field that is out of range or does not go with the others."""
  for dotted, (holds, text) in RULES.items():
    value = _at(config, dotted)
    if value is not None and not holds(value):
      raise UserError(f'config.{dotted} {text}; got {value!r}')
  for dotted in PATTERNS:
    for rule in _at(config, dotted):
      try:
        matches(rule if isinstance(rule, str) else rule[0], '')
      except UserError as error:
        raise UserError(f'config.{dotted}: {error}') from error
  for part in ('optimizer', *chosen):
    for name, value in config[part].items():
      _argument(f'config.{part}.{name}', name, value)
  for name, value in config['model'].items():
    if type(value) is int and value < 0:
      raise UserError(f'config.model.{name} must be at least 0; got {value}')
  if any(not whole(n, 1) for n in config['model'].get('sizes', ())):
    raise UserError(f'config.model.sizes must be positive; got {config["model"]["sizes"]!r}')
  _together(config)


def _argument(where: str, name: str, value: Any) -> None:
  if value is None or isinstance(value, bool | str | tuple):
    return
  holds, text = ARGUMENTS.get(name, least(1) if isinstance(value, int) else least(0.0))
  if f'config.{where}'.endswith('optimizer.lr') or holds(value):
    return
  raise UserError(f'{where} {text}; got {value!r}')


def _together(c: Mapping[str, Any]) -> None:
  base, transform, plain = c['base'], c['transform'], defaults()
  if c['scenario'] in SEPARATE and base not in ('', c['scenario']):
    raise UserError(
      f'config.base says what {", ".join(SCHEDULES)} start from; with config.scenario='
      f'{c["scenario"]!r} leave it empty'
    )
  if c['iterations'] is not None and c['epochs'] != 1:
    raise UserError('config.iterations takes the place of config.epochs: leave that at 1')
  if c['scenario'] in ('online', 'blurry') and c['iterations'] is not None:
    raise UserError(
      f'config.iterations: a {c["scenario"]!r} stream is counted in epochs; leave it unset'
    )
  if c['scenario'] == 'online' and c['epochs'] != 1:
    raise UserError('config.epochs: an online stream is a single pass; leave it at 1')
  if c['scenario'] != 'blurry' and c['blurry'] != resolved(plain['blurry']):
    raise UserError("config.blurry applies to config.scenario='blurry' only")
  if c['evaluate'] == 'valid' and not c['validation']:
    raise UserError("config.evaluate='valid' needs config.validation, for example 0.1")
  kind = transform['name']
  for name, of in (('first_plain', 'permuted'), ('pad', 'permuted'), ('degrees', 'rotated')):
    if kind != of and transform[name] != plain['transform'][name]:
      raise UserError(f'config.transform.{name} applies to config.transform.name={of!r} only')
  if kind != 'none' and (c['by'] != 'label' or c['task_sizes']):
    raise UserError(
      f'config.transform.name={kind!r}: every task is the whole dataset; leave config.by and '
      'config.task_sizes as they are'
    )
  if kind != 'none' and c['cache_features']:
    raise UserError('config.cache_features: transformed inputs have features of their own per task')
  if kind == 'rotated' and transform['degrees'] and c['tasks'] != len(transform['degrees']):
    raise UserError(
      f'config.transform.degrees has {len(transform["degrees"])} angles for config.tasks='
      f'{c["tasks"]}: give as many'
    )
  if kind == 'rotated' and c['order'] != 'fixed':
    raise UserError('config.order: rotations have no order to draw; leave it fixed')
  if c['task_sizes'] and c['tasks'] not in (None, len(c['task_sizes'])):
    raise UserError(
      f'config.task_sizes has {len(c["task_sizes"])} tasks and config.tasks is {c["tasks"]}: give as many'
    )
  if c['by'] == 'domain' and (c['tasks'] is not None or c['task_sizes']):
    raise UserError('config.tasks: by domain every domain is a task; set it to None')
  if c['tasks'] is None and not c['task_sizes'] and c['by'] != 'domain':
    raise UserError('config.tasks must be given, unless tasks are domains (config.by)')
  feed = c['feed']
  if not feed['name'] and feed != resolved(plain['feed']):
    raise UserError(
      "config.feed.workers and config.feed.ahead belong to config.feed.name='grain': set it, or leave them"
    )
  if feed['name'] and (c['cache_features'] or transform['pad']):
    name = 'cache_features' if c['cache_features'] else 'transform.pad'
    raise UserError(
      f'config.{name} needs the examples in memory, and config.feed.name={feed["name"]!r} leaves them in '
      'files: leave one of them at its default'
    )
  if c['cache_features'] and not c['freeze'] and c['model']['name'] != 'identity':
    raise UserError(
      'config.cache_features needs a network that is frozen below its head: set config.freeze'
    )
  parts = c['update']['parts']
  if parts and (c['freeze'] or c['cache_features']):
    name = 'freeze' if c['freeze'] else 'cache_features'
    raise UserError(
      f"config.update.parts says what is not trained ('none'): leave config.{name} at its default"
    )
  if c['update']['channels'] != 'first' and not any(
    w.startswith(('in ', 'out ')) for _, w in parts
  ):
    raise UserError(
      "config.update.channels chooses channels: config.update.parts needs an 'in F' or 'out F'"
    )
  if c['batch'] % c['micro_batches']:
    raise UserError(
      f'config.micro_batches={c["micro_batches"]} must divide config.batch={c["batch"]}'
    )
  if c['micro_batches'] > 1 and 'er_ace' in c['methods']:
    raise UserError(
      'config.micro_batches: er_ace lets a batch compete among its own classes, and those of a part of it '
      'are fewer: leave it at 1'
    )
  if c['frozen_bits'] and not (c['freeze'] or parts):
    raise UserError(
      'config.frozen_bits rounds frozen weights of layers: set config.freeze or config.update.parts'
    )
  if c['data']['template'] and c['model'].get('output') != 'tokens':
    raise UserError(
      'config.data.template spells the label out in the text, which tells a classifier the answer: it is for '
      "config.model.output='tokens'"
    )
  taught = [n for n in c['methods'] if c[n].get('outputs', 'heads') not in RAW]
  instead = 'old' if taught[:1] in (['lwf'], ['ebll']) else 'heads'
  if taught and (c['head'] == 'current' or 'current_head' in c['methods']):
    raise UserError(
      f"config.head='current': {taught[0]} distils outputs of finished tasks, which that head leaves out in "
      f'training: take another head, or config.{taught[0]}.outputs={instead!r}'
    )
  by_task = c['head'] == 'task' or 'task_head' in c['methods']
  if by_task and (found := [n for n in taught if n in ('lwf', 'ebll')]):
    raise UserError(
      f"config.head='task': {found[0]} distils outputs of finished tasks, which that head leaves out of a "
      f"row of another: take another head, or config.{found[0]}.outputs='heads'"
    )
  if 'er_ace' in c['methods'] and (found := [n for n in c['methods'] if n in ON_LOGITS]):
    raise UserError(
      f'config.methods: {found[0]} learns from logits of a training step, of which er_ace keeps the classes '
      'of the batch alone: take one of the two'
    )
  apart.check(c)
  if c['compress']['optimizer'] and c['optimizer'].get('centered'):
    raise UserError(
      'config.compress.optimizer: with optimizer.centered the square of a rounded mean can be above the '
      'rounded mean of squares, and a step is NaN: take optimizer.centered=False'
    )
  memory = c['compress']['memory']
  if memory and not any('capacity' in c[name] for name in c['methods']):
    raise UserError(
      f'config.compress.memory={memory!r}: no method of config.methods has a memory: add one, as er is'
    )
  if c['optimizer']['reset'] and c['told'] is not None and 'boundary' not in c['told']:
    raise UserError('config.optimizer.reset happens at boundaries, which config.told does not tell')


def untuned(config: Mapping[str, Any]) -> None:
  """Raises UserError where a command that chooses nothing is told how to choose."""
  if config['tuning'] != resolved(defaults()['tuning']):
    raise UserError('config.tuning is for python -m experiments.framework; leave it as it is')


def resolved(plain: Mapping[str, Any]) -> dict[str, Any]:
  """A sub-dict of the defaults as it is in a resolved configuration."""
  return {k: v.default if isinstance(v, Maybe) else v for k, v in plain.items()}


def _at(config: Mapping[str, Any], dotted: str) -> Any:
  node: Any = config
  for part in dotted.split('.'):
    node = node[part]
  return node
