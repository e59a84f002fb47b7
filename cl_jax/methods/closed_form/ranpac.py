"""Random projections and a ridge classifier."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.linalg import ridge
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.projection import structured
from cl_jax.types import Array, Method

LAMBDAS = tuple(10.0**e for e in range(-8, 9))
FEATURES = ('gaussian', 'structured')


class RanPACState(NamedTuple):
  projection: Array  # f32[D, M], of structured features its seed u32[]
  gram: Array  # f32[M, M]
  moment: Array  # f32[M, C]
  head: Array  # f32[M, C]
  lam: Array  # f32[]


def ranpac(
  classes: int,
  width: int = 2000,
  lam: float | None = None,
  when: str = 'step',
  features: str = 'gaussian',
) -> Method:
  """Ridge regression onto one-hot labels in a random nonlinear feature space.

  McDonnell et al., NeurIPS 2023, eq. 4-6; official code RanPAC/RanPAC. h = relu(f W) with W ~ N(0, 1) fixed,
  G += h^T h, C += h^T y, and at a boundary head = (G + lam I)^-1 C. Any order of the examples gives the same
  result. First-session adaptation of the backbone is a chain:
  `chain(lora=..., first_session=first_session(), ranpac=ranpac(classes, when='boundary'))`.

  Args:
    classes: size of the output layer.
    width: M; the paper has 10,000.
    lam: ridge parameter; None chooses it at each boundary from 10^-8 ... 10^8 by the squared error on
      20 % of the finished task's examples after fitting the other 80 % (as the official code). It grows by
      tens where the sum over all tasks cannot be factorised with it.
    when: 'step' learns from every batch. 'boundary' learns from the examples of the finished task, each
      once whatever the number of epochs, with the features of the network as it is then.
    features: 'gaussian' keeps W. 'structured' keeps a seed of 4 bytes in its place and makes W of it in every
      step, by Hadamard transforms and signs, for devices: see `projection.structured`. Deviation: then
      the columns of W are orthogonal within blocks, and of the same length, where D is a power of 2.

  Needs the boundary. State: 4 (D M + M^2 + 2 M C + 1) bytes, 1 in the place of D M if structured. Freeze the
  model.
  """
  if when not in ('step', 'boundary'):
    raise UserError(f'ranpac when={when!r}: choose step or boundary')
  if features not in FEATURES:
    raise UserError(f'ranpac features={features!r}: choose {" or ".join(FEATURES)}')

  def expanded(s, f):
    if features == 'structured':
      return jax.nn.relu(structured(f, s.projection, width))
    return jax.nn.relu(f @ s.projection)

  def init(key, params, batch, fwd):
    d = jax.eval_shape(fwd, params, batch).features.shape[-1]
    moment = jnp.zeros((width, classes))
    start = jnp.float32(1.0 if lam is None else lam)
    if features == 'structured':
      projection = jax.random.bits(key, (), jnp.uint32)
    else:
      projection = jax.random.normal(key, (d, width))
    return {}, RanPACState(projection, jnp.zeros((width, width)), moment, moment, start)

  def wrap(s, apply):
    def projected(variables, batch, tap, train):
      out = apply(variables, batch, tap, train)
      if train:
        return out
      seen = jnp.any(s.head != 0, axis=0)
      score = jnp.where(seen, expanded(s, out.features) @ s.head, MINUS_INF)
      return out._replace(logits=score)

    return projected

  def moments(s, f, y, w):
    h = expanded(s, f) * (w > 0)[:, None]
    return h.T @ h, h.T @ jax.nn.one_hot(y, classes)

  def add(s, f, y, w):
    gram, moment = moments(s, f, y, w)
    return s._replace(gram=s.gram + gram, moment=s.moment + moment)

  def after(s, params, step, key):
    return params, add(s, step.out.features, step.batch.y, step.batch.w)

  def choose(s, f, batches):
    """The lambda with the least validation error within the finished task."""
    f, y, w = f.reshape(-1, f.shape[-1]), batches.y.reshape(-1), batches.w.reshape(-1)
    rank = jnp.cumsum(w > 0) - 1
    fit = (w > 0) & (rank < jnp.floor(0.8 * (w > 0).sum()))
    held = (w > 0) & ~fit
    gram, moment = moments(s, f, y, fit)
    h, target = expanded(s, f), jax.nn.one_hot(y, classes)

    def error(lam):
      wrong = jnp.sum(jnp.square(h @ ridge(gram, moment, lam) - target), axis=-1)
      total = jnp.sum(wrong * held)
      return jnp.where(jnp.isfinite(total), total, jnp.inf)  # the smallest lambdas may not factor

    lams = jnp.array(LAMBDAS)
    return lams[jnp.argmin(jax.lax.map(error, lams))]

  def solve(s, best):
    """With the least 10^k best, k = 0, 1, ... (after 0: 10^k 1e-8), for which the sum over all tasks can be
    factorised in f32.

    What is least for the examples of one task, a small part of a large sum, can be too little for all.
    """

    at = lambda lam: (ridge(s.gram, s.moment, lam), lam)  # noqa: E731
    failed = lambda found: ~jnp.isfinite(found[0]).all() & (found[1] < 1e10)  # noqa: E731
    head, lam = jax.lax.while_loop(
      failed, lambda found: at(jnp.maximum(10 * found[1], 1e-8)), at(best)
    )
    return s._replace(head=head, lam=lam)

  def boundary(s, params, batches, fwd, key):
    if when == 'step' and lam is not None:
      return params, solve(s, s.lam)
    f = jax.lax.map(lambda b: fwd(params, b).features, batches)
    if when == 'boundary':
      s = jax.lax.scan(lambda s, b: (add(s, *b), None), s, (f, batches.y, batches.w))[0]
    return params, solve(s, s.lam if lam is not None else choose(s, f, batches))

  if when == 'step':
    return Method(init=init, wrap=wrap, after=after, boundary=boundary, needs=('boundary',))
  return Method(init=init, wrap=wrap, boundary=boundary, needs=('boundary',))
