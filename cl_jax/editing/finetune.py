"""Fine-tuning as an editor: FT, FT-L, and the descent that LoRA shares with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cl_jax.editing import inside
from cl_jax.editing.rows import Requests, Rows, plain
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
      config, layers, batch, backbone, rows, terms, 1.0, steps, rate, bound, stop
    )
    writes = [Write(inside.KEY, layer, found[inside.KEY][0][j]) for j, layer in enumerate(layers)]
    return writes, state, {'loss': -log_p, 'log_p': log_p}

  return Editor(lambda backbone: (), edit)


@partial(jax.jit, static_argnums=(0, 1, 2))
def descend(
  config: Config,
  layers: tuple[int, ...],
  batch: int,
  p: Tree,
  rows: Rows,
  terms: Terms,
  scale: Array | float,
  steps: Array | int,
  rate: Array | float,
  norm: Array | float,
  stop: Array | float,
) -> tuple[Terms, Array]:
  """(the terms after Adam, log p f[N] of the targets with them), for rows [N, ...]; args as `finetune`.

  Args:
    scale: of products left @ right; a term that is no product is taken as it is.
    norm: every entry of the terms is kept in [-norm, norm].
  """
  n = len(rows.head)
  width = min(batch or n, n)
  groups = -(-n // width)
  # The last group is filled up with rows that count nothing.
  index = jnp.arange(groups * width).reshape(groups, width)
  valid = index < n
  index = jnp.minimum(index, n - 1)
  tx = optax.scale_by_adam()

  def said(terms: Terms, some: Rows) -> Array:
    h, place = inside.begin(config, p, some)
    h = inside.between(config, p, h, place, 0, layers[0])
    change = partial(added, layers, scale, terms)
    log_p = inside.finish(config, p, h, place, some, layers[0], change=change)
    return inside.mean_log_p(log_p, some.target)

  def loss(terms: Terms, some: Rows, counts: Array) -> Array:
    return -jnp.where(counts, said(terms, some), 0).sum() / counts.sum()

  def pick(rows: Rows, index: Array) -> Rows:
    return Rows(*(a[index] for a in rows))

  def one(carry, inputs):
    terms, opt = carry
    index, counts = inputs
    lost, g = jax.value_and_grad(loss)(terms, pick(rows, index), counts)
    update, new_opt = tx.update(g, opt)
    new = jax.tree.map(lambda a, u: jnp.clip(a - rate * u, -norm, norm), terms, update)
    go = lost >= stop
    keep = lambda old, new: jax.tree.map(partial(jnp.where, go), new, old)  # noqa: E731
    return (keep(terms, new), keep(opt, new_opt)), lost * counts.sum()

  def step(carry):
    i, terms, opt, _ = carry
    (terms, opt), lost = jax.lax.scan(one, (terms, opt), (index, valid))
    return i + 1, terms, opt, lost.sum() / n

  start = (0, terms, tx.init(terms), jnp.asarray(jnp.inf, p['norm']['scale'].dtype))
  found = jax.lax.while_loop(lambda c: (c[0] < steps) & (c[-1] >= stop), step, start)[1]
  log_p = jax.lax.map(lambda index: said(found, pick(rows, index)), index)
  return found, log_p.reshape(-1)[:n]


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
