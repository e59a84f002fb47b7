"""Fine-tuning as an editor: FT, FT-L, and the descent that LoRA shares with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cl_jax.editing import inside
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Requests, Rows, cut, plain, take, trimmed
from cl_jax.editing.write import Editor, Write
from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

# {path: (term,) or (left, right)}, every array with the edited layers as its leading axis.
Terms = dict[str, tuple[Array, ...]]


def finetune(
  config: Config,
  layers: Sequence[int],
  steps: int = 25,
  rate: float = 5e-4,
  norm: float | None = None,
  batch: int = 0,
  stop: float = 1e-2,
  rounds: Rounds = straight,
) -> Editor:
  """Adam on the down-projections W_l of `layers`, over the plain prompts of all requests of a batch:

    min over W of mean -log p(target | prompt),   |W - W_0|_inf <= norm after every step

  FT without `norm`, FT-L with it (Zhu et al. 2020, "Modifying memories in transformer models", eq. 2; as the
  baseline of ROME and MEMIT, github.com/kmeng01/memit, baselines/ft). W_0 is the model as the batch finds it.

  Args:
    layers: to train; published 0 (GPT2-XL) and 21 (GPT-J).
    steps: passes over the batch.
    rate: of Adam; published 5e-4.
    norm: the bound, in units of the weights; published 5e-4 (GPT2-XL), 5e-5 (GPT-J).
    batch: requests of one step; 0 is all.
    stop: steps are left out below this loss, and training ends when a pass stays below it on average.
    rounds: runs the loop over passes.

  State: none. Terms are whole, 4 ffn d bytes a layer and batch. Report: 'loss' is -'log_p', after the last
  step.
  Deviations: each token of the target is predicted from those before it, where the repository asks the end of
  the prompt for all of them; the bound is on the term, which weights round when it is added.
  """
  layers = inside.checked(config, layers)
  if batch < 0 or steps < 1:
    raise UserError(f'batch must be 0 or more and steps 1 or more, not {batch} and {steps}')
  bound = math.inf if norm is None else norm

  def edit(backbone: Tree, state: Any, requests: Requests, key: Array):
    del key
    w = backbone['layers']['down']['w']
    terms: Terms = {inside.KEY: (jnp.zeros((len(layers), *w.shape[1:]), w.dtype),)}
    rows = plain(requests.rewrite)
    found, log_p = descend(
      config, layers, batch, backbone, rows, terms, 1.0, steps, rate, bound, stop, rounds
    )
    writes = [Write(inside.KEY, layer, found[inside.KEY][0][j]) for j, layer in enumerate(layers)]
    return writes, state, {'loss': -log_p, 'log_p': log_p}

  return Editor(lambda backbone: (), edit)


def descend(
  config: Config,
  layers: tuple[int, ...],
  batch: int,
  p: Tree,
  rows: Rows,
  terms: Terms,
  scale: float,
  steps: int,
  rate: float,
  norm: float,
  stop: float,
  rounds: Rounds,
) -> tuple[Terms, Array]:
  """(the terms after Adam, log p f[N] of the targets with them), for rows [N, ...]; args as `finetune`.

  Args:
    scale: of products left @ right; a term that is no product is taken as it is.
    norm: every entry of the terms is kept in [-norm, norm].
  """
  n = len(rows.head)
  # Each group has only the columns that its rows need.
  rows = cut(rows, 0)
  index = [np.arange(lo, min(lo + (batch or n), n)) for lo in range(0, n, batch or n)]
  groups = [trimmed(take(rows, some)) for some in index]

  def descent(_: int, carry):
    terms, opt, lost = carry
    if lost < stop:
      return carry
    lost = jnp.zeros_like(lost)
    for some in groups:
      terms, opt, one = _step(config, layers, p, some, terms, opt, scale, rate, norm, stop)
      lost += one * len(some.tail) / n
    return terms, opt, lost

  begin = (terms, optax.scale_by_adam().init(terms), jnp.asarray(jnp.inf, p['norm']['scale'].dtype))
  terms, _, _ = rounds('passes', steps, begin, descent)
  log_p = [_said(config, layers, p, some, terms, scale) for some in groups]
  return terms, jnp.concatenate(log_p)


@partial(jax.jit, static_argnums=(0, 1))
def _step(config, layers, p, rows: Rows, terms: Terms, opt, scale, rate, norm, stop):
  """(terms, state of Adam, loss before) of a step over rows [N, ...]; none below the loss `stop`."""
  loss = lambda terms: -_said(config, layers, p, rows, terms, scale).mean()  # noqa: E731
  lost, g = jax.value_and_grad(loss)(terms)
  update, new_opt = optax.scale_by_adam().update(g, opt)
  new = jax.tree.map(lambda a, u: jnp.clip(a - rate * u, -norm, norm), terms, update)
  keep = lambda old, new: jax.tree.map(partial(jnp.where, lost >= stop), new, old)  # noqa: E731
  return keep(terms, new), keep(opt, new_opt), lost


@partial(jax.jit, static_argnums=(0, 1))
def _said(config, layers, p, rows: Rows, terms: Terms, scale) -> Array:
  """log p f[N] of the targets of rows [N, ...] with the terms."""
  h, place = inside.begin(config, p, rows)
  h = inside.between(config, p, h, place, 0, layers[0])
  change = partial(added, layers, scale, terms)
  log_p = inside.finish(config, p, h, place, rows, layers[0], change=change)
  return inside.mean_log_p(log_p, rows.target)


def added(layers: tuple[int, ...], scale: Array | float, terms: Terms, own: Tree, i: Array) -> Tree:
  """The weights of layer i with its terms, if it is among `layers`."""
  here = jnp.asarray(layers) == i
  new = dict(own)
  for path, arrays in terms.items():
    name = path.split('/')[1]
    first, *rest = (jnp.einsum('k,k...->...', here.astype(a.dtype), a) for a in arrays)
    term = scale * (first @ rest[0]) if rest else first
    new[name] = own[name] | {'w': own[name]['w'] + term}
  return new
