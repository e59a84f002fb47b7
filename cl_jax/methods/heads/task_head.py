"""A head per task: only the outputs of the task at hand compete (multi-head, task-incremental)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from cl_jax.types import Method

MINUS_INF = -1e30  # finite, so that 0 * MINUS_INF is 0 and not NaN


def task_head(task_classes: tuple[tuple[int, ...], ...], classes: int) -> Method:
  """Masks the logits of all classes that are not of the example's task.

  Rows whose task is not told (-1) keep all logits. Source: the multi-headed output layer of van de Ven &
  Tolias 2019, section 3 ("Task-IL").

  Args:
    task_classes: the labels of each task.
    classes: size of the output layer.

  Needs the task in training and at test. State: none.
  """
  allowed = np.zeros((len(task_classes), classes), bool)
  for t, labels in enumerate(task_classes):
    allowed[t, list(labels)] = True

  def wrap(s, apply):
    def headed(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      keep = jnp.asarray(allowed)[batch.task] | (batch.task < 0)[:, None]
      return out._replace(logits=jnp.where(keep, out.logits, MINUS_INF))

    return headed

  return Method(wrap=wrap, needs=('task_train', 'task_test'))
