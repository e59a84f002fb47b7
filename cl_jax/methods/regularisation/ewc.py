"""Elastic weight consolidation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax import fisher
from cl_jax.linalg import quadratic
from cl_jax.types import Array, Method, Tree


class EWCState(NamedTuple):
  anchor: Tree
  importance: Tree
  constant: Array  # f32[], completes the square


def ewc(
  coef: float = 1.0,
  labels: str = 'exact',
  online: bool = False,
  decay: float = 1.0,
  normalise: bool = False,
) -> Method:
  """A quadratic penalty around past solutions, weighted by the diagonal Fisher information.

  L = L_task + coef / 2 * sum_k sum_i F_k,i (theta_i - theta*_k,i)^2

  `online=False`: a penalty per past task (Kirkpatrick et al., PNAS 2017, eq. 3). The sum over tasks is
  kept EXACTLY in the space of one: sum_k F_k (t - t_k)^2 = A (t - m)^2 + const with A = sum F_k and
  m = sum F_k t_k / A, so the state does not grow.
  `online=True`: F <- decay * F + F_new and the latest solution as the only anchor (Schwarz et al., ICML
  2018, section 3.2; Huszar 2018).

  The Fisher is over PER-EXAMPLE gradients in inference mode on the finished task's training data; see
  `cl_jax.fisher.diagonal`. No official code exists; van de Ven's (continual-learning) is the usual reference.

  Args:
    coef: lambda; bound to the protocol, published values span 1 to 1e10.
    labels: 'exact', 'sampled', 'empirical' or 'predicted'; see `fisher.diagonal`.
    online: see above.
    decay: gamma of the online form.
    normalise: divide the online form's F by its largest entry in the penalty, so that coef does not depend
      on the scale of the gradients (Chaudhry et al., ECCV 2018; facebookresearch/agem does it).

  Needs the boundary. State: 2 x parameters + 4 bytes.
  """

  if normalise and not online:
    raise ValueError(
      'ewc normalise=True needs online=True: penalties of several tasks have one scale'
    )

  def init(key, params, batch, fwd):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {}, EWCState(params, zeros, jnp.float32(0))

  def loss(s, params, batch, out, fwd):
    penalty = 0.5 * coef * (quadratic(s.importance, params, s.anchor) + s.constant)
    if normalise:
      top = jnp.stack([f.max() for f in jax.tree.leaves(s.importance)]).max()
      return penalty / jnp.where(top > 0, top, 1)
    return penalty

  def boundary(s, params, batches, fwd, key):
    new = fisher.diagonal(fwd, params, batches, key, labels)
    if online:
      importance = jax.tree.map(lambda old, f: decay * old + f, s.importance, new)
      return params, EWCState(params, importance, jnp.float32(0))
    total = jax.tree.map(jnp.add, s.importance, new)
    share = jax.tree.map(lambda f, a: f / jnp.where(a > 0, a, 1), new, total)
    anchor = jax.tree.map(lambda m, p, w: m + w * (p - m), s.anchor, params, share)
    gap = jax.tree.map(
      lambda old, w, m, p: jnp.sum(old * w * jnp.square(p - m)),
      s.importance,
      share,
      s.anchor,
      params,
    )
    return params, EWCState(anchor, total, s.constant + sum(jax.tree.leaves(gap)))

  return Method(init=init, loss=loss, boundary=boundary, needs=('boundary',))
