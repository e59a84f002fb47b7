"""Reference for first-session adaptation with closed-form heads: golden/first_session.npz. NumPy.

Zhou et al. 2024 (IJCV; SimpleCIL, APER), section 4; zhoudw-zdw/RevisitingCIL. RanPAC: McDonnell et al.
2023, alg. 1, with a fixed lambda. Three tasks of two classes; every task is walked through TWICE (two
epochs of the same four batches in the same order). In the first task everything trainable follows the
optimiser on the CE over all 6 outputs; after the first boundary no parameter changes any more, whatever
the momentum or the decay says. At EVERY boundary the features f = h1 [7] of the task's rows are computed
anew with the parameters of then, each row ONCE although there were two epochs, and

  ncm     counts and means of f per class; sq_distance |f - mu_c|^2 and cosine cos(f, mu_c), mu_c the
          mean of the raw features
  merged  ncm on [f0, f] [14], f0 the features of the same rows by the parameters before the first step:
          APER's adapt and merge; ncm above is its adapted half alone
  ranpac  h = relu(f W), W [7,10] given; G += h^T h, C += h^T Y with Y one-hot over 6 classes; head =
          (G + lambda I)^-1 C; logits = h head

Classes not yet seen never win. Rows of the first task are never read again.
Variants of what trains in the first task:
  lora    LoRA on l0/w, l1/w (r = 2, alpha = 3): W + (alpha / r) A B with A [in,r], B [r,out] (0 at
          first), A, B and the head l2 trained, l0/b and l1/b frozen as in lora.npz; plain SGD, lr
  full    all of l0, l1, l2, no LoRA; v <- momentum v + g + decay p, p <- p - lr v, v = 0 at first

Keys. Inputs:
  init/<p> (l0/w ... l2/b, 6 outputs), init/l0/A [6,2], init/l0/B [2,8], init/l1/A [8,2], init/l1/B [2,7];
  xs [3,4,6,6] (task, batch, row), ys [3,4,6], probe [8,6], epochs, lr, r, alpha, momentum, decay, W, lambda
Outputs, V in {lora, full}; first axis task, second step (8: both epochs):
  V/params/<q> [3,8,...]    after every step, <q> what trains in the first task
  V/loss [3,8]              CE at the parameters before the step, in the later tasks too
  V/ncm/counts [3,6], V/ncm/means [3,6,7], V/ncm/sq_distance [3,8,6], V/ncm/cosine [3,8,6] (0 for unseen),
  V/ncm/pred_euclidean [3,8], V/ncm/pred_cosine [3,8]
  V/merged/...              the same six, means [3,6,14]
  V/ranpac/G [3,10,10], V/ranpac/C [3,10,6], V/ranpac/head [3,10,6], V/ranpac/logits [3,8,6],
  V/ranpac/pred [3,8]
"""

from __future__ import annotations

import numpy as np
import problem as pb
from frozen import clear, nearby, stable

TASKS, BATCHES, ROWS, CLASSES, D, M = 3, 4, 6, 6, 7, 10
EPOCHS, LR, R, ALPHA, MOMENTUM, DECAY, LAMBDA = 2, 0.1, 2, 3.0, 0.9, 0.01, 0.5
LAYERS = ('l0', 'l1')


def plain(params: pb.Params) -> pb.Params:
  """The MLP with A B merged, if there is one."""
  out = {k: v for k, v in params.items() if k[-1] in 'wb'}
  for name in LAYERS if 'l0/A' in params else ():
    out[f'{name}/w'] = out[f'{name}/w'] + ALPHA / R * params[f'{name}/A'] @ params[f'{name}/B']
  return out


def features(params: pb.Params, x: pb.Array) -> pb.Array:
  _, a0, _, a1, h1 = pb.forward(plain(params), x)[1]
  clear(a0, a1)
  return h1


def step(
  params: pb.Params, v: pb.Params, x: pb.Array, y: np.ndarray
) -> tuple[float, pb.Params, pb.Params]:
  _, a0, _, a1, _ = pb.forward(plain(params), x)[1]
  clear(a0, a1)
  loss, g = pb.loss_and_grad(plain(params), x, y)
  if 'l0/A' not in params:
    v = {k: MOMENTUM * v[k] + g[k] + DECAY * params[k] for k in v}
    return loss, params | pb.sgd(params, v, LR), v
  grads = {k: g[k] for k in ('l2/w', 'l2/b')}
  for name in LAYERS:
    d = ALPHA / R * g[f'{name}/w']
    grads[f'{name}/A'] = d @ params[f'{name}/B'].T
    grads[f'{name}/B'] = params[f'{name}/A'].T @ d
  return loss, params | {k: params[k] - LR * grads[k] for k in grads}, v


