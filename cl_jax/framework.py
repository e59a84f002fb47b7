"""The continual hyperparameter framework of De Lange et al. (TPAMI 2022, section 4, algorithm 1).

Hyperparameters are chosen while the tasks arrive, from validation data of the current task alone:

1. maximal plasticity search: the new task is learnt from the current solution by plain fine-tuning at every
   learning rate of a grid; the best is kept, with its validation accuracy A*
2. stability decay: the task is learnt by the method at that rate; while its validation accuracy is below
   (1 - drop) A*, the method's stability hyperparameters are decayed and it is learnt again

What is decayed carries over to the next task. This module holds the decisions; `experiments.framework` runs
them over any learner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Search(NamedTuple):
  """How hyperparameters are searched; the defaults are the survey's.

  Attributes:
    rates: learning rates of the plasticity search.
    first_rates: further ones for the first task.
    drop: p, the share of A* that the method may give up.
    decay: alpha, the factor on a stability hyperparameter.
    attempts: trainings by the method at most; the last one is kept.
    together: names of stability hyperparameters that are decayed as one.
  """

  rates: Sequence[float] = (1e-2, 5e-3, 1e-3, 5e-4, 1e-4)
  first_rates: Sequence[float] = (1e-1, 5e-2)
  drop: float = 0.2
  decay: float = 0.5
  attempts: int = 10
  together: Sequence[Sequence[str]] = ()

  def rates_of(self, task: int) -> tuple[float, ...]:
    return (*(self.first_rates if task == 0 else ()), *self.rates)


class Patience(NamedTuple):
  """When training ends: the survey's rule.

  Attributes:
    lower: epochs without a better validation accuracy after which the learning rate falls.
    stop: epochs without one after which training ends.
    factor: on the learning rate.
  """

  lower: int = 5
  stop: int = 10
  factor: float = 0.1


def until_no_better(
  train: Callable, measure: Callable, model: Any, epochs: int, patience: Patience
) -> tuple[Any, jax.Array]:
  """Trains epoch by epoch while that pays, in one traceable loop.

  Args:
    train: (model, epoch i32[], scale of the learning rate f32[]) -> model.
    measure: model -> validation accuracy f32[]; NaN is never better.
    model: what is trained, any tree.
    epochs: at most.
    patience: see `Patience`.

  Returns:
    (the model after its best epoch, the first of equals, or as it came where no epoch has an accuracy; i32[],
    epochs that were trained).
  """

  def more(carry):
    _, _, _, waited, _, epoch = carry
    return (epoch < epochs) & (waited <= patience.stop)

  def one(carry):
    model, best, top, waited, scale, epoch = carry
    scale = jnp.where(waited == patience.lower, scale * patience.factor, scale)
    model = train(model, epoch, scale)
    accuracy = measure(model)
    better = accuracy > top
    best = jax.tree.map(lambda a, b: jnp.where(better, a, b), model, best)
    top = jnp.where(better, accuracy, top)
    return model, best, top, jnp.where(better, 0, waited + 1), scale, epoch + 1

  start = (model, model, jnp.float32(-1), jnp.int32(0), jnp.float32(1), jnp.int32(0))
  _, best, _, _, _, epoch = jax.lax.while_loop(more, one, start)
  return best, epoch


class Choice(NamedTuple):
  """What was chosen for a task.

  Attributes:
    rate: the learning rate.
    reference: A*, validation accuracy of fine-tuning at that rate.
    stability: the hyperparameters of the model that is kept.
    base: what the next task starts from.
    accuracy: validation accuracy of the model that is kept.
    attempts: trainings by the method.
    met: whether the accuracy reached (1 - drop) A*; NaN never does.
  """

  rate: float
  reference: float
  stability: dict[str, float]
  base: dict[str, float]
  accuracy: float
  attempts: int
  met: bool


def best_rate(rates: Sequence[float], accuracies: Sequence[float]) -> tuple[float, float]:
  """(the rate of the highest accuracy, that accuracy); the first of equals, NaN is the lowest."""
  scores = np.nan_to_num(np.asarray(accuracies, np.float64), nan=-np.inf)
  at = int(scores.argmax())
  return float(rates[at]), float(max(scores[at], 0.0))


def candidates(
  start: Mapping[str, float], decay: float, together: Sequence[Sequence[str]] = ()
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
  """(hyperparameters to try, those that the next task starts from if they are kept), without end.

  One hyperparameter is decayed again and again. Of several, each is decayed alone with the others as
  they were; when all of these have failed, all are decayed, and it goes on from there. Those named `together`
  count as one.
  """
  base = dict(start)
  groups = [[n for n in names if n in base] for names in together]
  groups += [[n] for n in base if not any(n in names for names in together)]
  groups = [names for names in groups if names]
  yield dict(base), dict(base)
  while base:
    if len(groups) > 1:
      for names in groups:
        one = {**base, **{name: base[name] * decay for name in names}}
        yield one, one
    base = {name: value * decay for name, value in base.items()}
    yield dict(base), dict(base)


def decayed(
  trial: Callable[[dict[str, float]], tuple[float, Any]],
  start: Mapping[str, float],
  rate: float,
  reference: float,
  search: Search,
) -> tuple[Choice, Any]:
  """Tries hyperparameters until one keeps enough of the plasticity.

  Args:
    trial: hyperparameters -> (validation accuracy, whatever the model is).
    start: the stability hyperparameters to begin with; {} for a method without any, which is tried once.
    rate, reference: what the plasticity search chose.

  Returns:
    The choice, and what `trial` returned for it.
  """
  goal, count = (1 - search.drop) * reference, 0
  for stability, base in candidates(start, search.decay, search.together):
    accuracy, model = trial(stability)
    count += 1
    met = bool(accuracy >= goal)  # False for NaN
    if met or count == search.attempts or not start:
      return Choice(rate, reference, stability, base, float(accuracy), count, met), model
  raise AssertionError('candidates never end')
