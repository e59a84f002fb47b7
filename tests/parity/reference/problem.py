"""The tiny problem shared by the reference generators: an MLP in float64 NumPy, by hand.

Nothing here, and nothing in the generators, imports the library under test. Gradients are written
out; `verify.py` derives the same gradients with PyTorch's autograd and compares.

Parameters are one flat dict of float64 arrays, weights [in, out], applied as ``x @ w + b``:
``l0/w`` [6, 8], ``l0/b`` [8], ``l1/w`` [8, 7], ``l1/b`` [7], ``l2/w`` [7, C], ``l2/b`` [C]; ReLU
after l0 and l1. Cross-entropy is the mean over rows. A step is ``p <- p - lr * gradient``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Params = dict[str, Array]

GOLDEN = Path(__file__).resolve().parent.parent / 'golden'
INPUTS, HIDDEN = 6, (8, 7)


def init_params(rng: np.random.Generator, classes: int = 4) -> Params:
  """Random parameters; biases are not zero so that a mistake in them shows."""
  sizes = (INPUTS, *HIDDEN, classes)
  params: Params = {}
  for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
    params[f'l{i}/w'] = rng.normal(size=(fan_in, fan_out)) * np.sqrt(1.0 / fan_in)
    params[f'l{i}/b'] = rng.normal(size=(fan_out,)) * 0.2
  return params


def make_tasks(
  rng: np.random.Generator, classes_of_task: list[list[int]], steps: int, rows: int = 5
) -> tuple[Array, NDArray[np.int64]]:
  """Batches xs [tasks, steps, rows, 6] and labels ys [tasks, steps, rows] (global class numbers).

  Every pair of task and class is a Gaussian cloud with a centre of its own, so tasks that share
  labels still conflict. Every batch holds every class of its task when it has rows enough.
  """
  xs, ys = [], []
  for classes in classes_of_task:
    centres = {c: rng.normal(size=INPUTS) * 0.9 for c in classes}
    labels = []
    for _ in range(steps):
      extra = rng.choice(classes, size=max(rows - len(classes), 0))
      labels.append(rng.permutation(np.concatenate([classes, extra]).astype(np.int64))[:rows])
    y = np.stack(labels)
    x = np.stack([[centres[int(c)] for c in row] for row in y])
    xs.append(x + rng.normal(size=x.shape) * 0.5)
    ys.append(y)
  return np.stack(xs), np.stack(ys)


def forward(params: Params, x: Array) -> tuple[Array, tuple[Array, ...]]:
  """Logits [rows, C], and what `backward` needs."""
  a0 = x @ params['l0/w'] + params['l0/b']
  h0 = np.maximum(a0, 0.0)
  a1 = h0 @ params['l1/w'] + params['l1/b']
  h1 = np.maximum(a1, 0.0)
  return h1 @ params['l2/w'] + params['l2/b'], (x, a0, h0, a1, h1)


def backward(params: Params, cache: tuple[Array, ...], dlogits: Array) -> Params:
  """Gradient of a scalar whose derivative by the logits is `dlogits` [rows, C]."""
  x, a0, h0, a1, h1 = cache
  da1 = (dlogits @ params['l2/w'].T) * (a1 > 0)
  da0 = (da1 @ params['l1/w'].T) * (a0 > 0)
  return {
    'l0/w': x.T @ da0,
    'l0/b': da0.sum(0),
    'l1/w': h0.T @ da1,
    'l1/b': da1.sum(0),
    'l2/w': h1.T @ dlogits,
    'l2/b': dlogits.sum(0),
  }


def log_softmax(z: Array) -> Array:
  z = z - z.max(axis=1, keepdims=True)
  return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def softmax(z: Array) -> Array:
  return np.exp(log_softmax(z))


def cross_entropy(logits: Array, labels: NDArray[np.int64]) -> tuple[float, Array]:
  """Mean over rows, and its derivative by the logits."""
  n = len(labels)
  logp = log_softmax(logits)
  onehot = np.eye(logits.shape[1])[labels]
  return float(-(onehot * logp).sum() / n), (np.exp(logp) - onehot) / n


def loss_and_grad(params: Params, x: Array, y: NDArray[np.int64]) -> tuple[float, Params]:
  logits, cache = forward(params, x)
  loss, dlogits = cross_entropy(logits, y)
  return loss, backward(params, cache, dlogits)


def sgd(params: Params, grads: Params, lr: float) -> Params:
  return {k: params[k] - lr * grads[k] for k in params}


def stack(dicts: list[Params]) -> Params:
  """A list of dicts to a dict of arrays with a new first axis."""
  return {k: np.stack([d[k] for d in dicts]) for k in dicts[0]}


def per_task(dicts: list[Params], tasks: int) -> Params:
  """Like `stack`, first axis split into [tasks, steps]."""
  return {k: v.reshape(tasks, -1, *v.shape[1:]) for k, v in stack(dicts).items()}


def prefixed(prefix: str, arrays: dict) -> dict:
  return {f'{prefix}/{k}': v for k, v in arrays.items()}


def save(family: str, arrays: dict) -> None:
  """Writes golden/<family>.npz: plain arrays, no pickle, finite, below 300 kB."""
  out = {k: np.asarray(v) for k, v in arrays.items()}
  for key, value in out.items():
    assert value.dtype.kind in 'fib', (key, value.dtype)
    assert np.all(np.isfinite(value)), key
  GOLDEN.mkdir(parents=True, exist_ok=True)
  path = GOLDEN / f'{family}.npz'
  np.savez(path, allow_pickle=False, **out)
  size = path.stat().st_size
  assert size < 300_000, size
  print(f'{path.name}: {len(out)} arrays, {size} bytes')
