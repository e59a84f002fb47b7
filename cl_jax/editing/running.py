"""The running state of `statistics.moments`: sums or sketches of k k^T, and how far they have converged.

A state is a dict of arrays, as it stands in the file: large ones, what half of the text had of them under
'half_', and the history.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cl_jax.editing import frequent

HISTORY = 'points', 'change', 'rank'  # an entry for every doubling of the text


def specs(ffn: int, layers: int, sketch: int, half: bool) -> dict[str, tuple[tuple, Any]]:
  """{name: (shape, dtype)} of the state; `half` is what half of the text had, as long as it is needed."""
  f64 = np.float64
  large = {
    'rows': ((layers, sketch, ffn), np.float32),
    'diagonal': ((layers, ffn), f64),
    'lost': ((layers,), f64),
  }
  if not sketch:
    large = {'sums': ((layers, ffn * (ffn + 1) // 2), f64)}
  small = {'next': ((), np.int64), 'tokens': ((), np.int64), 'points': ((None,), np.int64)}
  small |= {'change': ((None, layers), f64), 'rank': ((None, layers), f64)}
  return small | large | ({f'half_{k}': spec for k, spec in large.items()} if half else {})


def begun(ffn: int, layers: int, sketch: int) -> dict[str, np.ndarray]:
  """The state before the first block."""
  return {
    name: np.zeros([n or 0 for n in shape], dtype)
    for name, (shape, dtype) in specs(ffn, layers, sketch, True).items()
  }


def add(state: dict[str, np.ndarray], found: np.ndarray, seen: np.ndarray) -> None:
  """Adds what `through` found of one batch, in place."""
  state['tokens'] = state['tokens'] + seen.sum()
  if 'sums' in state:
    triangle = np.triu_indices(found.shape[-1])
    for total, new in zip(state['sums'], found, strict=True):
      total += new[triangle]
    return
  for i, keys in enumerate(found):
    new = keys[seen]
    if not len(new):
      continue
    state['rows'][i], lost = frequent.merge(state['rows'][i], new)
    state['lost'][i] += lost
    state['diagonal'][i] += np.square(new.astype(np.float64)).sum(0)


def dense(arrays: dict[str, np.ndarray], i: int, ffn: int, prefix: str = '') -> np.ndarray:
  """sum k k^T of the i-th layer, f64[ffn, ffn]."""
  if f'{prefix}sums' in arrays:
    one, two = np.triu_indices(ffn)
    full = np.empty((ffn, ffn))
    full[one, two] = full[two, one] = arrays[f'{prefix}sums'][i]
    return full
  rows = arrays[f'{prefix}rows'][i].astype(np.float64)
  full = rows.T @ rows
  np.fill_diagonal(full, arrays[f'{prefix}diagonal'][i])
  return full


def doubled(state: dict[str, np.ndarray], ffn: int) -> str:
  """Compares with half of the text, in place, and keeps what is to be compared next; a line about it."""
  tokens, before = int(state['tokens']), int(state['points'][-1]) if len(state['points']) else 0
  large = [k for k in ('sums', 'rows', 'diagonal', 'lost') if k in state]
  change, rank = np.full((2, len(state[large[0]])), np.nan)
  for i in range(len(change)):
    now = dense(state, i, ffn) / max(tokens, 1)
    norm = max(np.linalg.norm(now), np.finfo(np.float64).tiny)
    rank[i] = np.trace(now) ** 2 / norm**2
    if before:
      change[i] = np.linalg.norm(now - dense(state, i, ffn, 'half_') / before) / norm
  for name, new in zip(HISTORY, (np.asarray(tokens), change, rank), strict=True):
    state[name] = np.concatenate([state[name], new[None]])
  for name in large:
    state[f'half_{name}'][:] = state[name]
  moved = f', changed by {np.median(change):.3f} (at most {change.max():.3f})' if before else ''
  return f'{tokens} tokens: effective rank {rank.min():.1f} to {rank.max():.1f}{moved}'
