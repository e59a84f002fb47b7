"""Reference for SLCA's classifier alignment: golden/slca.npz. NumPy, gradients by hand.

Zhang et al. 2023 (ICCV), eq. 1-4; GengDavid/SLCA (models/slca.py). The features f [7] are h1 of the MLP
of problem.py with l0 and l1 frozen throughout. Three tasks of two classes; within a task the head
l2/w, l2/b is trained on the task's batches by plain SGD (lr), the CE over all 6 outputs. At a boundary

1. mean mu_c and unbiased covariance S_c of f over the rows of the two classes just finished, each row
   once; those of earlier classes stay as they are;
2. the head alone is trained for K = epochs * chunks steps on x_cj = mu_c + z_cj root_c^T, with
   root_c root_c^T = S_c + jitter I and z standard normal, drawn anew for every boundary and epoch and
   given (`normals`, first axes boundary, epoch, class, sample). Each step has P / chunks samples
   (P = per_class) of EVERY class seen, samples j of chunk k are k P / chunks ... (k + 1) P / chunks - 1;
3. its loss is the mean CE over the classes SEEN of  z / (tau |z|_2), where z are the logits of the
   classes seen and the norm is over them too;
4. v <- momentum v + gradient, p <- p - lr_k v, with v = 0 at first at every boundary and
   lr_k = lr_align (1 + cos(pi k / K)) / 2 for k = 0 ... K - 1 over the steps of this boundary.
   No decay. Outputs of classes not seen do not move.
Variants: one (chunks = 1: one step an epoch on all samples; root_c is the lower Cholesky factor), chunks
(chunks = 2), symmetric (chunks = 1; root_c the symmetric positive root), later (`one` without steps 2-4
at the first boundary, as the authors' `if self._cur_task > 0`).
Deviations from the authors' code: they draw minibatches from a permutation of all samples, decay by 5e-4,
lower the rate by the epoch, shrink the means of old tasks, divide by the mean of the norms per task plus
1e-7, take the CE over the current task's classes in a task, and train the backbone slowly.

Keys. Inputs:
  init/<p> (l0/w ... l2/b, 6 outputs); xs [3,6,6,6] (task, step, row), ys [3,6,6], probe [8,6]
  normals [3,4,6,8,7] (those of classes not seen are not read); lr, jitter, tau, lr_align, momentum
Outputs:
  means [6,7], covariances [6,7,7] (without jitter)
and for every variant V:
  V/chunks
  V/params/l2/w, V/params/l2/b [3,6,...]   after every step of the tasks (the last: before the boundary)
  V/loss [3,6]
  V/aligned/l2/w, V/aligned/l2/b [3,K,...] after every step of the alignment ([:, -1]: what goes on)
  V/align_loss [3,K]                       at the parameters before the step (`later`: 0 at first)
  V/probe_logits [3,8,6]                   after each boundary
"""

from __future__ import annotations

import numpy as np
import problem as pb
from frozen import clear, nearby, stable

TASKS, STEPS, ROWS, CLASSES, D = 3, 6, 6, 6, 7
LR, JITTER, TAU, LR_ALIGN, MOMENTUM = 0.2, 1e-4, 0.1, 0.01, 0.9
EPOCHS, PER_CLASS = 4, 8
HEAD = ('l2/w', 'l2/b')


def features(params: pb.Params, x: pb.Array) -> pb.Array:
  _, a0, _, a1, h1 = pb.forward(params, x)[1]
  clear(a0, a1)
  return h1


def normalised_ce(z: pb.Array, y: np.ndarray) -> tuple[float, pb.Array]:
  """Mean CE of z / (tau |z|), and its derivative by z."""
  norm = np.linalg.norm(z, axis=1, keepdims=True)
  assert norm.min() > 0.05
  unit = z / norm
  loss, d = pb.cross_entropy(unit / TAU, y)
  d = d / TAU
  return loss, (d - unit * (d * unit).sum(1, keepdims=True)) / norm


