"""ROME (Meng et al., NeurIPS 2022): one fact as a rank-one update of one layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cl_jax.editing import inside, write
from cl_jax.editing.memit import Moments, ascending, read_all
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Requests, take
from cl_jax.editing.target import Recipe, optimise
from cl_jax.editing.write import Editor, Write
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree


class _Carry(NamedTuple):
  """The matrix f[ffn, d] as the requests so far leave it; their factors f[N, ffn, 1], f[N, 1, d]; reports."""

  matrix: Array
  left: Array
  right: Array
  loss: Array
  log_p: Array


def rome(
  config: Config,
  moments: Moments,
  layer: int,
  recipe: Recipe = Recipe(steps=20, clamp=4.0),  # noqa: B008 (a NamedTuple)
  rounds: Rounds = straight,
) -> Editor:
  """One request after the other, each from the model that the one before has left (eq. 2 and 4;
  github.com/kmeng01/rome):

    W += u (v* - k W - b) / (k . u),  u = C^-1 k

  with k the mean key over all contexts and v* the output of the MLP that says the new fact.

  Args:
    moments: {layer: E[k k^T]}.
    layer: to write to; published 17 for GPT2-XL, 5 for GPT-J.
    recipe: of the target.
    rounds: runs the loop over requests.

  State: none. Deviation: the same k stands in both places. The repository divides by the key of the plain
  prompt, which makes models collapse after some edits (Gupta et al., EMNLP Findings 2024, "Rebuilding ROME").
  """
  (layer,) = ascending(config, (layer,), moments)

  def edit(backbone: Tree, state: Any, requests: Requests, key: Array):
    del key
    n, matrix = len(requests.rewrite.head), backbone['layers']['down']['w'][layer]

    def step(i: int, carry: _Carry) -> _Carry:
      one = take(requests, [i])
      now = write.put(backbone, inside.KEY, layer, carry.matrix)
      target = optimise(config, now, one, layer, ('feedforward',), recipe, 1)
      found = read_all(config, now, one.rewrite, layer, layer)
      left, right = update(
        moments[layer],
        np.asarray(found.key[0], np.float64).mean(0),
        np.asarray(found.value[0], np.float64).mean(0),
        np.asarray(target.at('feedforward')[0], np.float64),
      )
      new = write.factors(left[:, None], right[None], inside.KEY, layer, matrix.dtype)
      return _Carry(
        carry.matrix + new.term,
        carry.left.at[i].set(new.left),
        carry.right.at[i].set(new.right),
        carry.loss.at[i].set(target.loss[0]),
        carry.log_p.at[i].set(target.log_p[0]),
      )

    zeros = lambda *shape: jnp.zeros((n, *shape), matrix.dtype)  # noqa: E731
    first = _Carry(matrix, zeros(config.ffn, 1), zeros(1, config.d), zeros(), zeros())
    done = rounds('edits', n, first, step)
    writes = [Write(inside.KEY, layer, *both) for both in zip(done.left, done.right, strict=True)]
    return writes, state, {'loss': done.loss, 'log_p': done.log_p}

  return Editor(lambda backbone: (), edit)


def update(
  moment: np.ndarray, key: np.ndarray, value: np.ndarray, goal: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(u, (goal - value) / (key . u)), float64: the two factors of the term; `value` is key W + b."""
  u = np.linalg.solve(moment, key)
  return u, (goal - value) / (key @ u)
