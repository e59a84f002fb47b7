"""Learning without forgetting."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.linalg import cross_entropy, weighted_mean
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.types import Array, Method, Tree, overlay

OUTPUTS = ('all', 'seen', 'heads')


class LwFState(NamedTuple):
  teacher: Tree  # parameters (and norm statistics) at the last boundary
  seen: Array  # bool[C], classes trained on before that boundary
  now: Array  # bool[C], including the current task's
  tasks: Array  # i32[], finished tasks


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
      paper's form); a `task_head` must come AFTER this method in the chain.
    task_classes: the labels of each task, for 'heads'.
    average: weigh the task loss by 1/t and the distillation by 1 - 1/t in the t-th task instead (van de Ven
      & Tolias 2019, eq. 4; `coef` scales the distillation).
    mean: average the cross-entropy over the outputs that compete, and the heads, instead of summing. This is
      weaker by their number; the published table of van de Ven & Tolias 2019 was made with it (their
      repository up to 26f00db of May 2019).

  Needs the boundary. State: 1 x parameters and norm statistics, 2 bytes per class, 4 bytes. One more forward
  pass per step.
  """
  if outputs not in OUTPUTS:
    raise ValueError(f'lwf outputs {outputs!r}: one of {OUTPUTS}')
  if outputs == 'heads' and not task_classes:
    raise ValueError('lwf outputs "heads" needs task_classes, the labels of each task')

  def init(key, params, batch, fwd):
    classes = jax.eval_shape(fwd, params, batch).logits.shape[-1]
    none = jnp.zeros(classes, bool)
    return {}, LwFState(overlay(fwd.stats, params), none, none, jnp.int32(0))

  def wrap(s, apply):
    def keep_raw(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      return out._replace(aux={**out.aux, 'lwf': out.logits})

    return keep_raw if outputs == 'heads' else apply

  def distil(target, logits):
    """f32[B]: T^2 times the cross-entropy at temperature T."""
    p = jax.nn.softmax(target / temperature)
    logp = jax.nn.log_softmax(logits / temperature)
    ce = -(temperature**2) * jnp.sum(p * jnp.maximum(logp, MINUS_INF), axis=-1)
    return ce / jnp.sum(logits > MINUS_INF / 2, axis=-1) if mean else ce

  def loss(s, params, batch, out, fwd):
    old = jax.lax.stop_gradient(fwd(s.teacher, batch))
    if outputs == 'heads':
      per_head = [
        (s.tasks > t) * distil(old.aux['lwf'][:, list(c)], out.aux['lwf'][:, list(c)])
        for t, c in enumerate(task_classes)
      ]
      kd = sum(per_head, jnp.zeros(()))
      kd = kd / jnp.maximum(s.tasks, 1) if mean else kd
    elif outputs == 'seen':
      kd = distil(jnp.where(s.seen, old.logits, MINUS_INF), out.logits)
    else:
      kd = distil(old.logits, out.logits)
    kd = coef * (s.tasks > 0) * weighted_mean(kd, batch.w)
    if not average:
      return kd
    done = s.tasks.astype(out.logits.dtype)
    rest = done / (done + 1)  # 1 - 1/t
    task = weighted_mean(cross_entropy(out.logits, batch.y), batch.w)
    return rest * (kd - task)

  def after(s, params, step, key):
    return params, s._replace(now=s.now.at[step.batch.y].max(step.batch.w > 0))

  def boundary(s, params, batches, fwd, key):
    return params, LwFState(overlay(fwd.stats, params), s.now, s.now, s.tasks + 1)

  return Method(
    init=init, wrap=wrap, loss=loss, after=after, boundary=boundary, needs=('boundary',)
  )
