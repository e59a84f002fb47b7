"""From a resolved configuration to streams, weights and `build(hp, weights) -> Learner`.

`hp` holds the floats of the optimiser and of the methods, which are traced; whatever else the
configuration says is fixed inside `build`: see `traced`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cl_jax import budget, masks, methods, sparse
from cl_jax.errors import UserError
from cl_jax.learner import learner
from cl_jax.loop import check_needs
from cl_jax.models import pretrained
from cl_jax.models.identity import identity
from cl_jax.models.mlp import mlp
from cl_jax.models.quantised import quantise_tree
from cl_jax.streams.records import in_files
from cl_jax.types import Batch, Learner, Model, Stream, Tree, overlay
from experiments import capacity, features, fields, limits, optimizer, update
from experiments.chain import chain_of, counts_of, epoch_steps, steps_of
from experiments.config import dumps, find_model
from experiments.streams import alike, streams


class Setup(NamedTuple):
  """What one compiled program needs.

  Attributes:
    config: resolved; one of those that the program serves.
    seeds: of the runs.
    streams: one per seed, equal in shapes and in everything but arrays.
    weights: {'frozen', 'initial'}: parameters that are not trained, and pretrained ones that are; shared
      by all runs.
    build: (hp, weights) -> Learner.
    assemble: (hp, weights, model, method, tasks) -> Learner with another model or method, or for the first
      `tasks` tasks of the stream; None is the own one, and all.
    model: (weights) -> Model.
    frozen: every weight that the learner keeps and does not train, also those behind cached features.
    slots: {method: capacity} that `config.budget_bytes` gave; {} without a budget.
    below: FLOPs of the pass of one example through the network whose features are cached; 0 where none are.
  """

  config: dict[str, Any]
  seeds: tuple[int, ...]
  streams: list[Stream]
  weights: dict[str, Tree]
  build: Callable[[Tree, Tree], Learner]
  assemble: Callable[..., Learner]
  model: Callable[[Tree], Model]
  frozen: Tree
  slots: dict[str, int]
  below: int = 0


def prepare(
  config: Mapping[str, Any],
  data_dir: str | Path | None = None,
  tell: Callable[[str], None] = lambda line: None,
) -> list[Setup]:
  """Reads the data and the weights, and checks all that can be checked before anything is compiled.

  Args:
    config: see `config.resolve`.
    data_dir: see `streams.load.dataset`.
    tell: gets a line about what takes long, and about what is allowed and seldom meant.

  Returns:
    One setup for all seeds; one per seed where the methods fix the labels or the steps of each task in the
    program and these differ by seed, where seeds have different numbers of examples, and where examples stay
    in files.
  """
  config = dict(config)
  per_seed = streams(config, data_dir)
  told = 'task_test' in per_seed[0].told
  if told and config['head'] != 'task' and len({*per_seed[0].task_classes}) > 1:
    tell(
      f'config.head={config["head"]!r}: the task is told at test, and yet its answers compete with those of '
      "other tasks; config.head='task' keeps them apart"
    )
  counts = {counts_of(config, s) for s in per_seed}
  if late := never_free(config, per_seed[0]):
    tell(
      f'config.inflora: {late} of {per_seed[0].tasks} tasks have no more steps than it gathers in '
      '(config.inflora.warm), and train no adapter'
    )
  apart = len(counts) > 1 or (told and len({s.task_classes for s in per_seed}) > 1)
  apart = apart or len({len(s.y) for s in per_seed}) > 1
  if apart or in_files(per_seed[0].x):
    parts = [((seed,), [s]) for seed, s in zip(config['seeds'], per_seed, strict=True)]
  else:
    parts = [(config['seeds'], alike(per_seed))]
  return [_setup(config, seeds, group, tell) for seeds, group in parts]


def _setup(config, seeds, group: list[Stream], tell) -> Setup:
  first = example(group[0])
  make, initial = network(config, group[0].classes)
  if update.rules(config):
    known = {} if initial is None else {'backbone': initial}
    make = update.network(config, make, known, first, group[0])
  weights, frozen = split_weights(config, make, initial, first)
  known_tokens(group, make(weights), first)
  below = 0
  if config['cache_features']:
    chosen = chain_of(config, group[0], hyper(config, group[0]))
    group, below = features.cached(config, make, weights, chosen, group, tell)
    weights, make = {'frozen': {}, 'initial': {}}, head_only(config, group[0].classes)
  facts = group[0]

  def assemble(hp, weights, model=None, own=None, tasks=None) -> Learner:
    tx, reset = optimizer.make(config, hp)
    model = make(weights) if model is None else model
    method = chain_of(sized if own is None else own, begun(facts, tasks), hp, model.wires)
    parts = config.get('micro_batches', 1)  # artefacts of earlier versions have no such field
    again = reset if len(facts.index) > 1 else None  # joint training has no boundary inside
    return optimizer.resetting(learner(model, tx, method, weights['frozen'], parts), again)

  def added(own) -> int:
    """Bytes of state beyond plain fine-tuning."""
    hp, first = hyper(config, facts), example(facts)
    total = lambda c: budget.state_bytes(  # noqa: E731
      jax.eval_shape(assemble(hp, weights, own=c).init, jax.random.key(0), first)
    )['total']
    return total(own) - total(capacity.without_methods(config))

  sized = capacity.fitted(config, added)
  slots = {m: sized[m]['capacity'] for m in config['methods'] if sized[m] != config[m]}
  setup = Setup(
    config,
    seeds,
    group,
    weights,
    lambda hp, w: assemble(hp, w),
    assemble,
    make,
    frozen,
    slots,
    below,
  )
  check(setup)
  limits.check(slotted(setup), frozen, partial(programs, setup))
  return setup


def known_tokens(group: Sequence[Stream], model: Model, first: Batch) -> None:
  """Raises UserError where texts have tokens beyond the network's, which it would take for its last one."""
  if not isinstance(group[0].x, dict) or 'tokens' not in group[0].x:
    return
  params = masks.paths(jax.eval_shape(model.init, jax.random.key(0), first)[0])
  rows = min((a.shape[0] for p, a in params.items() if p.endswith('embed/tokens')), default=None)
  top = max(int(np.max(x['tokens'])) for s in group for x in (s.x, s.test.x))
  if rows is not None and top >= rows:
    raise UserError(
      f'the data have token {top} and the network knows {rows}: config.data.tokenizer must be the one that '
      'the network was trained with'
    )


