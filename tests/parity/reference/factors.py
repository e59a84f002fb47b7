"""What olora, sdlora and inflora share: the problem, and factors A [T,in,r], B [T,r,out] on l0 and l1.

Row vectors: x @ (w + sum_i c_i A_i @ B_i) + b with a slot i per task. l0/w and l1/w stay as given;
the biases l0/b, l1/b and the head l2/w, l2/b are trained by the same plain SGD as the factors. Three
tasks of two classes each; the softmax is over all 6 outputs in every task.
"""

from __future__ import annotations

import numpy as np
import problem as pb
from frozen import clear

TASKS, STEPS, ROWS, CLASSES = 3, 5, 6, 6
R, ALPHA = 2, 3.0
LAYERS = ('l0', 'l1')
PLAIN = ('l0/b', 'l1/b', 'l2/w', 'l2/b')  # trained whatever the method


def factors(rng: np.random.Generator, init: pb.Params, deviation: float = 0.0) -> pb.Params:
  """A ~ U(+-1/sqrt(in)) and B ~ N(0, deviation^2) of all tasks."""
  out: pb.Params = {}
  for name in LAYERS:
    fan_in, fan_out = init[f'{name}/w'].shape
    out[f'{name}/A'] = rng.uniform(-1, 1, size=(TASKS, fan_in, R)) / np.sqrt(fan_in)
    out[f'{name}/B'] = deviation * rng.normal(size=(TASKS, R, fan_out))
  return out


def tasks(rng: np.random.Generator) -> tuple[pb.Array, np.ndarray, pb.Array]:
  """xs [3,5,6,6], ys [3,5,6], probe [8,6]."""
  xs, ys = pb.make_tasks(rng, [[0, 1], [2, 3], [4, 5]], STEPS, ROWS)
  return xs, ys, rng.normal(size=(8, pb.INPUTS))


def mlp(params: pb.Params, updates: pb.Params) -> pb.Params:
  """The plain MLP whose l0/w and l1/w hold w + update; updates are {'l0': [in,out], 'l1': ...}."""
  out = {k: params[k] for k in PLAIN}
  return out | {f'{n}/w': params[f'{n}/w'] + updates[n] for n in LAYERS}


def gradients(plain: pb.Params, x: pb.Array, y: np.ndarray) -> tuple[float, pb.Params]:
  """Cross-entropy and its gradient by the plain MLP, with every ReLU clear of its kink."""
  _, a0, _, a1, _ = pb.forward(plain, x)[1]
  clear(a0, a1)
  return pb.loss_and_grad(plain, x, y)


def output(
  trace: list[pb.Params], losses: list, effective: list[pb.Params], probe: pb.Array
) -> dict:
  """The arrays that every variant has; `effective` are the plain MLPs after each task."""
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  kept = [{f'{n}/w': p[f'{n}/w'] for n in LAYERS} for p in effective]
  out |= pb.prefixed('effective', pb.stack(kept))
  out['loss'] = np.reshape(losses, (TASKS, STEPS))
  return out | {'probe_logits': np.stack([pb.forward(p, probe)[0] for p in effective])}
