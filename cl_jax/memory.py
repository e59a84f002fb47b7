"""Replay memory as explicit state: written first, then drawn from, so that it is updated in place.

Reading memory and then writing it inside a compiled loop makes XLA copy the whole buffer on every step
(26 MB: 4.5 ms); writing first and carrying the next step's draw costs a few rows (0.024 ms). So a
`Memory` holds the rows that the NEXT step rehearses.

Rows keep the dtype in which the stream stores them: uint8 images stay uint8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.types import Array, Batch, Tree


class Writer(NamedTuple):
  """Decides which slot an example goes to.

  Attributes:
    init: (features) -> aux, the writer's own state; `features` is their number, 0 where none are given.
    place: (aux, batch, key, features) -> (slots i32[B], aux). `capacity` means: not stored. `features` is
      f32[B, D], the input of the network's head, for the writers that choose by them; else None.
    pick: (aux, key, n) -> (slots i32[n], w f32[n]): n distinct stored rows drawn uniformly; where
      fewer are stored, all of them and w = 0 for the rest.
    capacity: number of slots.
  """

  init: Callable
  place: Callable
  pick: Callable
  capacity: int


class Memory(NamedTuple):
  """The memory pytree.

  Attributes:
    rows: the stored examples; every leaf [capacity + 1, ...]. The last row takes what is not
      kept, so every scatter is in bounds (an out-of-range one corrupts memory on some edge runtimes).
    aux: the writer's state.
    draw: the rows for the next step, every leaf [n, ...]; w = 0 where there was nothing to draw.
  """

  rows: Batch
  aux: Tree
  draw: Batch


def create(writer: Writer, batch: Batch, draw: int, features: int = 0) -> Memory:
  """An empty memory for rows like those of `batch`, from which `draw` rows are taken at a time."""
  blank = lambda n: jax.tree.map(lambda a: jnp.zeros((n, *a.shape[1:]), a.dtype), batch)  # noqa: E731
  return Memory(blank(writer.capacity + 1), writer.init(features), blank(draw))


def write_then_draw(
  writer: Writer,
  memory: Memory,
  batch: Batch,
  key: Array,
  among: Tree = None,
  draws: int = 1,
  features: Array | None = None,
) -> Memory:
  """Stores rows of `batch` (those with w > 0), then draws the rows of the next step.

  Args:
    writer: see `Writer`.
    memory: is updated in place inside a compiled loop.
    batch: every leaf [B, ...].
    key: typed key; one half decides the slots, the other the draw.
    among: a writer state to draw from instead of the current one, for instance as it was at the last
      boundary; see `agem`.
    draws: `memory.draw` is made of so many independent draws of equal size.
    features: of the batch, for writers that choose by them.
  """
  k_place, k_draw = jax.random.split(key)
  slots, aux = writer.place(memory.aux, batch, k_place, features)
  slots = last_wins(slots, writer.capacity)
  rows = jax.tree.map(
    lambda d, a: d.at[slots].set(a.astype(d.dtype), mode='promise_in_bounds'), memory.rows, batch
  )
  n, held = memory.draw.y.shape[0] // draws, aux if among is None else among
  keys = [k_draw] if draws == 1 else jax.random.split(k_draw, draws)
  picked, w = map(jnp.concatenate, zip(*(writer.pick(held, k, n) for k in keys), strict=True))
  draw = jax.tree.map(lambda d: d.at[picked].get(mode='promise_in_bounds'), rows)
  return Memory(rows, aux, draw._replace(w=w))


def draw_again(writer: Writer, memory: Memory, key: Array, among: Tree) -> Memory:
  """Replaces the next step's draw; copies the rows when called in a loop, so call it at boundaries."""
  picked, w = writer.pick(among, key, memory.draw.y.shape[0])
  draw = jax.tree.map(lambda d: d.at[picked].get(mode='promise_in_bounds'), memory.rows)
  return memory._replace(draw=draw._replace(w=w))


