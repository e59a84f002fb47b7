"""The optimiser of a configuration: an optax function, learning-rate groups, schedule, reset."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cl_jax import compression, masks
from cl_jax.errors import UserError
from cl_jax.types import Learner, Tree

OURS = ('name', 'schedule', 'groups', 'reset')


def traced(config: Mapping[str, Any]) -> dict[str, float]:
  """The floats that are traced. A 0 that switches a part off, and saves its state, is fixed."""
  options = config['optimizer']
  found = {k: v for k, v in options.items() if isinstance(v, float)}
  for name in ('momentum', *(() if decays(options['name']) else ('weight_decay',))):
    if found.get(name) == 0:
      del found[name]
  return found


def decays(name: str) -> bool:
  """Whether the optimiser has a weight decay of its own."""
  return 'weight_decay' in inspect.signature(getattr(optax, name)).parameters


def make(
  config: Mapping[str, Any], hp: Tree
) -> tuple[optax.GradientTransformation, Callable[[Tree, Tree], Tree] | None]:
  """(the optimiser, (its state, params) -> its state forgotten, or None where it is kept)."""
  options, floats = config['optimizer'], dict(hp['optimizer'])
  rate = floats.pop('lr')
  decay = None if decays(options['name']) else floats.pop('weight_decay', None)
  given = {k: v for k, v in options.items() if k not in (*OURS, 'lr', 'weight_decay')}
  given = {k: None if k == 'momentum' and v == 0 else v for k, v in given.items()}
  core = getattr(optax, options['name'])(rate, **(given | floats))
  if decay is not None:
    core = optax.chain(optax.add_decayed_weights(decay), core)
  if options['groups']:
    core = optax.chain(core, grouped(hp['groups'], [p for p, _ in options['groups']]))
  if codec := config.get('compress', {}).get('optimizer'):
    core = compression.moments(codec, core)
  tx = core
  if options['schedule'] == 'cosine':
    tx = optax.chain(core, optax.scale_by_schedule(cosine(hp['legs'])))
  if not options['reset']:
    return tx, None

  def reset(opt: Tree, params: Tree) -> Tree:
    fresh = core.init(params)
    return fresh if tx is core else (fresh, opt[1])  # the schedule goes on counting

  return tx, reset


def grouped(factors: Mapping[str, Any], patterns: list[str]) -> optax.GradientTransformation:
  """Multiplies the update of every parameter by the factor of its group.

  The learning rate is the last factor of all of optax's optimisers, decoupled decay included, so this
  equals an optimiser of its own per group and keeps one state.
  """

  def marked(tree: Tree) -> Tree:
    try:
      return masks.mark(tree, [(p, factors[p]) for p in patterns])
    except UserError as error:
      raise UserError(f'config.optimizer.groups: {error}') from error

  def init(params: Tree) -> Tree:
    marked(params)
    return optax.EmptyState()

  def update(updates: Tree, state: Tree, params: Tree = None) -> tuple[Tree, Tree]:
    return jax.tree.map(lambda u, f: u * f, updates, marked(updates)), state

  return optax.GradientTransformation(init, update)


def cosine(legs: jax.Array) -> Callable[[Any], Any]:
  """1 at the first step of a leg, falling to 0 after its last. `legs` i32[L + 1] are their beginnings."""
  legs = jnp.asarray(legs)

  def factor(count: Any) -> Any:
    leg = jnp.clip(jnp.searchsorted(legs, count, side='right') - 1, 0, legs.shape[0] - 2)
    done = (count - legs[leg]) / (legs[leg + 1] - legs[leg])
    return 0.5 * (1 + jnp.cos(jnp.pi * done))

  return factor


def resetting(made: Learner, reset: Callable[[Tree, Tree], Tree] | None) -> Learner:
  """The learner, whose optimiser starts afresh at every boundary."""
  if reset is None:
    return made

  def boundary(state, batches):
    state = made.boundary(state, batches)
    return state._replace(opt=reset(state.opt, state.params))

  needs = tuple(sorted({*made.needs, 'boundary'}))
  return made._replace(boundary=boundary, needs=needs)
