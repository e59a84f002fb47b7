"""Reference for Learning without Forgetting: golden/lwf.npz.

Li & Hoiem 2016, eq. 1-4, with their temperature T and no warm-up of a new head. At every boundary
a snapshot of the whole network is taken; from the second task on, the snapshot's logits z_old on
the CURRENT batch are the soft targets. With softmax_T(z) = softmax(z / T):

  KD(z_old, z) = mean over rows of -sum_c softmax_T(z_old)_c log softmax_T(z)_c

It is a cross-entropy (not a divergence: its minimum is not 0), a SUM over classes and a mean over
rows. Its gradient by z is (softmax_T(z) - softmax_T(z_old)) / (T rows), so T^2 makes its size
independent of T.

Variants (lam, T stored; the first task has CE only):
  single      3 tasks sharing 4 classes: CE over all logits + lam T^2 KD over all logits.
  multihead   2 tasks, classes 0-1 and 2-3 of 4 outputs: CE over the current head's slice (label
              minus the head's first class) + lam T^2 sum over the old heads of KD within the head's
              slice. The snapshot is that of the last boundary for all old heads.
  multihead3  the same with 3 tasks, classes 0-1, 2-3, 4-5 of 6 outputs (init6): two old heads in
              task 3.
  ci          class-incremental, 2 tasks, 4 outputs, as in van de Ven & Tolias 2019: in task t
              loss = 1/t CE(over the classes seen so far) + (1 - 1/t) T^2 KD, where the targets are
              a softmax_T over the OLD classes, 0 for the new ones, against log softmax_T over all
              classes seen so far, the current ones included. No lam.
  ci3         the same with 3 tasks and 6 outputs (init6).
  ci3_now     ci3 in the form of the present code of GMvandeVen/continual-learning for LwF:
              CE + KD, both with weight 1 and no T^2.
  heads3_mean, ci3_mean
              multihead3 and ci3 with KD a mean over classes, and over the old heads, as in van de Ven
              & Tolias 2019: 1/t CE + (1 - 1/t) T^2 KD. The mean of ci3 is over all classes seen.
Deviations and history: the form `ci` is that repository between May 2019 (commit 26f00db) and 2022;
before, its KD was a mean over classes as well (ci3_mean); since August 2022 (df9f983) it has no T^2, and LwF
there is weighted CE + KD (class- and task-incremental: CE + sum over old heads of KD).

Keys. Inputs:
  init/<p>, init6/<p>        initial parameters (4 and 6 outputs)
  xs_single [3,5,5,6] ys_single [3,5,5]; xs_split [3,5,5,6] ys_split [3,5,5] (task t: classes 2t,
  2t+1; the two-task variants use the first two); probe [12,6]; lr, lam, T
Outputs for every variant V (K tasks, C outputs):
  V/params/<p> [K,5,...]     parameters after every step
  V/loss [K,5]               what the step minimises, at the parameters before it
  V/ce [K,5], V/kd [K,5]     CE and the plain KD (without weights, lam or T^2; summed over the old
                             heads, or their mean; 0 in the first task)
  V/probe_logits [K,12,C]    all logits after each task
The snapshot of boundary k is V/params/<p>[k, -1].
"""

from __future__ import annotations

import numpy as np
import problem as pb

STEPS, ROWS = 5, 5
LR, LAM, T = 0.2, 1.5, 2.0


def kd(z: pb.Array, targets: pb.Array) -> tuple[float, pb.Array]:
  """KD of logits z [n,C] against target probabilities [n,C] at T; and its derivative by z."""
  logp = pb.log_softmax(z / T)
  return float(-(targets * logp).sum() / len(z)), (np.exp(logp) - targets) / (T * len(z))


