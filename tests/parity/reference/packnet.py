"""Reference for PackNet: golden/packnet.npz.

Mallya & Lazebnik 2018. Every pruned weight matrix has an owner map: 0 free, t (from 1) task t.
Task t, in order:
  1. All free weights become the task's (owner 0 -> t). They start from where pruning left them: 0.
     In task 1 everything is the task's, from the initial values.
  2. Train: the forward pass uses the whole matrix (owners <= t); only owner t moves.
  3. Prune each matrix apart: of its n weights with owner t, the k with the lowest |w| get owner 0
     and value 0.
  4. Retrain the survivors at lr_retrain, pruned weights held at 0.
Rounding and ties: k = floor(fraction n); weights in order of |w|, equal values in order of the
flat (row-major, [in, out]) index, the first k go. The authors' code has k = round(fraction n) and
removes ALL weights <= the k-th value. Every run here has a clear gap at the cut, and fraction 0.5
gives a whole k in every matrix, so only *_floor and *_round depend on the rounding, and only ties/*
on ties.
Biases are trained in task 1 (train AND retrain) and then never again.
Optimiser: v <- momentum v + g, p <- p - lr v, with g masked BEFORE it enters v, and v = 0 at the
start of every phase (train and retrain, each task). So frozen values are exactly constant, also
with momentum. No weight decay.
Inference for task t: weights with owner 0 or owner > t count as 0, biases as they are. After task
2, task 1 answers exactly as after task 1.

Variants:
  simple_sgd, simple_momentum   l0/w, l1/w, l2/w all pruned alike, no heads: both tasks share the 4
                                classes and CE is over all of them. fraction 0.5, momentum 0 or 0.9.
  simple_floor, simple_round    the same, momentum 0, fraction 0.3, k by floor and by round.
  heads_sgd, heads_momentum     l0/w, l1/w pruned; l2 is one head per task: columns (and biases) 0-1
                                of task 1, 2-3 of task 2; a head is not pruned, is trained in both
                                phases of its own task, and is frozen otherwise. CE over the slice
                                (label minus its first class). fraction 0.5.

Keys. Inputs:
  init/<p>, lr, lr_retrain, momentum (of *_momentum), train_steps, retrain_steps, probe [12,6]
  xs_simple [2,7,5,6], ys_simple [2,7,5], xs_heads, ys_heads alike: 4 training, then 3 retraining
  steps per task; fraction, fraction_rounding (of simple_floor and simple_round)
Outputs for every variant V:
  V/params/<p> [2,7,...]        after every step
  V/pruned/<p> [2,...]          right after pruning, before the first retraining step
  V/owner/<w> [2,...]           owner map after the pruning of each task; <w> the pruned matrices
  V/k/<w> [2]                   the number of weights removed
  V/loss [2,7]                  CE at the parameters before the step
  V/probe_logits [2,2,12,C]     [after task, for task (a later task: 0)], C = 4, or 2 with heads
  ties/w [3,4], ties/owner [3,4], ties/fraction: one matrix, current owner 2;
  ties/owner_flat [3,4] after pruning by the rule above, ties/owner_all by the authors' rule
"""

from __future__ import annotations

import numpy as np
import problem as pb

TRAIN, RETRAIN, ROWS = 4, 3, 5
LR, LR_RETRAIN, MOMENTUM, FRACTION, FRACTION_ROUNDING = 0.2, 0.02, 0.9, 0.5, 0.3


def prune(w: pb.Array, owner: np.ndarray, task: int, k: int) -> np.ndarray:
  """The owner map after the k smallest |w| of the task's own weights are given up."""
  own = np.flatnonzero(owner.ravel() == task)
  order = np.argsort(np.abs(w.ravel()[own]), kind='stable')  # ties: the lower flat index first
  out = owner.copy().ravel()
  out[own[order[:k]]] = 0
  return out.reshape(owner.shape)


def gap(w: pb.Array, owner: np.ndarray, task: int, k: int) -> float:
  ranked = np.sort(np.abs(w[owner == task]))
  return float(ranked[k] - ranked[k - 1])


def count(variant: str, n: int) -> int:
  if variant.endswith('round'):
    return round(FRACTION_ROUNDING * n)
  return int(np.floor((FRACTION_ROUNDING if variant.endswith('floor') else FRACTION) * n))


