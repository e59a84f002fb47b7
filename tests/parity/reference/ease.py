"""Reference for EASE: golden/ease.npz. PyTorch float64 (training by autograd), then NumPy.

Zhou et al. 2024 (CVPR), eq. 4-10; sun-hailong/CVPR24-Ease (models/ease.py). The frozen ViT of adapter_vit.py
with a parallel adapter per task b = 0, 1, 2 at every feed-forward block: with `middle` the residual stream
that enters the block, before its norm, and `a` its output,

  a + scale up_b(relu(down_b(middle)))        down [d,m], up [m,d] with biases; up and its bias start at 0

f_b are the features with adapter b ALONE. Three tasks of two classes. In task t adapter t and the linear
head (w [8,6], b [6], one for all) are trained by p <- p - lr gradient on the CE over the columns of the
task's two classes; other adapters and the backbone keep their values, other columns have gradient 0. At
boundary t (every row of the task once, parameters of then):

  P[b, c]      mean of f_b over the rows of class c, for the task's classes c and all b = 0 ... t
  p_hat[b, c]  for c of an older task o < b:  sum_j softmax_j(cos(P[o, c], P[o, j])) P[b, j], j over the
               classes of task b. They do not change once task b is over.
  logit_c      sum_{b <= t} weight cos(f_b, P[b, c] or p_hat[b, c]), weight 1 where b is the task of c
               and alpha elsewhere; classes not seen never win

Variants of the classifier (one training): own (above), recalc (j over the classes of ALL tasks b ... t, so
that every boundary makes all p_hat anew, as the authors' `recalc_sim`). Deviations from the authors' code:
it divides the terms with alpha by t, trains a cosine head of the task's own, and may add f of the plain ViT.

Keys. Inputs:
  init/backbone/..., init/head/w [8,6], init/head/b         see adapter_vit.py
  init/adapter/down/w [3,2,8,3] (task, layer, ...), .../down/b [3,2,3], .../up/w [3,2,3,8], .../up/b [3,2,8]
  xs [3,4,6,4,4,1] (task, step, row, image), ys [3,4,6], probe [6,4,4,1], lr, scale, alpha
  image, patch, d, depth, heads, ffn, eps
Outputs (first axis: task or boundary):
  params/adapter/... [3,4,3,...] (all slots), params/head/w, params/head/b [3,4,...]   after every step
  loss [3,4]                        at the parameters before the step
  prototypes [3,3,6,8]              P[b, c] after each boundary, 0 where there is none
  probe_features [3,3,6,8]          f_b of the probe, b <= t (0 beyond)
  V/prototypes [3,3,6,8]            P with p_hat filled in (b <= t, c seen)
  V/logits [3,6,6], V/pred [3,6]    0 for classes not seen
"""

from __future__ import annotations

import adapter_vit as tv
import numpy as np
import problem as pb
import torch
from frozen import clear, stable

TASKS, STEPS, ROWS, CLASSES, M = 3, 4, 6, 6, 3
LR, SCALE, ALPHA = 0.5, 0.5, 0.1


def features(p: tv.Tensors, x: torch.Tensor, b: int) -> torch.Tensor:
  def after_mlp(a: torch.Tensor, middle: torch.Tensor, i: int) -> torch.Tensor:
    z = middle @ p['adapter/down/w'][b, i] + p['adapter/down/b'][b, i]
    clear(z.detach().numpy())
    return a + SCALE * (torch.relu(z) @ p['adapter/up/w'][b, i] + p['adapter/up/b'][b, i])

  return tv.features(p, x, feedforward=after_mlp)


def objective(p: tv.Tensors, x: torch.Tensor, y: torch.Tensor, t: int) -> torch.Tensor:
  z = tv.logits(p, features(p, x, t))[:, 2 * t : 2 * t + 2]
  return torch.nn.functional.cross_entropy(z, y - 2 * t)


def cosine(a: pb.Array, b: pb.Array) -> pb.Array:
  """[n, d] with [m, d]: [n, m]."""
  return a @ b.T / np.outer(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))