def never_free(config: Mapping[str, Any], stream: Stream) -> int:
  """How many tasks InfLoRA would only gather in."""
  if 'inflora' not in config['methods']:
    return 0
  own = config['inflora']
  given = own['warm'] if own['warm'] is not None else own['steps_per_epoch']
  if given is None:
    gathers = epoch_steps(stream, config)
  else:
    gathers = given if isinstance(given, tuple) else [given] * len(stream.index)
  return sum(n <= warm for n, warm in zip(steps_of(stream), gathers, strict=True))


def begun(stream: Stream, tasks: int | None) -> Stream:
  """The stream as methods would know it if it ended after `tasks` tasks; the output layer stays whole."""
  return dataclasses.replace(
    stream, task_names=stream.task_names[:tasks], task_classes=stream.task_classes[:tasks]
  )


def check(setup: Setup) -> None:
  """Builds the learner once from numbers and traces its parts: what is wrong shows here.

  Boundaries and predictions of several methods alone: what a method does by itself is known to work.
  """
  stream, config = setup.streams[0], setup.config
  if 'packnet' in config['methods'] and stream.tasks > 255:
    raise UserError(
      f'config.tasks={stream.tasks}: packnet says whose a weight is in a byte, of 255 tasks'
    )
  hp = hyper(config, stream)
  try:
    trace(setup.build(hp, setup.weights), stream, whole=len(config['methods']) > 1)
  except (AttributeError, KeyError, ValueError, TypeError) as error:
    names = config['methods']
    for name in names[1:]:
      order = (name, *(n for n in names if n != name))
      try:
        own = {**slotted(setup), 'methods': order}
        trace(setup.assemble(hp, setup.weights, own=own), stream, whole=True)
      except Exception:  # noqa: BLE001, S112 (this order does not work either, for whatever reason)
        continue
      raise UserError(
        f'config.methods: {name} adds parameters that a method before it does not know: put it first'
      ) from error
    if isinstance(error, KeyError | AttributeError) and len(names) < 2:
      raise
    text = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
    raise UserError(
      f'config: {config["model"]["name"]} with {"+".join(names) or "naive"} on {config["dataset"]} does not '
      f'work: {text}'
    ) from error