def best(scores: pb.Array, seen: int) -> np.ndarray:
  part = np.sort(scores[:, :seen], axis=1)
  assert (part[:, -1] - part[:, -2]).min() > 1e-4 * np.abs(part).max()
  return scores[:, :seen].argmax(axis=1)


def classify(means: pb.Array, counts: np.ndarray, q: pb.Array, seen: int) -> dict:
  """Distances and cosines of the probe's features q to the means of the first `seen` classes."""
  distance, cosine = np.zeros((2, len(q), CLASSES))
  distance[:, :seen] = ((q[:, None] - means[:seen]) ** 2).sum(-1)
  norms = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(means[:seen], axis=1)
  cosine[:, :seen] = q @ means[:seen].T / norms
  return {
    'counts': counts,
    'means': means,
    'sq_distance': distance,
    'cosine': cosine,
    'pred_euclidean': best(-distance, seen),
    'pred_cosine': best(cosine, seen),
  }


def run(init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array, w: pb.Array) -> dict:
  lora = 'l0/A' in init
  trained = [k for k in init if not lora or k[-1] in 'AB' or k.startswith('l2')]
  params, v = dict(init), {k: np.zeros_like(init[k]) for k in trained}
  counts, means = np.zeros(CLASSES, np.int64), np.zeros((CLASSES, 2 * D))
  g, c = np.zeros((M, M)), np.zeros((M, CLASSES))
  trace, losses, ncm, merged, ranpac = [], [], [], [], []
  for t in range(TASKS):
    for s in range(EPOCHS * BATCHES):
      loss, after, v = step(params, v, xs[t, s % BATCHES], ys[t, s % BATCHES])
      params = after if t == 0 else params
      trace.append({k: params[k] for k in trained})
      losses.append(loss)
    seen = 2 * t + 2
    f, y = features(params, xs[t].reshape(-1, pb.INPUTS)), ys[t].reshape(-1)
    both = np.concatenate([features(init, xs[t].reshape(-1, pb.INPUTS)), f], axis=1)
    counts, means = counts + np.bincount(y, minlength=CLASSES), means.copy()
    for k in (2 * t, 2 * t + 1):
      means[k] = both[y == k].mean(0)
    q = features(params, probe)
    ncm.append(classify(means[:, D:], counts, q, seen))
    merged.append(classify(means, counts, np.concatenate([features(init, probe), q], axis=1), seen))
    h = np.maximum(f @ w, 0.0)
    clear(f @ w, q @ w)
    g, c = g + h.T @ h, c + h.T @ np.eye(CLASSES)[y]
    head = np.linalg.solve(g + LAMBDA * np.eye(M), c)
    logits = np.maximum(q @ w, 0.0) @ head
    entry = {'G': g, 'C': c, 'head': head, 'logits': logits, 'pred': best(logits, seen)}
    ranpac.append(entry)
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  out['loss'] = np.reshape(losses, (TASKS, -1))
  out |= pb.prefixed('ncm', pb.stack(ncm)) | pb.prefixed('merged', pb.stack(merged))
  return out | pb.prefixed('ranpac', pb.stack(ranpac))


def main() -> None:
  rng = np.random.default_rng(1805)
  init = pb.init_params(rng, CLASSES)
  side: pb.Params = {}
  for name in LAYERS:
    fan_in, fan_out = init[f'{name}/w'].shape
    side[f'{name}/A'] = rng.uniform(-1, 1, size=(fan_in, R)) / np.sqrt(fan_in)
    side[f'{name}/B'] = np.zeros((R, fan_out))
  xs, ys = pb.make_tasks(rng, [[0, 1], [2, 3], [4, 5]], BATCHES, ROWS)
  probe, w = rng.normal(size=(8, pb.INPUTS)), rng.normal(size=(D, M))
  out = pb.prefixed('init', init | side) | {'xs': xs, 'ys': ys, 'probe': probe, 'W': w}
  out |= {'epochs': EPOCHS, 'lr': LR, 'r': R, 'alpha': ALPHA, 'momentum': MOMENTUM}
  out |= {'decay': DECAY, 'lambda': LAMBDA}
  for variant, start in (('lora', init | side), ('full', init)):
    arrays = run(start, xs, ys, probe, w)
    again = run(nearby(rng, start), xs, ys, probe, w)
    skip = (
      'ranpac/G',
      'ranpac/C',
      'ncm/sq_distance',
      'merged/sq_distance',
    )  # sums: their size is not 1
    stable({k: a for k, a in arrays.items() if k not in skip}, again)
    out |= pb.prefixed(variant, arrays)
  pb.save('first_session', out)


if __name__ == '__main__':
  main()
