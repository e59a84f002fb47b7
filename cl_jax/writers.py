"""Memory writers that choose by labels and features, row by row; and all writers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cl_jax.memory import (
  Writer,
  arrivals,
  class_balanced,
  distinct,
  group_of,
  pick_in_groups,
  reservoir,
  ring,
)
from cl_jax.types import Array, Batch, Tree

NAMES = ('reservoir', 'ring', 'class_balanced', 'greedy', 'largest', 'mof', 'kmeans')
BY_TASK = ('ring', 'mof', 'kmeans')  # those that can keep tasks apart


def writer(name: str, capacity: int, classes: int, tasks: int = 1) -> Writer:
  """The writer of that name, one of `NAMES`; `tasks` > 1 keeps classes of different tasks apart.

  'reservoir', 'ring' and 'class_balanced' are in `cl_jax.memory`; 'greedy' is `greedy_balanced`, 'largest'
  `largest_class`, 'mof' `mean_of_features`.
  """
  match name:
    case 'reservoir':
      return reservoir(capacity)
    case 'ring':
      return ring(capacity, classes, tasks)
    case 'class_balanced':
      return class_balanced(capacity, classes)
    case 'greedy':
      return greedy_balanced(capacity, classes)
    case 'largest':
      return largest_class(capacity, classes)
    case 'mof':
      return mean_of_features(capacity, classes, tasks)
    case 'kmeans':
      return kmeans(capacity, classes, tasks)
  raise ValueError(f'no memory writer {name!r}: one of {", ".join(NAMES)}')


class GreedyState(NamedTuple):
  """Writer state of `greedy_balanced`."""

  labels: Array  # i32[capacity], -1 = empty
  seen: Array  # bool[C]


def greedy_balanced(capacity: int, classes: int) -> Writer:
  """The greedy sampler of GDumb (Prabhu et al., ECCV 2020, algorithm 1), which evens out the classes.

  An example of class c is stored if c holds fewer than capacity / (number of classes seen) rows; when the
  memory is full it takes the place of a random row of the largest class. State: 4 bytes a slot, 1 a class.
  """

  def init(features):
    del features
    return GreedyState(jnp.full(capacity, -1, jnp.int32), jnp.zeros(classes, bool))

  def place(aux, batch, key, features):
    del features
    u = jax.random.uniform(key, batch.y.shape)

    def one(i, aux):
      c = batch.y[i]
      seen = aux.seen.at[c].set(True)
      stored = jnp.zeros(classes, jnp.int32).at[aux.labels].add(aux.labels >= 0)
      keep = stored[c] * seen.sum() < capacity
      slot = free_or_largest(aux.labels, stored, u[i])
      labels = aux.labels.at[slot].set(jnp.where(keep, c, aux.labels[slot]))
      return GreedyState(labels, seen), jnp.where(keep, slot, capacity)

    return row_by_row(one, aux, batch, capacity)

  def pick(aux, key, n):
    return distinct(key, n, (aux.labels >= 0).sum(dtype=jnp.int32))

  return Writer(init, place, pick, capacity)


class LargestState(NamedTuple):
  """Writer state of `largest_class`."""

  labels: Array  # i32[capacity], -1 = empty
  stored: Array  # i32[C]


def largest_class(capacity: int, classes: int) -> Writer:
  """Every example is stored; when the memory is full, in place of a random row of the largest class.

  The buffer of REMIND (Hayes et al., ECCV 2020, section 3.2). State: 4 bytes a slot, 4 a class. A row that
  arrives at a full memory scans its labels.
  """

  def init(features):
    del features
    return LargestState(jnp.full(capacity, -1, jnp.int32), jnp.zeros(classes, jnp.int32))

  def place(aux, batch, key, features):
    del features
    u = jax.random.uniform(key, batch.y.shape)

    def one(i, aux):
      slot = free_or_largest(aux.labels, aux.stored, u[i])
      out, c = aux.labels[slot], batch.y[i]
      stored = aux.stored.at[jnp.maximum(out, 0)].add(-(out >= 0).astype(jnp.int32)).at[c].add(1)
      return LargestState(aux.labels.at[slot].set(c), stored), slot

    return row_by_row(one, aux, batch, capacity)

  def pick(aux, key, n):
    return distinct(key, n, aux.stored.sum(dtype=jnp.int32))

  return Writer(init, place, pick, capacity)


def free_or_largest(labels: Array, stored: Array, u: Array) -> Array:
  """The next free slot, or a random one (by u in [0, 1)) of the class that holds most of a full memory."""
  filled, capacity, largest = stored.sum(), labels.shape[0], jnp.argmax(stored)
  nth = jnp.floor(u * stored[largest]).astype(jnp.int32)
  victim = jnp.searchsorted(jnp.cumsum(labels == largest), nth + 1)
  slot = jnp.where(filled < capacity, filled, jnp.minimum(victim, capacity - 1))
  return slot.astype(jnp.int32)


class MeanState(NamedTuple):
  """Writer state of `mean_of_features`, G groups of m slots."""

  counts: Array  # i32[G], rows seen
  mean: Array  # f32[G, D]
  distance: Array  # f32[G, m], of the stored rows when they were stored


def mean_of_features(capacity: int, classes: int, tasks: int = 1) -> Writer:
  """The examples whose features are nearest the running mean of their class ("MoF", Chaudhry et al. 2019).

  Each class has capacity // (classes * tasks) slots. A row replaces the farthest stored one of its class
  where it is nearer; distances are those at the time of storing, with the mean that includes the row
  (features stored earlier are not computed again). State: 4 (G (D + 1) + capacity) bytes for G classes.
  """
  groups, m = _groups(capacity, classes, tasks, 'mof')

  def init(features):
    _need(features, 'mof')
    return MeanState(
      jnp.zeros(groups, jnp.int32), jnp.zeros((groups, features)), jnp.full((groups, m), jnp.inf)
    )

  def place(aux, batch, key, features):
    del key
    g = group_of(batch, classes, tasks)

    def one(i, aux):
      c, f = g[i], features[i].astype(aux.mean.dtype)
      n = aux.counts[c] + 1
      mean = aux.mean[c] + (f - aux.mean[c]) / n
      distance = jnp.sqrt(jnp.sum(jnp.square(f - mean)))
      slot = jnp.where(n <= m, n - 1, jnp.argmax(aux.distance[c])).astype(jnp.int32)
      keep = distance < aux.distance[c, slot]
      near = jnp.where(keep, distance, aux.distance[c, slot])
      new = MeanState(
        aux.counts.at[c].set(n), aux.mean.at[c].set(mean), aux.distance.at[c, slot].set(near)
      )
      return new, jnp.where(keep, c * m + slot, capacity)

    return row_by_row(one, aux, batch, capacity)

  def pick(aux, key, n):
    return pick_in_groups(aux.counts, m, key, n)

  return Writer(init, place, pick, capacity)


class KMeansState(NamedTuple):
  """Writer state of `kmeans`, G groups of m slots, each with a centroid."""

  seen: Array  # i32[G], rows seen
  counts: Array  # i32[G, m], rows of each centroid
  centroid: Array  # f32[G, m, D]
  kept: Array  # f32[G, m, D], features of the stored rows when they were stored


def kmeans(capacity: int, classes: int, tasks: int = 1) -> Writer:
  """The example nearest to each of m online k-means centroids of its class (Chaudhry et al. 2019).

  m = capacity // (classes * tasks); the first m rows of a class start its centroids. A row moves the nearest
  centroid c by (f - c) / n, and is stored if it is nearer to it than the row stored there.
  State: 4 G (m (2 D + 1) + 1) bytes for G classes.
  """
  groups, m = _groups(capacity, classes, tasks, 'kmeans')

  def init(features):
    _need(features, 'kmeans')
    zeros = jnp.zeros((groups, m, features))
    return KMeansState(
      jnp.zeros(groups, jnp.int32), jnp.zeros((groups, m), jnp.int32), zeros, zeros
    )

  def place(aux, batch, key, features):
    del key
    g = group_of(batch, classes, tasks)

    def one(i, aux):
      c, f = g[i], features[i].astype(aux.centroid.dtype)
      away = lambda a: jnp.sum(jnp.square(a - f), axis=-1)  # noqa: E731
      first = aux.seen[c] < m
      slot = jnp.where(first, aux.seen[c], jnp.argmin(away(aux.centroid[c]))).astype(jnp.int32)
      n = aux.counts[c, slot] + 1
      centroid = aux.centroid[c, slot] + (f - aux.centroid[c, slot]) / n
      apart = lambda a: jnp.sum(jnp.square(a - centroid))  # noqa: E731
      keep = first | (apart(f) < apart(aux.kept[c, slot]))
      new = KMeansState(
        aux.seen.at[c].add(1),
        aux.counts.at[c, slot].set(n),
        aux.centroid.at[c, slot].set(centroid),
        aux.kept.at[c, slot].set(jnp.where(keep, f, aux.kept[c, slot])),
      )
      return new, jnp.where(keep, c * m + slot, capacity)

    return row_by_row(one, aux, batch, capacity)

  def pick(aux, key, n):
    return pick_in_groups(aux.seen, m, key, n)

  return Writer(init, place, pick, capacity)


def row_by_row(one: Callable, aux: Tree, batch: Batch, capacity: int) -> tuple[Array, Tree]:
  """(slots i32[B], aux) of `one(i, aux) -> (aux, slot)` over the rows that count; others go to `capacity`."""
  valid, _ = arrivals(batch)

  def body(i, carry):
    aux, slots = carry
    new, slot = one(i, aux)
    aux = jax.tree.map(lambda old, n: jnp.where(valid[i], n, old), aux, new)
    return aux, slots.at[i].set(jnp.where(valid[i], slot, capacity))

  start = jnp.full(batch.y.shape, capacity, jnp.int32)
  aux, slots = jax.lax.fori_loop(0, batch.y.shape[0], body, (aux, start))
  return slots, aux


def _groups(capacity: int, classes: int, tasks: int, name: str) -> tuple[int, int]:
  """(number of classes kept apart, slots of each)."""
  groups = classes * tasks
  if capacity < groups:
    raise ValueError(
      f'{name} memory of {capacity} slots for {groups} classes: give at least {groups}'
    )
  return groups, capacity // groups


def _need(features: int, name: str) -> None:
  if not features:
    raise ValueError(f'the {name} writer chooses by features: give their number to memory.create')
