"""The whole vocabulary: read this file first.

A continual learner is four pure functions over one state pytree (`Learner`, `State`). A method is
a few pure hooks that compose (`Method`). A model is three functions (`Model`). Everything that
moves between them is a `Batch` going in and an `Out` coming back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

Array = jax.Array
Tree = Any  # a pytree; parameters are nested dicts of arrays


class Batch(NamedTuple):
  """Examples that arrive together; the leading axis B of every leaf is the example.

  Attributes:
    x: inputs as the stream stores them: u8[B, H, W, C] images, f32[B, D] features, or a tree such
      as {'tokens': i32[B, L], 'mask': bool[B, L]}. Replay memory keeps exactly these bytes.
    y: i32[B] labels.
    w: f32[B] loss weights; 0 marks padding, which must not influence anything.
    task: i32[B] task identity; -1 where the scenario does not tell it.
  """

  x: Tree
  y: Array
  w: Array
  task: Array


class Out(NamedTuple):
  """What a forward pass returns.

  Attributes:
    logits: f32[B, C].
    features: f32[B, D], the input of the classification head.
    stats: new norm statistics, shaped like the model's `stats`; {} without such layers or outside
      training.
    aux: dict of what a `wrap` hands to the other hooks of its method; every leaf [B, ...].
  """

  logits: Array
  features: Array
  stats: Tree
  aux: Tree = {}  # noqa: RUF012 (never written to)


def no_tap(name: str, h: Array, layer: Array | int = 0) -> Array:
  """The tap that leaves every activation as it is."""
  del name, layer
  return h


class Wire(NamedTuple):
  """A layer by the units it reads and the units it writes, for methods that share units out to tasks.

  A unit is one channel (the last axis) of a tapped activation. A unit that a tap sets to zero must neither
  show in what the layers read that have it as their source, nor be of use to those that write it.

  Attributes:
    layer: path of the parameters; 'w' is [..., in, out], the others [..., out].
    source: the tap whose channels are the inputs, each as often as `in` is longer (flattened pixels).
      '' where they belong to no tap, as pixels do and what a norm layer has mixed.
    target: the tap whose channels are the outputs; '' where they belong to none.
  """

  layer: str
  source: str
  target: str


class Model(NamedTuple):
  """A network as three pure functions.

  Attributes:
    init: (key, batch) -> (params, stats). Nested dicts; `stats` holds what a forward pass updates
      without a gradient (batch-norm statistics), {} when there is nothing of the kind.
    apply: (variables, batch, tap, train) -> Out, where `variables` is `params` laid over `stats`
      (and over frozen weights), and `tap(name, h, layer)` is called on every named hidden activation
      and returns what the network goes on with: gates, prompts and probes are taps. `layer` is
      the (traced) position in a stack of layers that share the name, 0 elsewhere.
    loss: (out, batch) -> f32[B], the per-example task loss.
    wires: the layers between its taps; parameters that no wire names are of use to every unit.
    measure: (out, batch) -> f32[B, 2], what evaluation reports of each example and how much that counts: R is
      the ratio of the sums, higher is better. None is accuracy.
  """

  init: Callable[[Array, Batch], tuple[Tree, Tree]]
  apply: Callable[..., Out]
  loss: Callable[[Out, Batch], Array]
  wires: tuple[Wire, ...] = ()
  measure: Callable[[Out, Batch], Array] | None = None


class Forward(NamedTuple):
  """The forward pass as hooks see it: `fwd(params, batch)`, with everything else filled in.

  `params` win over `stats`, which win over `frozen`; so a snapshot that must keep its own norm
  statistics is `overlay(fwd.stats, params)` and is passed back as `params` (see `lwf`).
  """

  apply: Callable[..., Out]
  frozen: Tree
  stats: Tree

  def __call__(self, params: Tree, batch: Batch, tap=no_tap, train: bool = False) -> Out:
    return self.apply(overlay(self.frozen, self.stats, params), batch, tap, train)


class Transition(NamedTuple):
  """What one optimiser step saw, for the `after` hook.

  Attributes:
    params: the parameters before the step.
    grads: the gradient that went into the optimiser (after the `grads` hooks).
    batch: the stream's batch, without the rows that `mix` appended.
    out: the forward pass on that batch before the step, row for row.
  """

  params: Tree
  grads: Tree
  batch: Batch
  out: Out


class Method(NamedTuple):
  """A continual-learning method: pure hooks over its own state `s`, each the identity by default.

  `fwd` is a `Forward`; `grad_fn(params, batch) -> ((loss, Out), grads)` is the training loss of this
  step; `key` is a typed key derived from the step and the method's name in its chain.

  Attributes:
    init: (key, params, batch, fwd) -> (new_params, s). `params` are the trainable parameters so far;
      `new_params` are added to them and must not collide. `fwd.frozen` holds the frozen weights.
    wrap: (s, apply) -> apply. Gates, adapters, prompts, heads; `apply` is a `Model.apply`.
    mix: (s, batch) -> batch. Rehearsal: may append rows, must keep the stream's rows first.
    loss: (s, params, batch, out, fwd) -> f32[], added to the task loss; `batch` includes mixed rows.
    grads: (s, g, params, batch, grad_fn) -> (g, s). Projections and masks of the gradient.
    after: (s, params, step, key) -> (params, s). Follows the update: `params` are the new ones and
      `step` is the `Transition`. Masks, memory writes, statistics.
    boundary: (s, params, batches, fwd, key) -> (params, s). A task ended; `batches` holds its
      training examples once, stacked: every leaf is [S, B, ...].
    needs: what the scenario must tell: any of 'task_train', 'task_test', 'boundary'. And 'batch_test', of a
      method that looks across the rows of a test batch: no scenario tells it and none refuses it, but results
      say so, since a batch of one task gives the task away.
  """

  init: Callable = lambda key, params, batch, fwd: ({}, ())
  wrap: Callable = lambda s, apply: apply
  mix: Callable = lambda s, batch: batch
  loss: Callable = lambda s, params, batch, out, fwd: 0.0
  grads: Callable = lambda s, g, params, batch, grad_fn: (g, s)
  after: Callable = lambda s, params, step, key: (params, s)
  boundary: Callable = lambda s, params, batches, fwd, key: (params, s)
  needs: tuple[str, ...] = ()


class State(NamedTuple):
  """Everything that evolves; a checkpoint is this tree and nothing else."""

  params: Tree
  stats: Tree
  opt: Tree
  method: Tree
  key: Array
  step: Array


class Learner(NamedTuple):
  """The closed form: all that loops, sweeps, checkpoints and exporters ever see.

  Attributes:
    init: (key, batch) -> State.
    step: (state, batch) -> (state, loss f32[]).
    boundary: (state, batches) -> state.
    predict: (state, batch) -> logits f32[B, C]; reads `batch.x` and `batch.task` only, row by row (unless
      `needs` has 'batch_test').
    needs: see `Method.needs`; checked against the stream before the first step.
    measure: (state, batch) -> f32[B, 2]; see `Model.measure`.
  """

  init: Callable[[Array, Batch], State]
  step: Callable[[State, Batch], tuple[State, Array]]
  boundary: Callable[[State, Batch], State]
  predict: Callable[[State, Batch], Array]
  needs: tuple[str, ...] = ()
  measure: Callable[[State, Batch], Array] | None = None


def overlay(*trees: Tree) -> Tree:
  """Lays nested dicts over each other; where two hold the same leaf, the later one wins."""
  merged: dict = {}
  for tree in trees:
    for name, value in tree.items():
      below = merged.get(name)
      merged[name] = (
        overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
      )
  return merged


@partial(
  jax.tree_util.register_dataclass,
  data_fields=['x', 'y', 'index', 'steps', 'ends', 'test', 'views', 'offset'],
  meta_fields=['scenario', 'told', 'classes', 'task_names', 'task_classes', 'view'],
)
@dataclasses.dataclass(frozen=True)
class Stream:
  """A sequence of tasks as an index table over data that stays on the device.

  Attributes:
    x: all training inputs, every leaf [N, ...], in the dtype they are stored in; or `streams.Records`, which
      stay in files.
    y: i32[N] labels.
    index: i32[L, S, B] rows of `x` in the order they are learnt from, in L legs; -1 is padding. A leg is
      a task (L = T), except where tasks are not learnt one by one: 'joint' has one leg, 'blurry'
      as many as there are evaluations. Where legs mix tasks an entry is k * N + n, row n as task k
      sees it; see `streams.take`.
    steps: i32[L], the steps that leg l really has; None when all have S.
    ends: i32[L, E, B'] the distinct training examples of each leg once, for boundaries; -1 pads.
    test: what is evaluated after every leg; every leaf [T, E, B', ...], already viewed and offset.
    views: arrays [T, ...], the parameters of the transformation of task t; None without one.
    offset: i32[T] added to the labels of task t (permuted class-incremental); None is 0.
    scenario: 'task', 'class', 'domain', 'joint', 'cumulative', 'blurry' or 'online'.
    told: what a learner may know: of 'task_train', 'task_test', 'boundary'.
    classes: size of the output layer.
    task_names: a short name per task.
    task_classes: the labels that occur in each task.
    view: (x, views[t]) -> x for a batch [B, ...]; None is the identity.
  """

  x: Tree
  y: Array
  index: Array
  ends: Array
  test: Batch
  scenario: str
  told: tuple[str, ...]
  classes: int
  task_names: tuple[str, ...]
  task_classes: tuple[tuple[int, ...], ...]
  steps: Array | None = None
  views: Tree = None
  offset: Array | None = None
  view: Callable[[Tree, Tree], Tree] | None = None

  @property
  def tasks(self) -> int:
    return len(self.task_names)