def trace(made: Learner, stream: Stream, whole: bool) -> None:
  """Traces the beginning of a learner, or the `whole` of it.

  Raises:
    UserError: what it needs the stream does not tell. And whatever comes up, as ValueError a state that has
      other entries after a boundary.
  """
  check_needs(made.needs, stream)
  first = example(stream)
  state = jax.eval_shape(made.init, jax.random.key(0), first)
  after, _ = jax.eval_shape(made.step, state, first)
  if not whole:
    return
  if 'boundary' in stream.told:
    shape = stream.ends.shape[1:]
    ends = jax.tree.map(lambda a: jax.ShapeDtypeStruct((*shape, *a.shape[1:]), a.dtype), first)
    then = jax.eval_shape(made.boundary, after, ends)
    now, new = (
      {(jax.tree_util.keystr(path, simple=True, separator='/'), a.shape, str(a.dtype))
       for path, a in jax.tree_util.tree_leaves_with_path(s)}
      for s in (after, then)
    )  # fmt: skip
    if now != new:
      raise ValueError(f'a boundary changes the shape of the state: {min(now ^ new)[0]}')
    after = then
  jax.eval_shape(made.predict, after, first)


def slotted(setup: Setup) -> dict[str, Any]:
  """The configuration with the capacities that it is built with."""
  return {
    **setup.config,
    **{name: {**setup.config[name], capacity.SLOTS: n} for name, n in setup.slots.items()},
  }


def programs(
  setup: Setup, own: Mapping[str, Any] | None = None, rows: int | None = None
) -> limits.Programs:
  """The learner's functions and the shapes they take; nothing is computed.

  Args:
    setup: of the learner.
    own: a configuration whose methods take the place of its own.
    rows: of a batch; None = as many as the stream has.
  """
  stream = setup.streams[0]
  hp = hyper(setup.config, stream)
  struct = lambda a, shape: jax.ShapeDtypeStruct(shape, a.dtype)  # noqa: E731
  batch = jax.tree.map(lambda a: struct(a, (rows or a.shape[0], *a.shape[1:])), example(stream))
  weights = jax.tree.map(lambda a: struct(a, a.shape), setup.weights)

  def made(weights) -> Learner:
    return setup.assemble(hp, weights, budget.scoped(setup.model(weights)), own)

  state = jax.eval_shape(lambda w, b: made(w).init(jax.random.key(0), b), weights, batch)
  return limits.Programs(
    lambda w, s, b: made(w).step(s, b), lambda w, s, b: made(w).predict(s, b), weights, state, batch
  )


def resident(config: Mapping[str, Any], program: str) -> None:
  """Raises UserError where a command that needs the examples on the device is to leave them in files."""
  if name := config.get('feed', {}).get('name'):
    raise UserError(
      f'config.feed.name={name!r} is for python -m experiments.run on one device; {program} needs the '
      "examples in memory: leave it at ''"
    )


def example(stream: Stream) -> Batch:
  """A batch of the stream's shapes, from its first rows."""
  rows = np.arange(stream.index.shape[-1]) % len(stream.y)
  x = jax.tree.map(lambda a: np.asarray(a[rows]), stream.x)
  task: Any = np.full(len(rows), 0 if 'task_train' in stream.told else -1, np.int32)
  w: Any = np.ones(len(rows), np.float32)
  return Batch(x, stream.y[rows], w, task)


# --- the network ------------------------------------------------------------------------------------