def last_wins(slots: Array, trash: int) -> Array:
  """Sends all but the last of equal slots to the trash row: a scatter with duplicates has no order."""
  later = jnp.triu(slots[:, None] == slots[None, :], k=1).any(axis=1)
  return jnp.where(later, trash, slots)


def distinct(key: Array, n: int, total: Array) -> tuple[Array, Array]:
  """n distinct integers drawn uniformly from [0, total), in O(n^2) whatever `total` is.

  R. W. Floyd's algorithm (Bentley, CACM 30(9), 1987) on a traced `total`. Where total < n, the first
  `total` results are 0, 1, ... and the others have weight 0.

  Returns:
    (i32[n], f32[n] weights).
  """
  j = jnp.arange(n, dtype=jnp.int32)
  last = total - n + j  # step j may choose from [0, last_j]
  t = jax.random.randint(key, (n,), 0, jnp.maximum(last, 0) + 1, jnp.int32)

  def body(i, chosen):
    taken = jnp.any((chosen == t[i]) & (j < i))
    return chosen.at[i].set(jnp.where(taken, last[i], t[i]))

  chosen = jax.lax.fori_loop(0, n, body, jnp.full(n, -1, jnp.int32))
  few = total < n
  first = jnp.minimum(j, jnp.maximum(total - 1, 0))
  return jnp.where(few, first, chosen), 1 - (few & (j >= total)).astype(jnp.float32)


def distinct_of(key: Array, n: int, marked: Array) -> tuple[Array, Array]:
  """(i32[n], f32[n] weights): n distinct places where `marked` bool[N] is true; see `distinct`."""
  nth, w = distinct(key, n, marked.sum(dtype=jnp.int32))
  places = jnp.searchsorted(jnp.cumsum(marked), nth + 1)
  return jnp.minimum(places, marked.shape[0] - 1).astype(jnp.int32), w


def shuffled(key: Array, last: Array) -> Array:
  """0 .. N - 1 in random order, but those where `last` bool[N] is true after all others."""
  order = jax.random.permutation(key, last.shape[0])
  return order[jnp.argsort(last[order], stable=True)]


def arrivals(batch: Batch) -> tuple[Array, Array]:
  """(valid bool[B], rank i32[B]): which rows count, and how many valid ones came before each."""
  valid = batch.w > 0
  return valid, jnp.cumsum(valid, dtype=jnp.int32) - valid


def reservoir(capacity: int) -> Writer:
  """Vitter's algorithm R (ACM TOMS 11(1), 1985): every example seen so far is kept with equal probability.

  The n-th example (counted from 0) draws j from [0, n] INCLUSIVE and is stored in slot j if j < capacity.
  State: one int32.
  """

  def place(seen, batch, key, features):
    del features
    valid, rank = arrivals(batch)
    n = seen + rank
    j = jax.random.randint(key, n.shape, 0, n + 1, jnp.int32)
    slots = jnp.where(n < capacity, n, jnp.minimum(j, capacity))
    return jnp.where(valid, slots, capacity), seen + valid.sum(dtype=jnp.int32)

  def pick(seen, key, n):
    return distinct(key, n, jnp.minimum(seen, capacity))

  return Writer(lambda features: jnp.int32(0), place, pick, capacity)


def group_of(batch: Batch, classes: int, tasks: int) -> Array:
  """i32[B]: the class, or (task, class) where `tasks` > 1 and the task is told."""
  return batch.y + classes * jnp.maximum(batch.task, 0) if tasks > 1 else batch.y


def pick_in_groups(counts: Array, per_group: int, key: Array, n: int) -> tuple[Array, Array]:
  """Distinct stored rows where group g holds min(counts_g, per_group) slots from g * per_group on."""
  held = jnp.minimum(counts, per_group)
  ends = jnp.cumsum(held, dtype=jnp.int32)
  i, w = distinct(key, n, ends[-1])
  g = jnp.minimum(jnp.searchsorted(ends, i, side='right'), counts.shape[0] - 1)
  return g * per_group + jnp.clip(i - (ends[g] - held[g]), 0, per_group - 1), w