def run(variant: str, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  heads = variant.startswith('heads')
  mu = MOMENTUM if variant.endswith('momentum') else 0.0
  matrices = ['l0/w', 'l1/w'] if heads else ['l0/w', 'l1/w', 'l2/w']
  params = {k: v.copy() for k, v in init.items()}
  owner = {k: np.zeros(params[k].shape, dtype=np.int64) for k in matrices}
  trace, losses, after_prune, owners, ks = [], [], [], [], []
  logits = np.zeros((2, 2, len(probe), 2 if heads else 4))

  def columns(task: int) -> slice:
    return slice(2 * task - 2, 2 * task) if heads else slice(None)

  def masks(task: int) -> pb.Params:
    """1 where a parameter may move."""
    out = {k: (owner[k] == task).astype(float) for k in matrices}
    for k in ('l0/b', 'l1/b', 'l2/b'):
      out[k] = np.full(params[k].shape, float(task == 1))
    if heads:
      for k in ('l2/w', 'l2/b'):
        out[k] = np.zeros(params[k].shape)
        out[k][..., columns(task)] = 1.0
    return out

  def phase(task: int, steps: range, lr: float) -> None:
    nonlocal params
    mask = masks(task)
    velocity = {k: np.zeros_like(v) for k, v in params.items()}
    for s in steps:
      z, cache = pb.forward(params, xs[task - 1, s])
      cols = columns(task)
      dz = np.zeros_like(z)
      loss, dz[:, cols] = pb.cross_entropy(z[:, cols], ys[task - 1, s] - (cols.start or 0))
      grads = pb.backward(params, cache, dz)
      velocity = {k: mu * velocity[k] + grads[k] * mask[k] for k in params}
      moved = pb.sgd(params, velocity, lr)
      for k in params:
        assert np.array_equal(moved[k][mask[k] == 0], params[k][mask[k] == 0])
      params = moved
      trace.append(params)
      losses.append(loss)

  for task in (1, 2):
    for k in matrices:
      owner[k] = np.where(owner[k] == 0, task, owner[k])
    phase(task, range(TRAIN), LR)
    removed = {}
    params = {k: v.copy() for k, v in params.items()}
    for k in matrices:
      n = count(variant, int((owner[k] == task).sum()))
      assert gap(params[k], owner[k], task, n) > 1e-5, (variant, task, k)
      owner[k] = prune(params[k], owner[k], task, n)
      params[k][owner[k] == 0] = 0.0
      removed[k] = np.array(n)
    after_prune.append(params)
    owners.append({k: v.copy() for k, v in owner.items()})
    ks.append(removed)
    phase(task, range(TRAIN, TRAIN + RETRAIN), LR_RETRAIN)
    for of in range(1, task + 1):
      seen = dict(params)
      for k in matrices:
        seen[k] = np.where((owner[k] >= 1) & (owner[k] <= of), params[k], 0.0)
      logits[task - 1, of - 1] = pb.forward(seen, probe)[0][:, columns(of)]
  assert np.array_equal(logits[0, 0], logits[1, 0])  # nothing of task 1 is lost
  out = pb.prefixed('params', pb.per_task(trace, 2)) | pb.prefixed('pruned', pb.stack(after_prune))
  out |= pb.prefixed('owner', pb.stack(owners)) | pb.prefixed('k', pb.stack(ks))
  return out | {'loss': np.reshape(losses, (2, -1)), 'probe_logits': logits}


def ties() -> dict:
  w = np.array([[0.5, -0.25, 0.25, 9.0], [0.25, -1.0, 0.0, -0.25], [0.1, 2.0, -0.25, 0.75]])
  owner = np.array([[2, 2, 2, 1], [2, 2, 1, 2], [1, 2, 2, 2]])
  fraction = 0.4  # of 9 weights: k = 3 by floor, 4 by round
  k = int(np.floor(fraction * (owner == 2).sum()))
  cutoff = np.sort(np.abs(w[owner == 2]))[round(fraction * (owner == 2).sum()) - 1]
  everything = np.where((owner == 2) & (np.abs(w) <= cutoff), 0, owner)
  return {
    'w': w,
    'owner': owner,
    'fraction': fraction,
    'owner_flat': prune(w, owner, 2, k),
    'owner_all': everything,
  }


def main() -> None:
  rng = np.random.default_rng(1706)
  init = pb.init_params(rng)
  steps = TRAIN + RETRAIN
  data = {
    'simple': pb.make_tasks(rng, [[0, 1, 2, 3]] * 2, steps, ROWS),
    'heads': pb.make_tasks(rng, [[0, 1], [2, 3]], steps, ROWS),
  }
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {
    'lr': LR,
    'lr_retrain': LR_RETRAIN,
    'momentum': MOMENTUM,
    'train_steps': TRAIN,
    'retrain_steps': RETRAIN,
    'fraction': FRACTION,
    'probe': probe,
    'fraction_rounding': FRACTION_ROUNDING,
  }
  for name, (xs, ys) in data.items():
    out |= {f'xs_{name}': xs, f'ys_{name}': ys}
  for variant in (
    'simple_sgd',
    'simple_momentum',
    'simple_floor',
    'simple_round',
    'heads_sgd',
    'heads_momentum',
  ):
    out |= pb.prefixed(variant, run(variant, init, *data[variant.split('_')[0]], probe))
  assert any(
    (out[f'simple_floor/k/l{i}/w'] != out[f'simple_round/k/l{i}/w']).any() for i in range(3)
  )
  out |= pb.prefixed('ties', ties())
  pb.save('packnet', out)


if __name__ == '__main__':
  main()
