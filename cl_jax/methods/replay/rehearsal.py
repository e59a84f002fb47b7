"""Rehearsal from a memory that tasks share out: the baselines R-PM and R-FM of the survey."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from cl_jax import memory
from cl_jax.linalg import cross_entropy, weighted_mean
from cl_jax.types import Array, Method

SHARES = ('partial', 'full')


class SharedState(NamedTuple):
  """Writer state of `shared_out`; a slot that is no task's has owner -1."""

  owner: Array  # i32[capacity], the task that a slot belongs to
  position: Array  # i32[capacity], the slot's place in the ring of its task
  filled: Array  # bool[capacity + 1]; the last slot takes what is not kept
  ring: Array  # i32[capacity], slots of the current task by position
  task: Array  # i32[], the current task
  written: Array  # i32[], rows of the current task so far


def rehearsal(
  tasks: int, capacity: int = 500, draw: int = 32, share: str = 'full', coef: float = 1.0
) -> Method:
  """Trains on the batch and on rows of earlier tasks, of which each keeps an equal part of the memory.

  L = CE(batch) + coef * CE(rows of earlier tasks), the second term 0 in the first task

  'partial' (R-PM) gives every task capacity / tasks slots from the beginning, so that most of the memory is
  empty at first; 'full' (R-FM) gives it all to the first task, and at every boundary cuts what each task
  holds to capacity / (number of tasks so far). A task's part is a ring: its latest rows. They are
  written after the step.

  De Lange et al., TPAMI 2022, section 4.2; official code Mattdl/CLsurvey. Deviations: rows are drawn
  uniformly from all earlier tasks instead of exactly evenly; their loss is one mean; the authors drop
  what would begin the ring again within a batch.

  Args:
    tasks: how many there will be, for 'partial'.
    capacity: slots in all.
    draw: memory rows per step, drawn without replacement.
    share: 'partial' or 'full'.
    coef: weight of the memory's loss.

  Needs the boundary. State: capacity + 1 + draw rows of the stream as stored, 13 bytes per slot, 9 bytes. One
  more forward and backward pass on `draw` rows per step.
  """
  if share not in SHARES:
    raise ValueError(f'rehearsal share {share!r}: one of {SHARES}')
  if capacity < tasks:
    raise ValueError(
      f'rehearsal memory of {capacity} slots for {tasks} tasks: give at least one each'
    )
  write = shared_out(capacity, tasks if share == 'partial' else None)

  def init(key, params, batch, fwd):
    return {}, memory.create(write, batch, draw)

  def loss(s, params, batch, out, fwd):
    then = fwd(params, s.draw, train=True)
    return coef * weighted_mean(cross_entropy(then.logits, s.draw.y), s.draw.w)

  def after(s, params, step, key):
    return params, memory.write_then_draw(write, s, step.batch, key)

  def boundary(s, params, batches, fwd, key):
    s = s._replace(aux=begin_task(s.aux, s.aux.task + 1, tasks if share == 'partial' else None))
    return params, memory.draw_again(write, s, key, s.aux)

  return Method(init=init, loss=loss, after=after, boundary=boundary, needs=('boundary',))


def begin_task(aux: SharedState, task: Array | int, tasks: int | None) -> SharedState:
  """Cuts earlier tasks to the first `m` places of their rings; the next task gets `m` free slots."""
  capacity = aux.owner.shape[0]
  m = capacity // (task + 1) if tasks is None else capacity // tasks
  kept = (aux.owner >= 0) & (aux.position < m)
  rank = jnp.cumsum(~kept, dtype=jnp.int32) - 1
  new = ~kept & (rank < m)
  return SharedState(
    jnp.where(kept, aux.owner, jnp.where(new, task, -1)).astype(jnp.int32),
    jnp.where(kept, aux.position, rank),
    aux.filled & jnp.append(kept, False),
    jnp.argsort(jnp.where(new, rank, capacity)).astype(jnp.int32),
    jnp.asarray(task, jnp.int32),
    jnp.int32(0),
  )


def shared_out(capacity: int, tasks: int | None) -> memory.Writer:
  """A ring per task; draws are from earlier tasks. `tasks` None: the whole memory is always shared out."""

  def init(features):
    del features
    none = jnp.full(capacity, -1, jnp.int32)
    blank = jnp.zeros(capacity + 1, bool)
    empty = SharedState(none, none, blank, none, jnp.int32(0), jnp.int32(0))
    return begin_task(empty, 0, tasks)

  def place(aux, batch, key, features):
    del key, features
    valid, rank = memory.arrivals(batch)
    m = capacity // (aux.task + 1) if tasks is None else capacity // tasks
    slots = jnp.where(valid, aux.ring[(aux.written + rank) % m], capacity)
    filled = aux.filled.at[slots].set(slots < capacity)
    written = aux.written + valid.sum(dtype=jnp.int32)
    return slots, aux._replace(filled=filled, written=written)

  def pick(aux, key, n):
    earlier = aux.filled[:capacity] & (aux.owner < aux.task)
    return memory.distinct_of(key, n, earlier)

  return memory.Writer(init, place, pick, capacity)
