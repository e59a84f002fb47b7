"""Reference for S-Prompts on the tiny ViT: golden/sprompts.npz. PyTorch float64, gradients by autograd.

Wang, Huang & Hong, NeurIPS 2022 (S-iPrompts: image prompts and a linear head). Every task has a prompt
P [3, 2, 8], put before the embedded sequence without positions, and a head of its own, w [3, 8, 6] and
b [3, 6], with all 6 outputs. In task t

  loss = CE of (feature with P[t]) @ w[t] + b[t]

trains P[t], w[t], b[t]; the others keep their values. They start as given, none is a copy of the task's
before.

At the boundary of task t: the frozen features of the task's rows of weight 1, in the order of training
(each row once), are split by k-means, k = 3. Seeds: the first row, then always the row farthest from its
nearest seed. Then 5 Lloyd iterations: rows join the nearest centroid, centroids become the means of
their rows. A probe row goes to the task of the nearest centroid (Euclidean) among those stored, and is
classified with that task's prompt and head; before the first boundary, with the current task's.

Choices: before the boundary of task t > 0 the tasks 0 .. t - 1 alone have centroids, so `probe_logits`
does not use the current task; `probe_after` does. The authors use k-means of scikit-learn, to the end.

Keys beside those of tiny_vit.py (init/head/* is not used here). Inputs: init/P, init/w, init/b, k, iters,
seeds [3,3]: the rows of the seeds, as step * 5 + row in the arrays of the task.
Outputs: params/<P|w|b>, loss, ce (equal to the loss), probe_logits, probe_after (no variant before them);
  centroids [3,3,8]               of task t, from its boundary
  counts [3,3]                    rows of each centroid in the last assignment before its means
  probe_task, probe_task_after [3,8]   where each row goes
  frozen [3,20,8]                 features of the task's rows (0 for rows of weight 0); frozen_probe [8,8]
"""

from __future__ import annotations

import numpy as np
import problem as pb
import tiny_vit as tv
import torch

LR, LENGTH, K, ITERS = 0.3, 2, 3, 5
TRAINED = ['P', 'w', 'b']


def logits(p: tv.Tensors, x: tv.Tensor, task: tv.Tensor) -> tv.Tensor:
  """Row b with the prompt and the head of task[b]."""
  f = tv.features(p, x, embed=p['P'][task])
  return torch.einsum('bd,bdc->bc', f, p['w'][task]) + p['b'][task]


def nearest(rows: pb.Array, centroids: pb.Array) -> np.ndarray:
  """The nearest centroid of every row; refuses what float32 could turn."""
  d = np.sqrt(((rows[:, None] - centroids) ** 2).sum(-1))
  two = np.sort(d, axis=1)[:, :2]
  assert (two[:, 1] - two[:, 0]).min() > 1e-3
  return d.argmin(1)


def seeding(rows: pb.Array) -> list[int]:
  chosen = [0]
  while len(chosen) < K:
    d = np.sqrt(((rows[:, None] - rows[chosen]) ** 2).sum(-1)).min(1)
    two = np.sort(d)[-2:]
    assert two[1] - two[0] > 1e-3
    chosen.append(int(d.argmax()))
  return chosen


def kmeans(rows: pb.Array, seeds: list[int]) -> tuple[pb.Array, np.ndarray]:
  centroids = rows[seeds]
  counts = np.zeros(K, dtype=np.int64)
  for _ in range(ITERS):
    owner = nearest(rows, centroids)
    counts = np.bincount(owner, minlength=K)
    assert counts.min() > 0
    centroids = np.stack([rows[owner == i].mean(0) for i in range(K)])
  return centroids, counts


def route(q: pb.Array, centroids: list[pb.Array]) -> tv.Tensor:
  """The task of every row; distances of different tasks differ clearly."""
  d = np.stack([np.sqrt(((q[:, None] - c) ** 2).sum(-1)).min(1) for c in centroids], 1)
  if len(centroids) > 1:
    two = np.sort(d, axis=1)[:, :2]
    assert (two[:, 1] - two[:, 0]).min() > 1e-3
  return torch.from_numpy(d.argmin(1))


def run(z: dict, start: tv.Tensors) -> dict:
  p, probe = start, torch.from_numpy(z['probe'])
  q = tv.features(p, probe).numpy()
  rows, after, stored = [], [], []
  for t in range(tv.TASKS):
    for x, y in tv.batches(z, t):

      def objective(p: tv.Tensors, x=x, y=y, t=t):
        ce = torch.nn.functional.cross_entropy(logits(p, x, torch.full((len(x),), t)), y)
        return ce, ce

      p, loss, ce = tv.step(p, TRAINED, objective, LR)
      rows.append((tv.arrays({k: p[k] for k in TRAINED}), loss, ce))
    before = route(q, stored) if stored else torch.full((tv.PROBE,), t)
    valid = z['ws'][t].reshape(-1) > 0
    flat = z['xs'][t].reshape(-1, tv.IMAGE, tv.IMAGE, 1)
    frozen = np.zeros((len(flat), tv.D))
    frozen[valid] = tv.features(p, torch.from_numpy(flat[valid])).numpy()
    seeds = seeding(frozen[valid])
    centroids, counts = kmeans(frozen[valid], seeds)
    stored.append(centroids)
    behind = route(q, stored)
    after.append(
      {
        'seeds': np.flatnonzero(valid)[seeds],
        'frozen': frozen,
        'centroids': centroids,
        'counts': counts,
        'probe_task': before.numpy(),
        'probe_task_after': behind.numpy(),
        'probe_logits': logits(p, probe, before).numpy(),
        'probe_after': logits(p, probe, behind).numpy(),
      }
    )
  return tv.traced(rows) | pb.stack(after) | {'frozen_probe': q}


def main() -> None:
  rng = np.random.default_rng(2418)
  init = tv.init(rng)
  init['P'] = rng.normal(size=(tv.TASKS, LENGTH, tv.D))
  init['w'] = rng.normal(size=(tv.TASKS, tv.D, tv.CLASSES)) * 0.8
  init['b'] = rng.normal(size=(tv.TASKS, tv.CLASSES)) * 0.25
  z = tv.tasks(rng)
  out = pb.prefixed('init', init) | z | {'lr': LR, 'k': K, 'iters': ITERS}
  pb.save('sprompts', out | run(z, tv.tensors(init)))


if __name__ == '__main__':
  main()
