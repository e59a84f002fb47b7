"""Target vectors: what has to stand at the subject's last token for the model to say the new fact.

Many requests are optimised by one program: each has its own Adam and its own end, and only the layers above
the site and the tokens from the subject's last one on are run again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cl_jax.editing import inside
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Requests, Rows, groups, take, trimmed
from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

SITES = ('block', 'feedforward', 'attention')


class Recipe(NamedTuple):
  """How a target is looked for; the defaults are MEMIT's.

  Attributes:
    steps: iterations; the last one does not step.
    rate: of Adam.
    clamp: |delta| stays below this many norms of what stands there before.
    kl: weight of the divergence of what follows '{subject} is a'.
    decay: weight of |delta| / |z0|^2.
    stop: the loss below which a request is done.
    eased: weight of -log p from the step after one in which every token of the target was the most probable
      one in every context; 1 changes nothing (PMET 0.1).
    calm: of a request at which `eased` < 1 has set in, the divergence, times kl, up to which it is done.
  """

  steps: int = 25
  rate: float = 0.5
  clamp: float = 0.75
  kl: float = 0.0625
  decay: float = 0.5
  stop: float = 0.05
  eased: float = 1.0
  calm: float = 0.01


class Target(NamedTuple):
  """Targets of N requests.

  Attributes:
    start: {site: f[N, d]}, what stands at the site of the plain prompt.
    delta: {site: f[N, d]}, what is to be added.
    loss: f[N], at the last step that was looked at.
    log_p: f[N], mean log p of the target's tokens there, over contexts.
  """

  start: dict[str, Array]
  delta: dict[str, Array]
  loss: Array
  log_p: Array

  def at(self, site: str) -> Array:
    return self.start[site] + self.delta[site]


class Seen(NamedTuple):
  """What a step sees of one request, beside its loss.

  Attributes:
    log_p: f[], mean log p of the target's tokens, over contexts.
    said: bool[], whether each is the most probable token in every context.
    divergence: f[], with its weight.
  """

  log_p: Array
  said: Array
  divergence: Array


class _Fixed(NamedTuple):
  """What one request needs in every step."""

  rewrite: Rows
  essence: Rows
  middle: inside.Middle
  essence_middle: inside.Middle
  before: Array
  start: dict[str, Array]


def optimise(
  config: Config,
  p: Tree,
  requests: Requests,
  layer: int,
  sites: tuple[str, ...] = ('block',),
  recipe: Recipe = Recipe(),  # noqa: B008 (a NamedTuple)
  width: int = 16,
  rounds: Rounds = straight,
) -> Target:
  """Minimises for every request, by an Adam of its own from 0, over the deltas added at the sites of `layer`,

    mean over contexts of -log p(target) + kl KL(p || p_0 | '{subject} is a') + decay |delta| / |z0|^2

  (MEMIT, Meng et al., ICLR 2023, eq. 16; ROME, Meng et al., NeurIPS 2022, eq. 4; PMET, Li et al., AAAI 2024,
  eq. 11). The norm is not squared, the divergence is the one from the edited to the first distribution, as
  in github.com/kmeng01/memit, compute_z.py. `recipe.eased` and `recipe.calm` are of github.com/xpq-tech/PMET,
  compute_zs.py, and in no paper.

  Args:
    p: the backbone, as edited so far.
    layer: of the sites, counted from 0.
    sites: 'block' (the residual stream, MEMIT), 'feedforward' (what the MLP adds, ROME), 'attention'; several
      get a delta each (PMET: attention and feedforward).
    width: requests at a time.
    rounds: runs the loop over these.
  """
  if recipe.steps < 1 or width < 1:
    raise UserError(f'a target needs a step and a width of 1; got {recipe.steps} and {width}')
  for site in sites:
    if site not in SITES:
      raise UserError(f'site {site!r} is not known: use {", ".join(SITES)}')
  if not 0 <= layer < config.depth:
    raise UserError(f'layer {layer} is not one of the {config.depth} of this model')
  # Requests of like lengths go together, in arrays whose tails, which every step runs through, are short.
  lengths = np.asarray((requests.rewrite.tail >= 0).sum(-1).max(1))
  order = np.argsort(lengths, kind='stable')
  parts = groups(order, width)
  floats = jax.tree.map(float, recipe._replace(steps=0))

  def step(i: int, found: Target) -> Target:
    some, real = parts[i]
    group = take(requests, some)
    group = group._replace(rewrite=trimmed(group.rewrite))
    new = _group(config, p, layer, tuple(sites), recipe.steps, floats, group)
    at = some[:real]
    return jax.tree.map(lambda a, b: a.at[at].set(b[:real]), found, new)

  dtype = p['embed']['tokens'].dtype
  none, blank = jnp.zeros(len(order), dtype), jnp.zeros((len(order), config.d), dtype)
  nothing = Target(dict.fromkeys(sites, blank), dict.fromkeys(sites, blank), none, none)
  return rounds('targets', len(parts), nothing, step)


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _group(config, p, layer, sites, steps, recipe: Recipe, requests: Requests) -> Target:
  recipe = recipe._replace(steps=steps)  # its floats are traced
  fixed = jax.vmap(lambda r: _prepare(config, p, r, layer, sites))(requests)
  tx = optax.adam(recipe.rate)
  value = jax.value_and_grad(partial(loss, config, p, layer, recipe), has_aux=True)
  zeros = jax.tree.map(jnp.zeros_like, fixed.start)
  opened = jax.vmap(tx.init)(zeros)
  n = len(requests.rewrite.head)
  dtype = zeros[sites[0]].dtype

  def step(carry):
    i, delta, opt, weight, done, seen, _ = carry
    (lost, now), g = jax.vmap(value)(delta, fixed, weight)
    # A request that is done keeps what it was when it was found to be.
    seen = jnp.where(done, seen, jnp.stack([lost, now.log_p]))
    eased = now.said & (recipe.eased < 1)
    weight = jnp.where(eased, recipe.eased, 1.0).astype(dtype)
    done = done | (lost < recipe.stop) | (i == recipe.steps - 1)
    done = done | (eased & (now.divergence <= recipe.calm))
    update, new_opt = jax.vmap(tx.update)(g, opt)
    new = jax.tree.map(jnp.add, delta, update)
    new = {s: jax.vmap(partial(_clamp, recipe.clamp))(new[s], fixed.start[s]) for s in sites}
    keep = lambda old, new: jax.tree.map(  # noqa: E731
      lambda a, b: jnp.where(done.reshape(-1, *[1] * (a.ndim - 1)), a, b), old, new
    )
    return i + 1, keep(delta, new), keep(opt, new_opt), weight, done, seen, done.all()

  ones, seen = jnp.ones(n, dtype), jnp.zeros((2, n), dtype)
  start = (0, zeros, opened, ones, jnp.zeros(n, bool), seen, jnp.array(False))
  carry = jax.lax.while_loop(lambda c: (c[0] < recipe.steps) & ~c[-1], step, start)
  return Target(fixed.start, carry[1], *carry[5])


def _clamp(most: float, delta: Array, start: Array) -> Array:
  norm, bound = jnp.linalg.norm(delta), most * jnp.linalg.norm(start)
  return jnp.where(norm > bound, delta * (bound / norm), delta)


def _prepare(config, p, request: Requests, layer: int, sites) -> _Fixed:
  """Of one request: rows [P, ...] and a row [...]."""
  essence = Rows(*(a[None] for a in request.essence))
  one = inside.middle(config, p, request.rewrite, layer)
  two = inside.middle(config, p, essence, layer)
  before = inside.predictions(config, p, inside.go_on(config, p, two, layer), essence)[0, 0]
  start: dict[str, Array] = {}
  # What stands at the sites of the plain prompt: layer alone, with a tap that takes it along.
  h, place = inside.begin(config, p, Rows(*(a[:1] for a in request.rewrite)))
  h = inside.between(config, p, h, place, 0, layer)
  _, start = inside.captured(config, p, h, layer, place, sites, request.rewrite.head.shape[-1])
  start = {site: value[0] for site, value in start.items()}
  return _Fixed(request.rewrite, essence, one, two, before, start)


def loss(
  config, p, layer, recipe: Recipe, delta: dict[str, Array], fixed: _Fixed, weight: Any = 1.0
):
  """(what is minimised f[], what is seen) of one request; `weight` f[] of -log p."""

  def tap(name, h, i):
    if name not in delta:
      return h
    return h.at[:, 0].add(jnp.where(i == layer, delta[name], 0.0))

  h = inside.go_on(config, p, fixed.middle, layer, tap)
  predicted = inside.predictions(config, p, h, fixed.rewrite)
  log_p = inside.mean_log_p(predicted, fixed.rewrite.target).mean()
  said = ((predicted.argmax(-1) == fixed.rewrite.target) | (fixed.rewrite.target < 0)).all()
  h = inside.go_on(config, p, fixed.essence_middle, layer, tap)
  after = inside.predictions(config, p, h, fixed.essence)[0, 0]
  divergence = recipe.kl * (jnp.exp(after) * (after - fixed.before)).sum()
  size = sum(_norm(delta[site]) / jnp.sum(fixed.start[site] ** 2) for site in delta)
  return -weight * log_p + divergence + recipe.decay * size, Seen(log_p, said, divergence)


def _norm(a: Array) -> Array:
  """|a| with a gradient of 0 at 0, where Adam starts."""
  square = jnp.sum(a**2)
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
