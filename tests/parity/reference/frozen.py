"""What latent, cwr, renorm and remind share: the network cut at h0, and the checks of a run.

h0 = relu(l0 x) [rows, 8] is the latent layer. Above it are l1 and l2, the only parameters that are
trained once l0 is frozen. Every ReLU of a step or of a prediction is kept clear of its kink.
"""

from __future__ import annotations

import numpy as np
import problem as pb

ABOVE = ('l1/w', 'l1/b', 'l2/w', 'l2/b')
KINK = 1e-5  # no input of a ReLU is closer to 0


def clear(*inputs: pb.Array) -> None:
  for a in inputs:
    assert np.abs(a).min() > KINK, np.abs(a).min()


def latent(params: pb.Params, x: pb.Array) -> pb.Array:
  """h0 [rows, 8]."""
  a0 = x @ params['l0/w'] + params['l0/b']
  clear(a0)
  return np.maximum(a0, 0.0)


def above(params: pb.Params, h0: pb.Array) -> tuple[pb.Array, tuple[pb.Array, pb.Array]]:
  """Logits [rows, C] from h0; h1's input and h1."""
  a1 = h0 @ params['l1/w'] + params['l1/b']
  clear(a1)
  h1 = np.maximum(a1, 0.0)
  return h1 @ params['l2/w'] + params['l2/b'], (a1, h1)


def step_above(
  params: pb.Params, h0: pb.Array, y: np.ndarray, lr: float
) -> tuple[float, pb.Params]:
  """The loss of rows that enter at h0, and the parameters after SGD on l1 and l2."""
  logits, (a1, h1) = above(params, h0)
  loss, dlogits = pb.cross_entropy(logits, y)
  da1 = (dlogits @ params['l2/w'].T) * (a1 > 0)
  grads = {
    'l1/w': h0.T @ da1,
    'l1/b': da1.sum(0),
    'l2/w': h1.T @ dlogits,
    'l2/b': dlogits.sum(0),
  }
  return loss, params | {k: params[k] - lr * grads[k] for k in ABOVE}


def step_whole(params: pb.Params, x: pb.Array, y: np.ndarray, lr: float) -> tuple[float, pb.Params]:
  """The same for the whole network, l0 included."""
  _, a0, _, a1, _ = pb.forward(params, x)[1]
  clear(a0, a1)
  loss, grads = pb.loss_and_grad(params, x, y)
  return loss, pb.sgd(params, grads, lr)


def nearby(rng: np.random.Generator, params: pb.Params) -> pb.Params:
  return {k: p * (1 + 6e-8 * rng.uniform(-1, 1, p.shape)) for k, p in params.items()}


def stable(out: dict, again: dict) -> None:
  """A run from nearly the same inputs: equal choices, and values that moved little."""
  for key, value in out.items():
    value = np.asarray(value)
    tolerance = 0 if value.dtype.kind == 'i' else 4e-7
    moved = np.abs(value - again[key]).max()
    assert moved <= tolerance, (key, moved)