def complete(stored: pb.Array, t: int, recalc: bool) -> pb.Array:
  """P with p_hat for every old class under every newer adapter."""
  out = stored.copy()
  for b in range(1, t + 1):
    new = slice(2 * b, 2 * t + 2 if recalc else 2 * b + 2)
    for o in range(b):
      old = slice(2 * o, 2 * o + 2)
      assert not stored[b, old].any()
      share = pb.softmax(cosine(stored[o, old], stored[o, new]))
      out[b, old] = share @ stored[b, new]
  return out


def classify(f: pb.Array, prototypes: pb.Array, t: int) -> tuple[pb.Array, np.ndarray]:
  seen = 2 * t + 2
  out = np.zeros((f.shape[1], CLASSES))
  for b in range(t + 1):
    weight = np.where(np.arange(seen) // 2 == b, 1.0, ALPHA)
    out[:, :seen] += weight * cosine(f[b], prototypes[b, :seen])
  order = np.sort(out[:, :seen], axis=1)
  assert (order[:, -1] - order[:, -2]).min() > 1e-4
  return out, out[:, :seen].argmax(1)


def run(init: tv.Tensors, xs: torch.Tensor, ys: torch.Tensor, probe: torch.Tensor) -> dict:
  trained = [k for k in init if not k.startswith('backbone/')]
  p = dict(init)
  stored = np.zeros((TASKS, CLASSES, tv.D))
  trace, losses, ends = [], [], []
  for t in range(TASKS):
    for s in range(STEPS):
      before, x, y = p, xs[t, s], ys[t, s]
      loss, p = tv.step(p, trained, lambda q, x=x, y=y, t=t: objective(q, x, y, t), LR)
      for k in trained:  # only slot t moves
        others = [b for b in range(TASKS) if b != t]
        assert k.startswith('head/') or torch.equal(p[k][others], before[k][others])
      trace.append(tv.arrays({k: p[k] for k in trained}))
      losses.append(loss)
    stored, f = stored.copy(), np.zeros((TASKS, len(probe), tv.D))
    y = ys[t].reshape(-1).numpy()
    for b in range(t + 1):
      rows = features(p, xs[t].reshape(-1, tv.IMAGE, tv.IMAGE, 1), b).numpy()
      for c in (2 * t, 2 * t + 1):
        stored[b, c] = rows[y == c].mean(0)
      f[b] = features(p, probe, b).numpy()
    entry = {'prototypes': stored, 'probe_features': f}
    for variant in ('own', 'recalc'):
      full = complete(stored, t, variant == 'recalc')
      logits, pred = classify(f, full, t)
      entry |= pb.prefixed(variant, {'prototypes': full, 'logits': logits, 'pred': pred})
    ends.append(entry)
  out = pb.prefixed('params', pb.per_task(trace, TASKS)) | pb.stack(ends)
  return out | {'loss': np.reshape(losses, (TASKS, STEPS))}


def main() -> None:
  rng = np.random.default_rng(1808)
  init = tv.init(rng, CLASSES) | pb.prefixed('adapter', tv.bottleneck(rng, M, TASKS, tv.DEPTH))
  xs, ys = tv.images(rng, [[0, 1], [2, 3], [4, 5]], STEPS, ROWS)
  probe = xs[:, 0, :2].reshape(6, 4, 4, 1) + 0.5 * torch.from_numpy(rng.normal(size=(6, 4, 4, 1)))
  arrays = run(init, xs, ys, probe)
  stable(arrays, run(tv.nearby(rng, init), xs, ys, probe))
  assert np.abs(arrays['own/logits'] - arrays['recalc/logits']).max() > 1e-4
  out = pb.prefixed('init', tv.arrays(init)) | tv.arrays({'xs': xs, 'ys': ys, 'probe': probe})
  out |= {'lr': LR, 'scale': SCALE, 'alpha': ALPHA, 'image': tv.IMAGE, 'patch': tv.PATCH, 'd': tv.D}
  out |= {'depth': tv.DEPTH, 'heads': tv.HEADS, 'ffn': tv.FFN, 'eps': tv.EPS}
  pb.save('ease', out | arrays)


if __name__ == '__main__':
  main()