def ring(capacity: int, classes: int, tasks: int = 1) -> Writer:
  """A FIFO buffer per class (Lopez-Paz & Ranzato 2017; Chaudhry et al. 2019, "ring buffer").

  Args:
    capacity: total number of slots; each class gets capacity // (classes * tasks).
    classes: number of classes.
    tasks: > 1 keeps a buffer per (task, class), for domain-incremental streams such as Permuted MNIST;
      needs the task in training.

  State: int32 per buffer.
  """
  groups = classes * tasks
  per_group = capacity // groups
  if per_group < 1:
    raise ValueError(
      f'ring memory of {capacity} slots for {groups} classes: give at least {groups}'
    )

  def place(counts, batch, key, features):
    del key, features
    valid, _ = arrivals(batch)
    g = group_of(batch, classes, tasks)
    same = (g[:, None] == g[None, :]) & valid[None, :]
    rank = jnp.tril(same, k=-1).sum(axis=1)
    slots = g * per_group + (counts[g] + rank) % per_group
    return jnp.where(valid, slots, capacity), counts.at[g].add(valid.astype(jnp.int32))

  def pick(counts, key, n):
    return pick_in_groups(counts, per_group, key, n)

  return Writer(lambda features: jnp.zeros(groups, jnp.int32), place, pick, capacity)


class BalancedState(NamedTuple):
  """Writer state of `class_balanced`."""

  labels: Array  # i32[capacity], -1 = empty
  stored: Array  # i32[C]
  seen: Array  # i32[C]
  largest: Array  # bool[C]: the class has been the largest one, so it competes with itself only
  filled: Array  # i32[]


def class_balanced(capacity: int, classes: int) -> Writer:
  """Class-balancing reservoir sampling (Chrysakis & Moens, ICML 2020, algorithm 1).

  Until the memory is full everything is stored. Then an example of a class that was never the largest
  replaces a random stored example of the largest class; one of a class that was replaces one of its
  own with probability stored_c / seen_c.

  Unlike `reservoir` and `ring`, placing a row scans the stored labels: O(B * capacity) integers a step.
  State: 4 bytes per slot, 9 per class, and 4.
  """

  def init(features):
    del features
    zeros = jnp.zeros(classes, jnp.int32)
    return BalancedState(
      jnp.full(capacity, -1, jnp.int32), zeros, zeros, jnp.zeros(classes, bool), jnp.int32(0)
    )

  def place(aux, batch, key, features):
    del features
    valid, _ = arrivals(batch)
    u = jax.random.uniform(key, (*batch.y.shape, 2))

    def body(i, carry):
      a, slots = carry
      c = batch.y[i]
      full = a.filled >= capacity
      seen = a.seen.at[c].add(1)
      largest = a.largest | ((a.stored == a.stored.max()) & full)
      out = jnp.where(largest[c], c, jnp.argmax(a.stored))  # the class that loses a row
      keep = ~full | ~largest[c] | (u[i, 0] * seen[c] <= a.stored[c])
      nth = jnp.floor(u[i, 1] * a.stored[out]).astype(jnp.int32)
      member = jnp.cumsum(a.labels == out)
      victim = jnp.searchsorted(member, nth + 1)
      slot = jnp.where(full, jnp.minimum(victim, capacity - 1), a.filled).astype(jnp.int32)
      leaves = (full & keep).astype(jnp.int32)
      new = BalancedState(
        a.labels.at[slot].set(jnp.where(keep, c, a.labels[slot])),
        a.stored.at[out].add(-leaves).at[c].add(keep.astype(jnp.int32)),
        seen,
        largest,
        a.filled + (~full).astype(jnp.int32),
      )
      a = jax.tree.map(lambda old, n: jnp.where(valid[i], n, old), a, new)
      return a, slots.at[i].set(jnp.where(valid[i] & keep, slot, capacity))

    slots = jnp.full(batch.y.shape, capacity, jnp.int32)
    aux, slots = jax.lax.fori_loop(0, batch.y.shape[0], body, (aux, slots))
    return slots, aux

  def pick(aux, key, n):
    return distinct(key, n, aux.filled)

  return Writer(init, place, pick, capacity)