def objective(
  variant: str, task: int, z: pb.Array, z_old: pb.Array | None, y: np.ndarray
) -> tuple[float, float, float, pb.Array]:
  """(loss, ce, kd, derivative of the loss by all logits z). `task` counts from 0."""
  dz = np.zeros_like(z)
  distil = 0.0
  if variant == 'single':
    ce, dz = pb.cross_entropy(z, y)
    if z_old is None:
      return ce, ce, 0.0, dz
    distil, d = kd(z, pb.softmax(z_old / T))
    return ce + LAM * T**2 * distil, ce, distil, dz + LAM * T**2 * d

  if variant.startswith('multihead'):
    own = slice(2 * task, 2 * task + 2)
    ce, dz[:, own] = pb.cross_entropy(z[:, own], y - 2 * task)
    if z_old is None:
      return ce, ce, 0.0, dz
    for head in range(task):
      cols = slice(2 * head, 2 * head + 2)
      value, d = kd(z[:, cols], pb.softmax(z_old[:, cols] / T))
      distil += value
      dz[:, cols] += LAM * T**2 * d
    return ce + LAM * T**2 * distil, ce, distil, dz

  if variant == 'heads3_mean':
    own, rest = slice(2 * task, 2 * task + 2), 1 - 1 / (task + 1)
    ce, d = pb.cross_entropy(z[:, own], y - 2 * task)
    dz[:, own] = d / (task + 1)
    if z_old is None:
      return ce, ce, 0.0, dz
    for head in range(task):
      cols = slice(2 * head, 2 * head + 2)
      value, d = kd(z[:, cols], pb.softmax(z_old[:, cols] / T))
      distil += value / 2 / task
      dz[:, cols] += rest * T**2 * d / 2 / task
    return ce / (task + 1) + rest * T**2 * distil, ce, distil, dz

  seen, old = 2 * task + 2, 2 * task
  ce, dce = pb.cross_entropy(z[:, :seen], y)
  if z_old is None:
    dz[:, :seen] = dce
    return ce, ce, 0.0, dz
  targets = np.zeros((len(z), seen))
  targets[:, :old] = pb.softmax(z_old[:, :old] / T)
  distil, d = kd(z[:, :seen], targets)
  if variant == 'ci3_mean':
    distil, d = distil / seen, d / seen
  w_ce, w_kd = (1.0, 1.0) if variant == 'ci3_now' else (1 / (task + 1), (1 - 1 / (task + 1)) * T**2)
  dz[:, :seen] = w_ce * dce + w_kd * d
  return w_ce * ce + w_kd * distil, ce, distil, dz


def run(variant: str, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  tasks = len(xs)
  params, snapshot = dict(init), None
  trace, rows, logits = [], [], []
  for t in range(tasks):
    for s in range(STEPS):
      z, cache = pb.forward(params, xs[t, s])
      z_old = None if snapshot is None else pb.forward(snapshot, xs[t, s])[0]
      loss, ce, distil, dz = objective(variant, t, z, z_old, ys[t, s])
      params = pb.sgd(params, pb.backward(params, cache, dz), LR)
      trace.append(params)
      rows.append((loss, ce, distil))
    snapshot = params
    logits.append(pb.forward(params, probe)[0])
  loss, ce, distil = np.array(rows).T.reshape(3, tasks, STEPS)
  out = pb.prefixed('params', pb.per_task(trace, tasks))
  return out | {'loss': loss, 'ce': ce, 'kd': distil, 'probe_logits': np.stack(logits)}


def main() -> None:
  rng = np.random.default_rng(1702)
  init, init6 = pb.init_params(rng), pb.init_params(rng, classes=6)
  xs_single, ys_single = pb.make_tasks(rng, [[0, 1, 2, 3]] * 3, STEPS, ROWS)
  xs_split, ys_split = pb.make_tasks(rng, [[0, 1], [2, 3], [4, 5]], STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init) | pb.prefixed('init6', init6)
  out |= {
    'xs_single': xs_single,
    'ys_single': ys_single,
    'xs_split': xs_split,
    'ys_split': ys_split,
    'probe': probe,
    'lr': LR,
    'lam': LAM,
    'T': T,
  }
  out |= pb.prefixed('single', run('single', init, xs_single, ys_single, probe))
  for variant in ('multihead', 'ci'):
    out |= pb.prefixed(variant, run(variant, init, xs_split[:2], ys_split[:2], probe))
  for variant in ('multihead3', 'ci3', 'ci3_now', 'heads3_mean', 'ci3_mean'):
    out |= pb.prefixed(variant, run(variant, init6, xs_split, ys_split, probe))
  pb.save('lwf', out)


if __name__ == '__main__':
  main()
