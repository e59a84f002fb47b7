"""Reference for the learners without a backward pass: golden/closed_form.npz.

Features x [90, 5] arrive in three tasks of two new classes each (rows task_start[t] to
task_start[t+1]), classes of unequal size. "After task t" is over all rows so far. Classes not yet
seen have mean 0 and never take part in a prediction.

NCM. Class means of the raw features (a running sum and a count).
  euclidean        the class with the least |x - mu|^2
  cosine           the class with the greatest cos(x, mu), mu the mean of the RAW features (SimpleCIL)
  cosine_unit      the same with mu the mean of features scaled to unit length one by one (iCaRL)

SLDA. Hayes & Kanan 2020, eq. 2-4, one row at a time, as the authors' SLDA_Model.fit (no base
initialisation); t is the number of rows before this one, c_y that of its class, mu_y starts at 0:
  D = t/(t+1) (x - mu_y)(x - mu_y)^T with mu_y BEFORE the update;  S <- (t S + D) / (t+1)
  mu_y <- mu_y + (x - mu_y) / (c_y + 1)
The first row of all has t = 0 and adds nothing. The first row of every LATER class adds
t/(t+1) x x^T, not centred: S overestimates the within-class covariance. Two others to compare with:
  welford   D = c_y/(c_y+1) (x - mu_y)(x - mu_y)^T instead. It is exactly
  pooled    1/N sum_n (x_n - mu_{y_n})(x_n - mu_{y_n})^T with the final means (divided by N)
Scores: L = inverse((1 - eps) S + eps I), score_k(x) = x^T L mu_k - mu_k^T L mu_k / 2. Deviation: in
the authors' code a class not yet seen has score 0 and can win; here it cannot.

RanPAC. McDonnell et al. 2023, alg. 1: h = relu(x W) with W [5, M] fixed; after each task
G += H^T H, C += H^T Y with Y one-hot over all 6 classes; head = (G + lambda I)^-1 C [M, 6];
logits = h head.
  fixed      lambda = fixed_lambda
  selected   lambda from 10^-8, 10^-7 ... 10^8 as the authors' optimise_ridge_parameter: with the
             CURRENT task's rows only, the first int(0.8 n) in stored order give G and C of the
             trial head, the others its mean squared error over rows AND all 6 columns; the least
             value wins (clear of the second by 0.1 % here). The head is then solved from G and C
             of ALL tasks and all rows. Columns of classes that the task lacks are 0 in the trial
             head, so a mean over seen columns gives the same choice.

Keys. Inputs:
  x [90,5], y [90], task_start [4], eps, W [5,12], fixed_lambda, probe [15,5]
Outputs ([3,...]: after each task):
  ncm/counts [3,6], ncm/means [3,6,5], ncm/means_unit [3,6,5]
  ncm/sq_distance [3,15,6], ncm/cosine [3,15,6], ncm/cosine_unit [3,15,6]   (0 for unseen classes)
  ncm/pred_euclidean, ncm/pred_cosine, ncm/pred_cosine_unit [3,15]
  slda/sigma [90,5,5]            S after every row
  slda/means [3,6,5], slda/precision [3,5,5] = L, slda/scores [3,15,6] (0 for unseen)
  slda/pred [3,15]
  slda/sigma_welford [90,5,5], slda/pooled [3,5,5]
  slda/scores_welford [3,15,6], slda/pred_welford [3,15]
  ranpac/G [3,12,12], ranpac/C [3,12,6]
  ranpac/head_fixed [3,12,6], ranpac/logits_fixed [3,15,6], ranpac/pred_fixed [3,15]
  ranpac/lambdas [17], ranpac/val_mse [3,17], ranpac/selected [3] (the lambda)
  ranpac/head_selected [3,12,6], ranpac/logits_selected [3,15,6], ranpac/pred_selected [3,15]
"""

from __future__ import annotations

import numpy as np
import problem as pb

D, M, CLASSES, EPS, FIXED = 5, 12, 6, 1e-4, 0.5
SIZES = ((22, 11), (9, 18), (16, 14))  # rows of the two classes of each task
LAMBDAS = np.array([10.0**e for e in range(-8, 9)])


def best(scores: pb.Array, seen: int) -> np.ndarray:
  """Greatest score among the seen classes; refuses a decision that rounding could turn."""
  part = np.sort(scores[:, :seen], axis=1)
  assert (part[:, -1] - part[:, -2]).min() > 1e-6 * np.abs(part).max()
  return scores[:, :seen].argmax(axis=1)


def ncm(x: pb.Array, y: np.ndarray, ends: list[int], probe: pb.Array) -> dict:
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  rows = []
  for t, end in enumerate(ends):
    seen = 2 * t + 2
    means, means_unit = np.zeros((CLASSES, D)), np.zeros((CLASSES, D))
    dist, cos, cos_unit = (np.zeros((len(probe), CLASSES)) for _ in range(3))
    counts = np.bincount(y[:end], minlength=CLASSES)
    for k in range(seen):
      means[k] = x[:end][y[:end] == k].mean(0)
      means_unit[k] = unit[:end][y[:end] == k].mean(0)
      dist[:, k] = ((probe - means[k]) ** 2).sum(1)
      length = np.linalg.norm(probe, axis=1)
      cos[:, k] = probe @ means[k] / (length * np.linalg.norm(means[k]))
      cos_unit[:, k] = probe @ means_unit[k] / (length * np.linalg.norm(means_unit[k]))
    rows.append(
      {
        'counts': counts,
        'means': means,
        'means_unit': means_unit,
        'sq_distance': dist,
        'cosine': cos,
        'cosine_unit': cos_unit,
        'pred_euclidean': best(-dist, seen),
        'pred_cosine': best(cos, seen),
        'pred_cosine_unit': best(cos_unit, seen),
      }
    )
  return pb.stack(rows)


