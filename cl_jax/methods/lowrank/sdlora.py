"""Low-rank adaptation with magnitudes apart from directions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cl_jax.lowrank import bounds, drawn, here, keep, operator, put, select, train_only
from cl_jax.prompts import Tasks, first_task, step_taken
from cl_jax.types import Array, Method


def sdlora(
  tasks: int,
  rank: int = 8,
  magnitude: float = 0.8,
  targets: str = '.*/(q|v)/w',
) -> Method:
  """Adds a low-rank direction per task; earlier directions stay, the magnitudes of all go on learning.

  W_t = W + sum_{i<=t} m_i A_i B_i / (|A_i|_F |B_i|_F + 1e-8)

  Wu et al., ICLR 2025, eq. 3-6; official code WuYichen-97/SD-Lora-CL. In task t the pair A_t, B_t is trained
  with its norms inside the gradient, and so are the scalars m_0 ... m_t, one for every adapted matrix.
  Earlier pairs, later pairs and later magnitudes are restored after the update, so they keep their exact bits
  under any optimiser. A ~ U(+-1/sqrt(d_in)) and B ~ N(0, 1e-3^2): zero would have no direction. A new pair
  therefore changes every weight at the start of its task, by Frobenius norm `magnitude` at most; predictions
  have it from the first step of its task on, and so, as drawn, has a teacher of the last boundary.
  Deviations: the current pair is normalised too; every matrix has magnitudes of its own; all slots
  are allocated from the start; neither the rank reduction (SD-LoRA-RR) nor the merging of directions
  (SD-LoRA-KD).

  Freeze the rest by `learner(frozen=...)`. After more than `tasks` boundaries only magnitudes are trained.

  Args:
    tasks: T, number of slots.
    rank: r.
    magnitude: initial m.
    targets: regular expression, matched against the whole path of a weight, trained or frozen; stacked
      weights [layers, d_in, d_out] get factors and magnitudes per layer.

  Needs the boundary. State: 8 bytes (and parameters: T (r (d_in + d_out) + 1) per adapted matrix).
  """

  def init(key, params, batch, fwd):
    def factors(key, stack, d_in, d_out):
      k_a, k_b = jax.random.split(key)
      b = 1e-3 * jax.random.normal(k_b, (tasks, *stack, rank, d_out))
      a = bounds(k_a, (tasks, *stack, d_in, rank))
      return {'a': a, 'b': b, 'm': jnp.full((tasks, *stack), magnitude, jnp.float32)}

    return {'sdlora': drawn(key, select('sdlora', targets, params, fwd), factors)}, first_task()

  def wrap(s, apply):
    def summed(variables, batch, tap, train):
      many = s.now + 1 if train else s.begun

      def adapted(w, own):
        a, b, m = train_only(s.now, own['a']), train_only(s.now, own['b']), own['m']
        share = m / (norm(a) * norm(b) + 1e-8)
        share = jnp.where(first(many, m), share, 0)
        return operator(w, a, share[..., None, None] * b)

      return apply(put(variables, 'sdlora', adapted), batch, tap, train)

    return summed

  def first(many, m):
    return (jnp.arange(tasks) < many).reshape(-1, *[1] * (m.ndim - 1))

  def after(s, params, step, key):
    free = lambda name, a: first(s.now + 1, a) if name == 'm' else here(s.now, a)  # noqa: E731
    kept = keep(step.params['sdlora'], params['sdlora'], free)
    return {**params, 'sdlora': kept}, step_taken(s)

  def boundary(s, params, batches, fwd, key):
    # Not `next_task`: past the last slot no pair is trained any more.
    return params, Tasks(s.now + 1, s.begun)

  return Method(init=init, wrap=wrap, after=after, boundary=boundary, needs=('boundary',))


def norm(a: Array) -> Array:
  """Frobenius norm of the last two axes; its gradient at 0 is 0."""
  return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(a), axis=(-2, -1)), 1e-30))