def network(config: Mapping[str, Any], classes: int) -> tuple[Callable[[Tree], Model], Tree]:
  """((weights) -> Model, the pretrained backbone or None)."""
  named = dict(config['model'])
  factory, source = find_model(named.pop('name')), named.pop('pretrained', '')
  given = fields.arguments(factory, named)
  initial = None
  if source:
    module: Any = importlib.import_module(factory.__module__)
    shape, initial = module.load(pretrained.find(source).path)
    given['config'] = shape

  def make(weights: Tree) -> Model:
    try:
      if initial is None:
        return factory(**given, classes=classes)
      backbone = overlay(weights['frozen'], weights['initial'])['backbone']
      return factory(**given, classes=classes, weights=backbone)
    except (ValueError, TypeError) as error:
      raise UserError(f'config.model: {error}') from error

  return make, initial


def split_weights(config, make, initial: Tree, first: Batch) -> tuple[dict[str, Tree], Tree]:
  """({'frozen', 'initial'}, the frozen ones again): what is shared by all runs."""
  pretrained_tree = {} if initial is None else {'backbone': initial}
  chosen = update.rules(config)
  if not config['freeze'] and not chosen:
    return {'frozen': {}, 'initial': pretrained_tree}, {}
  # One copy for all seeds: without pretrained weights, what is frozen is drawn from seed 0.
  params, _ = make({'frozen': {}, 'initial': pretrained_tree}).init(jax.random.key(0), first)
  try:
    frozen = sparse.frozen(params, chosen) if chosen else masks.split(params, config['freeze'])[0]
  except UserError as error:
    name = 'update.parts' if chosen else 'freeze'
    raise UserError(f'config.{name}: {error}') from error
  rest = masks.subtract(params, frozen)
  rest = {k: v for k, v in rest.items() if k in pretrained_tree}
  if config['frozen_bits']:
    frozen = quantise_tree(frozen, config['frozen_bits'])
  return {'frozen': frozen, 'initial': rest}, frozen


def head_only(config: Mapping[str, Any], classes: int) -> Callable[[Tree], Model]:
  """What learns from cached features: nothing for closed-form methods, else a linear layer."""
  home = [methods.find(name).__module__ for name in config['methods']]
  if any('.closed_form.' in module for module in home):
    return lambda weights: identity(classes)
  return lambda weights: mlp((), classes, config['model'].get('init', 'he'))


# --- hyperparameters --------------------------------------------------------------------------------


def hyper(config: Mapping[str, Any], stream: Stream) -> dict[str, Tree]:
  """The traced part: numpy scalars, as `build` takes them."""
  number = np.float32
  steps = (
    np.full(len(stream.index), stream.index.shape[1]) if stream.steps is None else stream.steps
  )
  return {
    'optimizer': {k: number(v) for k, v in optimizer.traced(config).items()},
    'groups': {pattern: number(factor) for pattern, factor in config['optimizer']['groups']},
    'methods': {
      name: {k: number(v) for k, v in config[name].items() if isinstance(v, float)}
      for name in config['methods']
    },
    'legs': np.concatenate([[0], np.cumsum(steps)]).astype(np.int32),
  }


def traced(config: Mapping[str, Any]) -> dict[str, Any]:
  """A cell for `sweep.compile_groups`: the floats that are traced, and all the rest as one text."""
  fixed = {k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
  floats: dict[str, Any] = {'optimizer': optimizer.traced(config), 'groups': {}}
  for name in floats['optimizer']:
    del fixed['optimizer'][name]
  for pattern, factor in config['optimizer']['groups']:
    floats['groups'][pattern] = float(factor)
  fixed['optimizer']['groups'] = [pattern for pattern, _ in config['optimizer']['groups']]
  for name in config['methods']:
    floats[name] = {k: v for k, v in config[name].items() if isinstance(v, float)}
    fixed[name] = {k: v for k, v in config[name].items() if not isinstance(v, float)}
  del fixed['name']
  return {**floats, 'fixed': dumps(fixed)}


def likelihood(config: Mapping[str, Any]) -> bool:
  """Whether R holds log-likelihoods in nats a token, and not accuracies."""
  model = config['model']
  return model.get('output') == 'tokens' and model.get('measure') == 'likelihood'


def stacked(trees: Sequence[Tree]) -> Tree:
  """Hyperparameters of several runs as one tree with a leading run axis."""
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
