"""Learning without forgetting."""

from __future__ import annotations

import jax

from cl_jax import distillation
from cl_jax.linalg import cross_entropy, weighted_mean
from cl_jax.types import Method


def lwf(
  coef: float = 1.0,
  temperature: float = 2.0,
  outputs: str = 'all',
  task_classes: tuple[tuple[int, ...], ...] = (),
  average: bool = False,
  mean: bool = False,
) -> Method:
  """Distils the model of the last boundary into the new one, on the new task's data.

  L = L_task + coef * T^2 * mean_x CE(softmax(z_old(x) / T), softmax(z(x) / T))

  Li & Hoiem, ECCV 2016 / TPAMI 2018, eq. 2-3, with T^2 (Hinton et al. 2015) so that the gradient's size
  does not depend on T; the cross-entropy is summed over classes, averaged over examples. Deviations: the
  targets come from the snapshot on the fly instead of being recorded once per task (the same values, no
  storage per example); no warm-up of the new head.

  Args:
    coef: lambda_o.
    temperature: T.
    outputs: which outputs are distilled. 'all': one softmax over all. 'seen': targets over the classes seen
      before the boundary, zero for the others, against all outputs that compete now (van de Ven &
      Tolias 2019, class-incremental). 'heads': the sum over finished tasks of one softmax per head (the
      paper's form); a `task_head` must come AFTER this method in the chain, and leaves out what 'all' and
      'seen' would distil. 'old': one softmax over the classes seen before the boundary, of both networks,
      whatever a head behind this method masks: with `current_head`, whose loss is over the new task's
      classes, the usual form of class-incremental libraries (PyCIL, models/lwf.py, where it counts thrice).
    task_classes: the labels of each task, for 'heads'.
    average: weigh the task loss by 1/t and the distillation by 1 - 1/t in the t-th task instead (van de Ven
      & Tolias 2019, eq. 4; `coef` scales the distillation).
    mean: average the cross-entropy over the outputs that compete, and the heads, instead of summing. This is
      weaker by their number; the published table of van de Ven & Tolias 2019 was made with it (their
      repository up to 26f00db of May 2019).

  Needs the boundary. State: 1 x parameters and norm statistics, 2 bytes per class, 4 bytes. One more forward
  pass per step.
  """
  distil = distillation.distiller('lwf', outputs, task_classes, temperature, mean)

  def init(key, params, batch, fwd):
    return {}, distillation.begin(params, batch, fwd)

  def loss(s, params, batch, out, fwd):
    old = jax.lax.stop_gradient(fwd(s.teacher, batch))
    kd = coef * (s.tasks > 0) * weighted_mean(distil.loss(s, old, out), batch.w)
    if not average:
      return kd
    done = s.tasks.astype(out.logits.dtype)
    rest = done / (done + 1)  # 1 - 1/t
    task = weighted_mean(cross_entropy(out.logits, batch.y), batch.w)
    return rest * (kd - task)

  def after(s, params, step, key):
    return params, distillation.meet(s, step.batch)

  def boundary(s, params, batches, fwd, key):
    return params, distillation.settle(s, params, fwd)

  return Method(
    init=init, wrap=distil.wrap, loss=loss, after=after, boundary=boundary, needs=('boundary',)
  )
