"""PMET (Li et al., AAAI 2024): targets of attention and MLP together, of which the MLP's is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cl_jax.editing.memit import Moments, ascending, solver, spread
from cl_jax.editing.rounds import Rounds, straight
from cl_jax.editing.rows import Requests
from cl_jax.editing.target import Recipe, optimise
from cl_jax.editing.write import Editor
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree


def pmet(
  config: Config,
  moments: Moments,
  layers: Sequence[int],
  coef: float = 6000.0,
  recipe: Recipe = Recipe(steps=30, rate=0.2, kl=1.0, eased=0.1),  # noqa: B008 (a NamedTuple)
  width: int = 16,
  joint: bool = True,
  rounds: Rounds = straight,
) -> Editor:
  """MEMIT's layer loop towards what the MLP of the last layer should add, with the residual shared out by
  square roots, R / sqrt(L - l + 1) (eq. 11 to 14; github.com/xpq-tech/PMET).

  What attention does with a fact is general and stays as it is: its delta helps to find the MLP's and is then
  forgotten.

  Args, state: as `memit`; coef published 6000 (GPT-J).
    recipe: published for GPT-J. What ends the search early is in the repository alone, see `Recipe`.
    joint: whether attention has a delta; without it the MLP has to say the fact by itself (the paper's
      ablation). The report is of the deltas together.
  """
  layers = ascending(config, layers, moments)

  solve = solver(moments, coef)

  def edit(backbone: Tree, state: Any, requests: Requests, key: Array):
    del key
    sites = ('attention', 'feedforward') if joint else ('feedforward',)
    target = optimise(config, backbone, requests, layers[-1], sites, recipe, width, rounds)
    goal = target.at('feedforward')
    share = lambda rest: rest**-0.5  # noqa: E731
    writes = spread(config, backbone, requests, goal, layers, solve, share, 'feedforward')
    return writes, state, {'loss': target.loss, 'log_p': target.log_p}

  return Editor(lambda backbone: (), edit)
