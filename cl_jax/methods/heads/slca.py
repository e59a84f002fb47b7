"""The output layer is aligned with Gaussians of all classes seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax.errors import UserError
from cl_jax.linalg import Moments, cross_entropy, gather, no_moments, weighted_mean
from cl_jax.methods.heads.task_head import MINUS_INF
from cl_jax.models.layers import dense
from cl_jax.types import Array, Method


def slca(
  epochs: int = 5,
  samples: int = 256,
  lr: float = 0.01,
  momentum: float = 0.9,
  logit_norm: float = 0.1,
  jitter: float = 1e-4,
  chunks: int | None = None,
) -> Method:
  """Trains the head, at a boundary, on features drawn from a Gaussian per class seen so far.

  Zhang et al., ICCV 2023, eq. 1-4; official code GengDavid/SLCA. Slow learning is the optimiser's: give the
  backbone 1/100 of the head's rate (`optimizer.groups`), and let the task's classes compete alone in training
  (`current_head`). Here is the classifier alignment: mean and unbiased covariance of the features of the
  finished task's classes are kept; then, in each epoch, `samples` features of every class seen are drawn and
  shuffled, and the head takes a step on every `samples` of them (as many steps as classes seen), by SGD with
  momentum and a cosine over all steps, on the cross-entropy of z / (|z|_2 * logit_norm), z the logits of the
  classes seen.

  Deviations from the official code: one norm over all classes seen (there: the mean of the tasks' norms); no
  weight decay; the rate falls every step (there: every epoch); old means are not shrunk towards 0; the first
  boundary aligns too; the next task goes on from the aligned head (there: from the one before alignment).
  A class that comes back adds to its moments.

  Args:
    epochs, samples: see above.
    lr, momentum: of the alignment.
    logit_norm: temperature of the normalised logits.
    jitter: added to the covariance's diagonal before features are drawn.
    chunks: steps an epoch, each on `samples` / `chunks` features of every class seen; None: as said above.

  Needs the boundary. State: 4 C (D^2 + D + 1) bytes.
  """

  if chunks is not None and (chunks < 1 or samples % chunks):
    raise UserError(
      f'slca samples={samples} is not a multiple of chunks={chunks}: change one of them'
    )

  def init(key, params, batch, fwd):
    if set(params.get('head', {})) != {'w', 'b'}:
      raise UserError('slca needs a trained output layer "head" of a weight w and a bias b')
    d, classes = params['head']['w'].shape
    return {}, no_moments(classes, d)

  def loss(head, f, y, w, seen):
    z = jnp.where(seen, dense(head, f), 0)
    z = z / (jnp.sqrt(jnp.sum(z**2, -1, keepdims=True) + 1e-14) * logit_norm)
    return weighted_mean(cross_entropy(jnp.where(seen, z, MINUS_INF), y), w)

  def align(head, m, key):
    seen, rows = m.count > 0, jnp.repeat(jnp.arange(m.count.size), samples)
    steps = seen.sum() if chunks is None else chunks
    size = samples if chunks is None else len(rows) // chunks
    root = roots(m, jitter)

    def epoch(carry, inputs):
      i, key = inputs
      k_draw, k_order = jax.random.split(key)
      f = sample(k_draw, m.mean, root, samples).reshape(-1, m.mean.shape[-1])
      if chunks is None:
        # A random order of the rows of classes seen; the others come last, and no step reaches them.
        order = jnp.argsort(jax.random.uniform(k_order, rows.shape) + ~seen[rows])
      else:
        order = jnp.arange(len(rows)).reshape(-1, chunks, samples // chunks).swapaxes(0, 1).ravel()

      def step(j, carry):
        head, speed = carry
        own = jax.lax.dynamic_slice_in_dim(order, j * size, size)
        g = jax.grad(loss)(head, f[own], rows[own], seen[rows[own]].astype(f.dtype), seen)
        speed = jax.tree.map(lambda v, g: momentum * v + g, speed, g)
        rate = lr * 0.5 * (1 + jnp.cos(jnp.pi * (i * steps + j) / (epochs * steps)))
        return jax.tree.map(lambda p, v: p - (rate * v).astype(p.dtype), head, speed), speed

      return jax.lax.fori_loop(0, steps, step, carry), None

    start = (head, jax.tree.map(jnp.zeros_like, head))
    keys = jax.random.split(key, epochs)
    return jax.lax.scan(epoch, start, (jnp.arange(epochs), keys))[0][0]

  def boundary(s, params, batches, fwd, key):
    f = jax.lax.map(lambda b: fwd(params, b).features, batches)
    m = gather(s, f.reshape(-1, f.shape[-1]), batches.y.reshape(-1), batches.w.reshape(-1))
    return {**params, 'head': align(params['head'], m, key)}, m

  return Method(init=init, boundary=boundary, needs=('boundary',))


def roots(m: Moments, jitter: float | Array) -> Array:
  """R_c f[C, D, D] with R_c R_c^T the unbiased covariance plus jitter * I; 0 for classes without examples."""

  def one(args):
    count, scatter = args
    cov = scatter / jnp.maximum(count - 1, 1) + jitter * jnp.eye(len(scatter), dtype=scatter.dtype)
    factor = jnp.linalg.cholesky(cov)

    def spectral():  # few examples in many dimensions: rounding can outweigh the jitter
      values, vectors = jnp.linalg.eigh(cov)
      return vectors * jnp.sqrt(jnp.maximum(values, 0))

    return jax.lax.cond(jnp.isfinite(factor).all(), lambda: factor, spectral)

  blank = lambda a: jnp.zeros_like(a[1])  # noqa: E731
  return jax.lax.map(lambda a: jax.lax.cond(a[0] > 0, one, blank, a), (m.count, m.scatter))


def sample(key: Array, mean: Array, root: Array, n: int) -> Array:
  """f[C, n, D]: n features of every class."""
  noise = jax.random.normal(key, (len(mean), n, mean.shape[-1]), mean.dtype)
  return mean[:, None] + noise @ root.mT
