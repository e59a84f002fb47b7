"""The methods of a configuration, with what the stream knows about their arguments filled in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cl_jax import compose, compression, methods, writers
from cl_jax.errors import UserError
from cl_jax.methods.heads.task_head import task_head
from cl_jax.methods.replay.agem import agem
from cl_jax.types import Method, Stream, Tree, Wire
from experiments import fields
from experiments.capacity import SLOTS
from experiments.config import KNOWN

COUNTS = ('steps_per_epoch', 'prune_after')


def chain_of(
  config: Mapping[str, Any], stream: Stream, hp: Tree, wires: tuple[Wire, ...] = ()
) -> Method:
  """The methods in their order, then the head; `wires` are the model's."""
  chosen: dict[str, Method] = {}
  compress = config.get('compress', {})  # artefacts of earlier versions have none
  codec = compress.get('memory')
  for name in config['methods']:
    factory, values = methods.find(name), dict(config[name])
    values |= hp['methods'].get(name, {})
    gate = values.pop('gate')
    values |= known(factory, values, stream, config)
    if 'wires' in inspect.signature(factory).parameters:
      values['wires'] = wires
    own_rows = 'codec' in inspect.signature(factory).parameters  # they are not the stream's
    if codec and own_rows:
      values['codec'] = codec
    try:
      made = factory(**fields.arguments(factory, values))
    except (ValueError, TypeError) as error:
      raise UserError(f'config.{name}: {error}') from error
    if codec and not own_rows and SLOTS in config[name]:
      made = compression.memory(codec, made, name)
    chosen[name] = made if gate is None else compose.gated(gate, made)
  head = {'all': (), 'seen': ('seen_head',), 'current': ('current_head',), 'task': ('task_head',)}
  for name in head[config['head']]:
    if name in chosen:
      raise UserError(
        f'config.head={config["head"]!r} adds {name!r}: leave it out of config.methods'
      )
    if name == 'task_head':
      chosen[name] = task_head(stream.task_classes, stream.classes)
    else:
      chosen[name] = methods.find(name)(stream.classes)
  whole = compose.chain(**chosen) if chosen else Method()
  if not compress.get('state'):
    return whole
  return compression.state(compress['state'], whole, 'config.compress.state')


def known(
  factory: Callable, values: Mapping[str, Any], stream: Stream, config: Mapping[str, Any]
) -> dict[str, Any]:
  """Arguments that were left to the stream: {name: value} of those that are None in `values`."""
  found: dict[str, Any] = {}
  for name, p in inspect.signature(factory).parameters.items():
    if name in COUNTS and isinstance(values.get(name), tuple):
      one_a_task(f'config.{factory.__name__}.{name}', values[name], stream)
    if name not in KNOWN or values.get(name) is not None:
      continue
    free = p.default is p.empty
    if name == 'classes':
      found[name] = stream.classes
    elif name == 'tasks':
      found[name] = stream.tasks if free or _apart(factory, values, stream) else p.default
    elif name == 'task_classes':
      tells = free or 'task_test' in stream.told
      found[name] = stream.task_classes if tells else p.default
    elif name == 'prune_after':
      found[name] = by_task([max(1, 2 * n // 3) for n in steps_of(stream)])
    else:
      found[name] = by_task(epoch_steps(stream, config))
  return found


def counts_of(config: Mapping[str, Any], stream: Stream) -> tuple:
  """What the methods are told of this stream's steps: fixed in a program, like the labels of its tasks."""
  told = (known(methods.find(m), config[m], stream, config) for m in config['methods'])
  return tuple(one.get(name) for one in told for name in COUNTS)


def one_a_task(where: str, counts: tuple, stream: Stream) -> None:
  """Raises UserError unless `counts` are numbers of steps, one for each task."""
  if len(counts) != len(stream.index) or not all(type(n) is int and n > 0 for n in counts):
    raise UserError(
      f'{where} must be a whole number of at least 1, or one for each of the {len(stream.index)} tasks; '
      f'got {counts!r}'
    )


def steps_of(stream: Stream) -> list[int]:
  """The training steps of each task."""
  if stream.steps is None:
    return [stream.index.shape[1]] * len(stream.index)
  return [int(n) for n in np.asarray(stream.steps)]


def epoch_steps(stream: Stream, config: Mapping[str, Any]) -> list[int]:
  """The steps of an epoch of each task, at most all that it has."""
  examples, size = (np.asarray(stream.ends) >= 0).sum(axis=(1, 2)), config['batch']
  whole = [int(n) // size if config['drop_last'] else -(-int(n) // size) for n in examples]
  return [max(1, min(n, most)) for n, most in zip(whole, steps_of(stream), strict=True)]


def by_task(counts: Sequence[int]) -> int | tuple[int, ...]:
  """A number where all tasks have the same, else one a task."""
  return counts[0] if len({*counts}) == 1 else (*counts,)


def _apart(factory: Callable, values: Mapping[str, Any], stream: Stream) -> bool:
  """Whether a memory has to keep tasks apart: some share labels, and would share slots."""
  labels = [c for own in stream.task_classes for c in own]
  shared = len({*labels}) < len(labels)
  told = 'boundary' if factory is agem else 'task_train'  # A-GEM counts them
  return shared and values.get('writer', 'ring') in writers.BY_TASK and told in stream.told
