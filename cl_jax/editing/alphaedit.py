"""AlphaEdit (Fang et al., ICLR 2025): MEMIT's updates, projected onto what the layer has no keys in."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from cl_jax.editing import write
from cl_jax.editing.memit import Moments, ascending, keys_of, spread
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Requests
from cl_jax.editing.target import Recipe, optimise
from cl_jax.editing.write import Editor
from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree


def alphaedit(
  config: Config,
  moments: Moments,
  layers: Sequence[int],
  threshold: float = 2e-2,
  coef: float = 10.0,
  recipe: Recipe = Recipe(),  # noqa: B008 (a NamedTuple)
  width: int = 16,
  rounds: Rounds = straight,
) -> Editor:
  """Like `memit`, but (eq. 11; github.com/jianghoucheng/AlphaEdit)

    W_l += (P_l (K K^T + K_p K_p^T) + coef I)^-1 P_l K R^T

  where P_l projects onto the eigenvectors of E[k k^T] whose eigenvalue is below `threshold`, and K_p holds
  the keys of all earlier requests.

  Args:
    threshold: in units of E[k k^T], whose scale differs between models; published 2e-2.
    coef: ridge; published 10.

  State: sum of K_p K_p^T, 4 ffn^2 bytes a layer, however many edits; and the projections, as many again. Keys
  of a batch are added when all layers are written, read from that model.

  Raises:
    UserError: a threshold that leaves a layer no direction, or all of them.
  """
  layers = ascending(config, layers, moments)
  projections = {layer: null_space(moments[layer], threshold) for layer in layers}
  for layer, p in projections.items():
    rank = round(np.trace(p))
    if rank in (0, len(p)):
      nothing = 'nothing is' if rank == 0 else 'everything is'
      raise UserError(
        f'threshold={threshold:g}: {nothing} below it among the eigenvalues of E[kk^T] of layer {layer}, '
        f'{np.linalg.eigvalsh(moments[layer])[[0, -1]].round(6).tolist()}: edits would not be projected'
      )

  def init(backbone: Tree) -> Tree:
    past = np.zeros((len(layers), config.ffn, config.ffn), np.float32)
    kept = np.stack([projections[layer] for layer in layers]).astype(np.float32)
    return {'past': jnp.asarray(past), 'projection': jnp.asarray(kept)}

  def edit(backbone: Tree, state: Tree, requests: Requests, key: Array):
    del key
    target = optimise(config, backbone, requests, layers[-1], ('block',), recipe, width, rounds)
    past = np.array(state['past'], np.float64)

    def solve(layer: int, keys: np.ndarray) -> np.ndarray:
      known = past[layers.index(layer)] + keys @ keys.T
      p = projections[layer]
      return np.linalg.solve(p @ known + coef * np.eye(len(p)), p @ keys)

    writes = spread(config, backbone, requests, target.at('block'), layers, solve)
    edited = write.apply(backbone, writes)
    for i, layer in enumerate(layers):
      keys = np.asarray(keys_of(config, edited, requests.rewrite, layer, layers[-1])[0], np.float64)
      past[i] += keys.T @ keys
    state = state | {'past': jnp.asarray(past, state['past'].dtype)}
    return writes, state, {'loss': target.loss, 'log_p': target.log_p}

  return Editor(init, edit)


def null_space(moment: np.ndarray, threshold: float) -> np.ndarray:
  """The projector f64[ffn, ffn] onto the eigenvectors of E[k k^T] with an eigenvalue below `threshold`."""
  values, vectors = np.linalg.eigh(moment)
  basis = vectors[:, values < threshold]
  return basis @ basis.T