def slda(x: pb.Array, y: np.ndarray, ends: list[int], probe: pb.Array) -> dict:
  means, counts = np.zeros((CLASSES, D)), np.zeros(CLASSES)
  sigma, welford = np.zeros((D, D)), np.zeros((D, D))
  sigmas, welfords, after = [], [], []
  for t, (row, k) in enumerate(zip(x, y, strict=True)):
    outer = np.outer(row - means[k], row - means[k])
    sigma = (t * sigma + t / (t + 1) * outer) / (t + 1)
    welford = (t * welford + counts[k] / (counts[k] + 1) * outer) / (t + 1)
    means = means.copy()
    means[k] += (row - means[k]) / (counts[k] + 1)
    counts[k] += 1
    sigmas.append(sigma)
    welfords.append(welford)
    if t + 1 in ends:
      seen = 2 * ends.index(t + 1) + 2
      centred = x[: t + 1] - means[y[: t + 1]]
      pooled = centred.T @ centred / (t + 1)
      assert np.allclose(pooled, welford, rtol=1e-12, atol=1e-12)
      entry = {'means': means, 'pooled': pooled}
      for suffix, s in (('', sigma), ('_welford', welford)):
        precision = np.linalg.inv((1 - EPS) * s + EPS * np.eye(D))
        scores = probe @ precision @ means.T - 0.5 * np.diag(means @ precision @ means.T)
        scores[:, seen:] = 0.0
        entry |= {f'scores{suffix}': scores, f'pred{suffix}': best(scores, seen)}
        if not suffix:
          entry['precision'] = precision
      after.append(entry)
  return pb.stack(after) | {'sigma': np.stack(sigmas), 'sigma_welford': np.stack(welfords)}


def ridge(g: pb.Array, c: pb.Array, lam: float) -> pb.Array:
  return np.asarray(np.linalg.solve(g + lam * np.eye(len(g)), c), dtype=np.float64)


def ranpac(x: pb.Array, y: np.ndarray, ends: list[int], probe: pb.Array, w: pb.Array) -> dict:
  h, onehot, hp = np.maximum(x @ w, 0), np.eye(CLASSES)[y], np.maximum(probe @ w, 0)
  g, c = np.zeros((M, M)), np.zeros((M, CLASSES))
  rows = []
  start = 0
  for t, end in enumerate(ends):
    ht, yt = h[start:end], onehot[start:end]
    g, c = g + ht.T @ ht, c + ht.T @ yt
    cut = int(0.8 * len(ht))
    trial_g, trial_c = ht[:cut].T @ ht[:cut], ht[:cut].T @ yt[:cut]
    mse = np.array(
      [((ht[cut:] @ ridge(trial_g, trial_c, lam) - yt[cut:]) ** 2).mean() for lam in LAMBDAS]
    )
    order = np.sort(mse)
    assert 0 < mse.argmin() < len(LAMBDAS) - 1 and order[1] > order[0] * 1.001
    chosen = LAMBDAS[mse.argmin()]
    entry = {'G': g, 'C': c, 'val_mse': mse, 'selected': chosen}
    for name, lam in (('fixed', FIXED), ('selected', chosen)):
      head = ridge(g, c, lam)
      entry |= {
        f'head_{name}': head,
        f'logits_{name}': hp @ head,
        f'pred_{name}': best(hp @ head, 2 * t + 2),
      }
    rows.append(entry)
    start = end
  return pb.stack(rows) | {'lambdas': LAMBDAS}


def main() -> None:
  rng = np.random.default_rng(1707)
  mix = rng.normal(size=(D, D)) * 0.5 + np.eye(D)  # a within-class covariance that is not round
  xs, ys = [], []
  for t, sizes in enumerate(SIZES):
    y = rng.permutation(np.repeat([2 * t, 2 * t + 1], sizes))
    centres = rng.normal(size=(2, D)) * 1.5 + 0.5
    xs.append(centres[y - 2 * t] + rng.normal(size=(len(y), D)) @ mix)
    ys.append(y)
  x, y = np.concatenate(xs), np.concatenate(ys)
  ends = np.cumsum([sum(s) for s in SIZES]).tolist()
  probe = x[rng.choice(len(x), 15, replace=False)] + rng.normal(size=(15, D)) * 0.5
  w = rng.normal(size=(D, M))
  out = {
    'x': x,
    'y': y,
    'task_start': [0, *ends],
    'eps': EPS,
    'W': w,
    'fixed_lambda': FIXED,
    'probe': probe,
  }
  out |= pb.prefixed('ncm', ncm(x, y, ends, probe))
  out |= pb.prefixed('slda', slda(x, y, ends, probe))
  out |= pb.prefixed('ranpac', ranpac(x, y, ends, probe, w))
  pb.save('closed_form', out)


if __name__ == '__main__':
  main()