def align(
  head: pb.Params, roots: pb.Array, means: pb.Array, normals: pb.Array, chunks: int
) -> tuple[list[pb.Params], list[float]]:
  """normals [epochs, classes seen, per_class, D]; roots and means of the classes seen."""
  seen, size, steps = len(means), PER_CLASS // chunks, EPOCHS * chunks
  v = {k: np.zeros_like(p) for k, p in head.items()}
  trace, losses = [], []
  for k in range(steps):
    epoch, chunk = divmod(k, chunks)
    z = normals[epoch, :, chunk * size : (chunk + 1) * size]
    x = (means[:, None] + np.einsum('cjd,ced->cje', z, roots)).reshape(-1, D)
    y = np.repeat(np.arange(seen), size)
    logits = x @ head['l2/w'] + head['l2/b']
    d = np.zeros_like(logits)
    loss, d[:, :seen] = normalised_ce(logits[:, :seen], y)
    g = {'l2/w': x.T @ d, 'l2/b': d.sum(0)}
    v = {n: MOMENTUM * v[n] + g[n] for n in HEAD}
    head = pb.sgd(head, v, LR_ALIGN * (1 + np.cos(np.pi * k / steps)) / 2)
    trace.append(head)
    losses.append(loss)
  return trace, losses


def run(
  variant: str, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array, normals: pb.Array
) -> tuple[dict, dict]:
  chunks = 2 if variant == 'chunks' else 1
  params = dict(init)
  means, cov, roots = np.zeros((CLASSES, D)), np.zeros((CLASSES, D, D)), np.zeros((CLASSES, D, D))
  trace, losses, aligned, align_losses, logits = [], [], [], [], []
  for t in range(TASKS):
    for s in range(STEPS):
      f = features(params, xs[t, s])
      loss, d = pb.cross_entropy(f @ params['l2/w'] + params['l2/b'], ys[t, s])
      grads = {'l2/w': f.T @ d, 'l2/b': d.sum(0)}
      params = params | {k: params[k] - LR * grads[k] for k in HEAD}
      trace.append({k: params[k] for k in HEAD})
      losses.append(loss)
    f, y = features(params, xs[t].reshape(-1, pb.INPUTS)), ys[t].reshape(-1)
    for c in (2 * t, 2 * t + 1):
      rows = f[y == c]
      assert len(rows) > D
      means[c] = rows.mean(0)
      cov[c] = (rows - means[c]).T @ (rows - means[c]) / (len(rows) - 1)
      full = cov[c] + JITTER * np.eye(D)
      values, vectors = np.linalg.eigh(full)
      symmetric = (vectors * np.sqrt(values)) @ vectors.T
      roots[c] = symmetric if variant == 'symmetric' else np.linalg.cholesky(full)
    head, seen = {k: params[k] for k in HEAD}, 2 * t + 2
    if variant == 'later' and t == 0:
      steps, values = [head] * (EPOCHS * chunks), [0.0] * (EPOCHS * chunks)
    else:
      steps, values = align(head, roots[:seen], means[:seen], normals[t, :, :seen], chunks)
    params = params | steps[-1]
    aligned += steps
    align_losses += values
    logits.append(pb.forward(params, probe)[0])
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  out |= pb.prefixed('aligned', pb.per_task(aligned, TASKS))
  out |= {
    'chunks': chunks,
    'loss': np.reshape(losses, (TASKS, -1)),
    'align_loss': np.reshape(align_losses, (TASKS, -1)),
    'probe_logits': np.stack(logits),
  }
  return {'means': means, 'covariances': cov}, out


def main() -> None:
  rng = np.random.default_rng(1804)
  init = pb.init_params(rng, CLASSES)
  xs, ys = pb.make_tasks(rng, [[0, 1], [2, 3], [4, 5]], STEPS, ROWS)
  probe = rng.normal(size=(8, pb.INPUTS))
  normals = rng.normal(size=(TASKS, EPOCHS, CLASSES, PER_CLASS, D))
  out = pb.prefixed('init', init) | {'xs': xs, 'ys': ys, 'probe': probe, 'normals': normals}
  out |= {'lr': LR, 'jitter': JITTER, 'tau': TAU, 'lr_align': LR_ALIGN, 'momentum': MOMENTUM}
  for v in ('one', 'chunks', 'symmetric', 'later'):
    statistics, arrays = run(v, init, xs, ys, probe, normals)
    stable(arrays, run(v, nearby(rng, init), xs, ys, probe, normals)[1])
    out |= statistics | pb.prefixed(v, arrays)
  pb.save('slca', out)


if __name__ == '__main__':
  main()
