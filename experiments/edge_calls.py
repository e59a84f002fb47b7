"""What a learner is called with, from its configuration's own stream, and what JAX makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cl_jax.edge import emulate, parity
from cl_jax.edge.learner import Leaf
from cl_jax.streams.take import take
from experiments import export

# For every task its batches of test examples: (what predict takes, labels, weights).
Tests = list[list[tuple[list[np.ndarray], np.ndarray, np.ndarray]]]


def rows_of(batch: Any, table: Sequence[Leaf]) -> list[np.ndarray]:
  """A batch as the flat programs take it."""
  leaves = jax.tree.leaves(batch)
  return [np.asarray(a, leaf.dtype) for a, leaf in zip(leaves, table, strict=True)]


def calls_of(made: export.Subject, steps: int) -> list[emulate.Call]:
  """The first half of the steps from the first leg, its boundary, the rest from the second, a prediction."""
  stream, flat = made.stream, made.flat
  lengths = leg_steps(made)
  half, calls = -(-steps // 2), []
  last = min(1, len(lengths) - 1)
  fetch = jax.jit(lambda rows, leg: take(stream, rows, leg))
  for i in range(steps):
    leg = 0 if i < half else last
    at = i if i < half else i - half
    batch = fetch(stream.index[leg, at % lengths[leg]], leg)
    calls.append(('step', rows_of(batch, flat.batch)))
    if i == half - 1 and flat.boundary is not None:
      calls.append(('boundary', ends_of(made, 0)))
  return [*calls, ('predict', tests_of(made)[0][0][0])]


def whole(made: export.Subject) -> tuple[list[emulate.Call], Tests]:
  """Every step of the stream with its boundaries, then a prediction of every test batch; and those."""
  stream, flat = made.stream, made.flat
  fetch = jax.jit(lambda rows, leg: take(stream, rows, leg))
  calls: list[emulate.Call] = []
  for leg, n in enumerate(leg_steps(made)):
    for i in range(n):
      calls.append(('step', rows_of(fetch(stream.index[leg, i], leg), flat.batch)))
    if flat.boundary is not None:
      calls.append(('boundary', ends_of(made, leg)))
  tests = tests_of(made)
  return [*calls, *(('predict', rows) for parts in tests for rows, _, _ in parts)], tests


def accuracies(tests: Tests, logits: Sequence[np.ndarray], shape: Sequence[int]) -> list[float]:
  """The accuracy on every task, from the flat logits of its test batches; `shape` is that of one batch."""
  guesses = iter(a.reshape(shape).argmax(-1) for a in logits)
  per_task = []
  for parts in tests:
    hits = [(w * (next(guesses) == y), w) for _, y, w in parts]
    per_task.append(float(sum(h.sum() for h, _ in hits) / sum(w.sum() for _, w in hits)))
  return per_task


def leg_steps(made: export.Subject) -> list[int]:
  stream = made.stream
  if stream.steps is None:
    return [stream.index.shape[1]] * len(stream.index)
  return [int(n) for n in np.asarray(stream.steps)]


def ends_of(made: export.Subject, leg: int) -> list[np.ndarray]:
  stream = made.stream
  ends = jax.vmap(lambda rows: take(stream, rows, leg))(stream.ends[leg])
  return rows_of(ends, made.flat.ends)


def reference(
  made: export.Subject, calls: Sequence[emulate.Call]
) -> tuple[list[Any], list[np.ndarray]]:
  """(the final leaves, the logits of every prediction) as JAX computes them."""
  flat = made.flat
  step, predict = jax.jit(flat.step), jax.jit(flat.predict)
  boundary = None if flat.boundary is None else jax.jit(flat.boundary)
  leaves: list[Any] = list(flat.leaves)
  logits = []
  for part, rows in calls:
    if part == 'step':
      leaves, _ = step(leaves, rows)
    elif part == 'boundary':
      assert boundary is not None
      leaves = boundary(leaves, rows)
    else:
      logits.append(np.asarray(predict(leaves, rows)).ravel())
  return [np.asarray(a) for a in leaves], logits


def sensitivity(
  made: export.Subject,
  calls: Sequence[emulate.Call],
  want: Sequence[np.ndarray],
  table: Sequence[Mapping[str, Any]],
) -> float:
  """How far JAX's final state moves when the last bit of about a half of the initial floats changes.

  A method that amplifies rounding (a steep gate, an ill-conditioned solve) cannot agree better than that
  between two programs that add in different orders.
  """
  draw = np.random.default_rng(0)

  def nudged(a: np.ndarray) -> np.ndarray:
    up = np.nextafter(a, np.inf) if a.dtype.kind == 'f' else a
    return np.asarray(np.where(draw.integers(0, 2, a.shape), up, a), a.dtype)

  other = made.flat._replace(leaves=[nudged(a) for a in made.flat.leaves])
  again, _ = reference(made._replace(flat=other), calls)
  return parity.compare(table, again, want).error


def tests_of(made: export.Subject) -> Tests:
  """For every task, batches of its test examples in the size that predict was exported for: (rows, y, w)."""
  table, test = made.flat.batch, made.stream.test
  B = table[-1].shape[0]
  found = []
  for t in range(made.stream.tasks):
    own = jax.tree.map(lambda a, t=t: np.asarray(a[t]).reshape(-1, *np.shape(a)[3:]), test)
    n = len(own.y)
    parts = []
    for lo in range(0, n, B):
      at = np.arange(lo, lo + B)
      part = jax.tree.map(lambda a, at=at, n=n: a[np.minimum(at, n - 1)], own)
      part = part._replace(w=np.where(at < n, part.w, 0).astype(np.float32))
      if part.w.any():
        parts.append((rows_of(part, table), np.asarray(part.y), np.asarray(part.w)))
    found.append(parts)
  return found
