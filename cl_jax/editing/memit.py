"""MEMIT (Meng et al., ICLR 2023): thousands of facts in one solve a layer, and the layer loop it shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.editing import inside, write
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Requests, Rows, flat
from cl_jax.editing.target import Recipe, optimise
from cl_jax.editing.write import Editor, Write
from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

Moments = Mapping[int, np.ndarray]  # {layer: E[k k^T] f64[ffn, ffn]}, see `statistics`


def memit(
  config: Config,
  moments: Moments,
  layers: Sequence[int],
  coef: float = 15000.0,
  recipe: Recipe = Recipe(),  # noqa: B008 (a NamedTuple)
  width: int = 16,
  rounds: Rounds = straight,
) -> Editor:
  """Spreads the residual of all requests over `layers` (alg. 1, eq. 14 and 20; github.com/kmeng01/memit):

    W_l += (coef C_l + K K^T)^-1 K R^T,  R = (z - h^L) / (layers left, with this one)

  with the keys K [ffn, N] and the state h^L read again from the model after every layer that was written, and
  z the states after the last layer L that say the new facts (`target.optimise`). Solved in float64.

  Args:
    moments: C_l = E[k k^T] for every layer, from a text corpus.
    layers: to write to, ascending; published for GPT-J: 3 to 8, for GPT2-XL: 13 to 17.
    coef: weight of what the layers knew before; published 15000 (GPT-J), 20000 (GPT2-XL).
    recipe: of the targets.
    width: requests whose targets are optimised at a time.
    rounds: runs the loop over these.

  State: none; moments are the editor's constants. Deviation: W and keys are in the model's own precision, the
  solve alone in float64, as in the repository.
  """
  layers = ascending(config, layers, moments)
  solve = solver(moments, coef)

  def edit(backbone: Tree, state: Any, requests: Requests, key: Array):
    del key
    target = optimise(config, backbone, requests, layers[-1], ('block',), recipe, width, rounds)
    writes = spread(config, backbone, requests, target.at('block'), layers, solve)
    return writes, state, {'loss': target.loss, 'log_p': target.log_p}

  return Editor(lambda backbone: (), edit)


def solver(moments: Moments, coef: float) -> Callable[[int, np.ndarray], np.ndarray]:
  """The `solve` of `spread`: (coef C_l + K K^T)^-1 K."""
  return lambda layer, keys: np.linalg.solve(coef * moments[layer] + keys @ keys.T, keys)


def spread(
  config: Config,
  backbone: Tree,
  requests: Requests,
  goal: Array,
  layers: Sequence[int],
  solve: Callable[[int, np.ndarray], np.ndarray],
  share: Callable[[int], float] = lambda rest: 1.0 / rest,
  site: str = 'state',
) -> list[Write]:
  """The layer loop: what is missing at the last layer, shared out among the layers that are left.

  Args:
    goal: f[N, d], what has to stand at `site` of the last layer.
    solve: (layer, keys f64[ffn, N]) -> f64[ffn, N]; its product with the residuals is the term.
    share: (layers left, with this one) -> the part of the residual that this one takes.
    site: 'state' (the residual stream) or 'feedforward' (what the MLP adds).
  """
  writes: list[Write] = []
  now = backbone
  for i, layer in enumerate(layers):
    keys, reading = keys_of(config, now, requests.rewrite, layer, layers[-1])
    there = np.asarray(getattr(reading, site), np.float64)
    residual = (np.asarray(goal, np.float64) - there) * share(len(layers) - i)
    left = solve(layer, np.asarray(keys, np.float64).T)
    writes.append(write.factors(left, residual, inside.KEY, layer, goal.dtype))
    now = write.apply(now, writes[-1:])
  return writes


def keys_of(
  config: Config, backbone: Tree, rewrite: Rows, layer: int, last: int
) -> tuple[Array, inside.Reading]:
  """Keys f[N, ffn] of one layer, and the reading of the plain prompts.

  A key is the mean of the plain prompt's and of the mean over the prompts with a prefix (MEMIT, appendix; the
  repository's compute_ks); of the plain prompt's where there is no prefix.
  """
  found = read_all(config, backbone, rewrite, jnp.asarray(layer), jnp.asarray(last))
  key = found.key[:, 0]
  if found.key.shape[1] > 1:
    key = (key + found.key[:, 1:].mean(1)) / 2
  return key, jax.tree.map(lambda a: a[:, 0], found)


@partial(jax.jit, static_argnums=0)
def read_all(config: Config, backbone: Tree, rewrite: Rows, layer: Array, last: Array):
  """The reading [N, P, .] of all rows [N, P, ...], some requests at a time."""
  n, contexts = rewrite.head.shape[:2]
  width = max(1, 64 // contexts)

  def one(rows: Rows) -> inside.Reading:
    return inside.read(config, backbone, Rows(*(a[None] for a in rows)), layer, last)

  found = jax.lax.map(one, flat(rewrite), batch_size=width * contexts)
  return jax.tree.map(lambda a: a.reshape(n, contexts, a.shape[-1]), found)


def ascending(config: Config, layers: Sequence[int], moments: Moments) -> tuple[int, ...]:
  """The layers, checked.

  Raises:
    UserError: none, not ascending, not of this model, or without moments of the right size.
  """
  if inside.checked(config, layers) != tuple(layers):
    raise UserError(f'layers to edit must be ascending, not {tuple(layers)}')
  for layer in layers:
    if layer not in moments:
      raise UserError(f'there is no E[kk^T] of layer {layer}; there is of {sorted(moments)}')
    if moments[layer].shape != (config.ffn, config.ffn):
      raise UserError(
        f'E[kk^T] of layer {layer} is {moments[layer].shape}, keys of this model have {config.ffn} units'
      )
  return tuple(layers)
