"""From a configuration to one stream per seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cl_jax.errors import UserError
from cl_jax.models import pretrained
from cl_jax.streams import folders, schedules, splits
from cl_jax.streams.arrays import Arrays
from cl_jax.streams.load import dataset
from cl_jax.streams.order import shuffled
from cl_jax.streams.records import same
from cl_jax.sweep import even
from cl_jax.types import Stream
from configs.common import SEPARATE, defaults

TEXT = ('tokenizer', 'length', 'template')
CORPORA = ('tokenizer', 'length')
PREPARED = ('train', 'test', 'domain', 'hold_out', 'image')


def streams(config: Mapping[str, Any], data_dir: str | Path | None = None) -> list[Stream]:
  """One stream per seed, on the host; what is equal in several is the same object.

  Raises:
    UserError: absent or unusable data, tasks that the data does not have, fields that do not apply.
  """
  train, test = arrays(config, data_dir)
  per_seed, shared = [], None
  for seed in config['seeds']:
    if config['order'] == 'seed' or config['data']['seed'] is None or shared is None:
      shared = separate(config, train, test, seed)
    per_seed.append(scheduled(config, shared, seed))
  return share(per_seed)


def arrays(config: Mapping[str, Any], data_dir: str | Path | None) -> tuple[Arrays, Arrays]:
  """(train, test) of the configured dataset."""
  name, data = config['dataset'], config['data']
  kind, in_files = name.split(':')[0], bool(config.get('feed', {}).get('name'))
  if kind in ('text', 'jsonl') or name == 'clinc150':
    options = {'length': data['length'], 'template': data['template']}
    options, takes = options | {'tokenizer': tokenizer(config)}, TEXT
  elif kind == 'corpora':
    options, takes = {'length': data['length'], 'tokenizer': tokenizer(config)}, CORPORA
  elif kind == 'npz' or name in ('fashion_mnist_small', 'spoken_digit'):
    options, takes = {}, ()
  elif name in folders.KINDS or '+' in name:
    options, takes = {'image': data['image']}, ('image',)
  else:
    options = {'train': data['train'], 'test': data['test'], 'seed': data['seed'] or 0}
    options |= {'domain': data['domain'] or None, 'hold_out': data['hold_out'] or None}
    options |= {'image': data['image'], 'in_files': in_files}
    takes = PREPARED
  if in_files and takes is not PREPARED:
    raise UserError(
      f'config.feed.name={config["feed"]["name"]!r} reads TFDS datasets in array_record files, and '
      f"config.dataset={name!r} is none: leave config.feed.name at ''"
    )
  for field in (*TEXT, *PREPARED):
    if field not in takes and data[field] != defaults()['data'][field]:
      raise UserError(
        f'config.data.{field} does not apply to config.dataset={name!r}: leave it out'
      )
  return dataset(name, data_dir, **options)


def tokenizer(config: Mapping[str, Any]) -> str:
  given = config['data']['tokenizer']
  if given and given not in pretrained.PACKAGES:
    return given
  source = given or config['model'].get('pretrained')
  if not source:
    raise UserError(
      f'config.dataset={config["dataset"]!r} is text: set config.data.tokenizer to a tokenizer.json, '
      'or config.model.pretrained'
    )
  found = pretrained.find(source).tokenizer
  if found is None:
    raise UserError(
      f'{source} has no tokenizer.json, which text needs: set config.data.tokenizer to one'
    )
  return str(found)


def base_scenario(config: Mapping[str, Any]) -> str:
  """Which labels there are: 'task', 'class' or 'domain'."""
  if config['scenario'] in SEPARATE:
    return config['scenario']
  return config['base'] or ('class' if config['transform']['name'] == 'none' else 'domain')


def plan(config: Mapping[str, Any], seed: int) -> schedules.Plan:
  return schedules.Plan(
    config['batch'],
    config['epochs'],
    config['iterations'],
    config['drop_last'],
    config['ends_batch'],
    seed,
  )


def separate(config: Mapping[str, Any], train: Arrays, test: Arrays, seed: int) -> Stream:
  """The tasks one after the other, whatever the schedule will be."""
  data, transform, order = config['data'], config['transform'], config['order']
  select = splits.Select(
    validation=config['validation'],
    evaluate=config['evaluate'],
    examples_per_class=data['examples_per_class'],
    examples_per_task=data['examples_per_task'],
    test_per_task=data['test_per_task'],
    test_batch=data['test_batch'],
    seed=seed if data['seed'] is None else data['seed'],
  )
  drawn = {'fixed': None, 'seed': seed}.get(order, order)
  drawn = None if drawn is None else int(drawn)
  common: dict[str, Any] = {'plan': plan(config, seed), 'select': select}
  base, tasks = base_scenario(config), config['task_sizes'] or config['tasks']
  if transform['name'] == 'permuted':
    options = {'first_plain': transform['first_plain'], 'pad': transform['pad']}
    return splits.permuted(train, test, base, tasks, view_seed=drawn or 0, **options, **common)
  if transform['name'] == 'rotated':
    degrees = tuple(map(float, transform['degrees'])) or None
    return splits.rotated(train, test, base, tasks, degrees=degrees, **common)
  classes = len(train.names)
  if config['by'] == 'label' and isinstance(tasks, int):
    if tasks > classes:
      raise UserError(f'config.tasks={tasks}: {config["dataset"]} has {classes} classes only')
    if classes % tasks:
      raise UserError(
        f'config.tasks={tasks} does not divide the {classes} classes of {config["dataset"]}: choose '
        'another number, or set config.task_sizes to the number of classes of each task'
      )
  if config['by'] == 'domain':
    return splits.split(train, test, base, by='domain', order_seed=drawn, **common)
  if drawn is not None:
    train, test = reordered(train, test, drawn)
  return splits.split(train, test, base, tasks, **common)


def reordered(train: Arrays, test: Arrays, seed: int) -> tuple[Arrays, Arrays]:
  """Classes in another order, and numbered in it: task t has the same labels whatever the seed."""
  order = shuffled(seed, 'order of classes', len(train.names))
  number = np.argsort(order).astype(np.int32)
  names = tuple(train.names[i] for i in order)
  one, two = (part._replace(y=number[part.y], names=names) for part in (train, test))
  return one, two


def scheduled(config: Mapping[str, Any], stream: Stream, seed: int) -> Stream:
  """The stream in the order of this seed and schedule, telling what it is to tell."""
  own, blurry = plan(config, seed), config['blurry']
  match config['scenario']:
    case 'joint':
      stream = schedules.joint(stream, own)
    case 'cumulative':
      stream = schedules.cumulative(stream, own)
    case 'online':
      stream = schedules.online(stream, own)
    case 'blurry':
      stream = schedules.blurry(stream, own, blurry['segments'], blurry['by'], blurry['width'])
    case _:
      stream = schedules.reordered(stream, own)
  return stream if config['told'] is None else schedules.tell(stream, config['told'])


def share(streams: Sequence[Stream]) -> list[Stream]:
  """The same streams; a leaf that equals the first one's is that very object, kept once."""
  first = jax.tree.leaves(streams[0])
  shared = [streams[0]]
  for stream in streams[1:]:
    leaves, treedef = jax.tree.flatten(stream)
    if len(leaves) == len(first):
      leaves = [a if same(a, b) else b for a, b in zip(first, leaves, strict=True)]
    shared.append(jax.tree.unflatten(treedef, leaves))
  return shared


def alike(streams: Sequence[Stream]) -> list[Stream]:
  """The streams padded to equal shapes, so that one program serves all; see `sweep.even`.

  The names of tasks, which the loop does not read, become numbers where they differ, and so do the
  labels of tasks.
  """
  out = even(streams)
  if len({(s.task_names, s.task_classes) for s in out}) > 1:
    names, classes = tuple(map(str, range(out[0].tasks))), out[0].task_classes
    out = [dataclasses.replace(s, task_names=names, task_classes=classes) for s in out]
  return share(out)
