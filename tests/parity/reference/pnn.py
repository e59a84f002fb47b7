"""Reference for progressive neural networks: golden/pnn.npz.

Rusu et al. 2016, eq. 1, without adapters. One column 6-8-7-2 for each of three tasks; task k, counted
from 0, has the classes 2k and 2k+1, the two outputs of column k. Below, laterals come from j < k:

  h0^k = relu(x W0^k + b0^k)
  h1^k = relu(h0^k W1^k + b1^k + sum_j h0^j U1^{k:j})
  z^k  =      h1^k W2^k + b2^k + sum_j h1^j U2^{k:j}

A step of task k: CE over the two logits z^k (label minus 2k), mean over rows, and p <- p - lr gradient
for W^k, b^k and U^{k:j} alone. Earlier columns are fixed; later ones keep their initial weights (but
what they compute changes while an earlier column trains).

All columns and laterals are drawn at the start, U at 0.3 of the scale of W, and are inputs. The paper
draws and adds column k when task k comes, and puts an adapter (a scale and a hidden layer) into the
laterals; eq. 1 shows no biases.

Keys, <n> over l0/w, l0/b, l1/w, l1/b, l2/w, l2/b of a column k (W_i^k is l<i>/w, [in, out]), and
u1/<j> [8,7], u2/<j> [7,2] for j < k (U1^{k:j} and U2^{k:j}). Inputs:
  init/<k>/<n>, lr, xs [3,5,5,6], ys [3,5,5] (class numbers), probe [12,6]
Outputs:
  pnn/params/<k>/<n> [3,5,...]  after every step, also of columns that are not trained in this task
  pnn/loss [3,5]                before the step
  pnn/probe_logits [3,12,6]     z^0, z^1, z^2 after each task, columns not yet trained included
"""

from __future__ import annotations

import numpy as np
import problem as pb
from dgr import nearby, stable

STEPS, ROWS, LR, LATERAL = 5, 5, 0.2, 0.3
TASKS = [[0, 1], [2, 3], [4, 5]]


def init_columns(rng: np.random.Generator) -> list[pb.Params]:
  columns = []
  for k in range(len(TASKS)):
    column = pb.init_params(rng, classes=2)
    for j in range(k):
      for name in ('l1', 'l2'):
        fan_in, fan_out = column[f'{name}/w'].shape
        u = rng.normal(size=(fan_in, fan_out)) * np.sqrt(1.0 / fan_in) * LATERAL
        column[f'u{name[1]}/{j}'] = u
    columns.append(column)
  return columns


def forward(columns: list[pb.Params], x: pb.Array) -> tuple[list, list, list]:
  """h0^k, h1^k and z^k of every column."""
  h0s, h1s, zs = [], [], []
  for k, c in enumerate(columns):
    h0 = np.maximum(x @ c['l0/w'] + c['l0/b'], 0.0)
    a1 = h0 @ c['l1/w'] + c['l1/b'] + sum(h0s[j] @ c[f'u1/{j}'] for j in range(k))
    h1 = np.maximum(a1, 0.0)
    z = h1 @ c['l2/w'] + c['l2/b'] + sum(h1s[j] @ c[f'u2/{j}'] for j in range(k))
    h0s.append(h0)
    h1s.append(h1)
    zs.append(z)
  return h0s, h1s, zs


def loss_and_grad(columns: list[pb.Params], x: pb.Array, y: np.ndarray) -> tuple[float, pb.Params]:
  """The loss of the last column's task, and its gradient by that column's own weights."""
  k = len(columns) - 1
  c = columns[k]
  h0s, h1s, zs = forward(columns, x)
  loss, dz = pb.cross_entropy(zs[k], y - 2 * k)
  da1 = (dz @ c['l2/w'].T) * (h1s[k] > 0)
  da0 = (da1 @ c['l1/w'].T) * (h0s[k] > 0)
  grads = {
    'l0/w': x.T @ da0,
    'l0/b': da0.sum(0),
    'l1/w': h0s[k].T @ da1,
    'l1/b': da1.sum(0),
    'l2/w': h1s[k].T @ dz,
    'l2/b': dz.sum(0),
  }
  for j in range(k):
    grads |= {f'u1/{j}': h0s[j].T @ da1, f'u2/{j}': h1s[j].T @ dz}
  return loss, grads


def flat(columns: list[pb.Params]) -> pb.Params:
  return {f'{k}/{name}': p for k, c in enumerate(columns) for name, p in c.items()}


def run(data: dict, init: list[pb.Params]) -> dict:
  xs, ys = data['xs'], data['ys']
  columns = list(init)
  trace, losses, logits = [], [], []
  for t in range(len(xs)):
    for s in range(STEPS):
      loss, grads = loss_and_grad(columns[: t + 1], xs[t, s], ys[t, s])
      columns[t] = pb.sgd(columns[t], grads, LR)
      trace.append(flat(columns))
      losses.append(loss)
    logits.append(np.concatenate(forward(columns, data['probe'])[2], axis=1))
  out = pb.prefixed('params', pb.per_task(trace, len(xs)))
  return out | {'loss': np.array(losses).reshape(-1, STEPS), 'probe_logits': np.stack(logits)}


def main() -> None:
  rng = np.random.default_rng(2102)
  init = init_columns(rng)
  xs, ys = pb.make_tasks(rng, TASKS, STEPS, ROWS)
  data = {'xs': xs, 'ys': ys, 'probe': rng.normal(size=(12, pb.INPUTS))}
  got = run(data, init)
  for _ in range(5):
    stable(got, run(data, [nearby(rng, c) for c in init]))
  # Every array moves in its own task, laterals included, and in no other.
  for key, p in flat(init).items():
    k, values = int(key[0]), got[f'params/{key}']
    start = np.concatenate([p[None], values[:, -1]])
    change = [np.abs(b - a).max() for a, b in zip(start[:-1], start[1:], strict=True)]
    assert change[k] > 1e-2 and all(c == 0 for t, c in enumerate(change) if t != k), (key, change)
  # Logits of finished tasks stay, those of later columns follow the earlier ones.
  z = got['probe_logits']
  assert np.all(z[1:, :, :2] == z[0, :, :2]) and np.all(z[2, :, 2:4] == z[1, :, 2:4])
  assert np.abs(z[0, :, 4:] - z[1, :, 4:]).max() > 1e-2
  out = pb.prefixed('init', flat(init)) | {'lr': LR} | data
  pb.save('pnn', out | pb.prefixed('pnn', got))


if __name__ == '__main__':
  main()
