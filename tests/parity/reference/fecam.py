"""Reference for FeCAM: golden/fecam.npz. NumPy.

Goswami et al. 2023 (NeurIPS), eq. 4-9; dipamgoswami/FeCAM (models/base.py). Features x [88, 5] of both
signs arrive in three tasks of two new classes each. With g(x) = sign(x) |x|^tukey entry by entry:

  mu_c    mean of g(x) over the rows of class c
  S_c     unbiased covariance (n_c - 1) of g(x) over these rows
  K_c     S_c + g1 V1 I + g2 V2 (1 - I), V1 the mean of the D diagonal entries of S_c, V2 the mean of
          the D (D - 1) others; 1 is the matrix of ones
  N_c     K_c[i, j] / sqrt(K_c[i, i] K_c[j, j])
  d_c(x)  (u - v_c)^T N_c^-1 (u - v_c), u = g(x) / |g(x)|, v_c = mu_c / |mu_c|
  logit_c = -d_c; the prediction is the greatest among the classes seen
Variants:
  per_class   as above
  weights     g1, g2 = 2, 0.5 (with g2 > g1, K_c may have negative eigenvalues)
  raw         tukey = 1, so g is the identity
  twice       V1, V2 of K_c, added to K_c once more before it is normalised (the authors' code)
  common      one S for all: the plain mean of S_c over the classes seen
  pooled      one S for all: sum (n_c - 1) S_c / sum (n_c - 1) over the classes seen
In `common` and `pooled` shrinking and normalising follow the averaging (a mean of shrunk matrices is
the shrunk mean). Deviations from the authors' code: it shrinks twice, takes g of the mean of x (not the
mean of g(x)), a power without the sign (features behind a ReLU), V2 over the entries that are not 0,
and uses all this from the second task on only (Euclidean in the first).

Keys. Inputs:
  x [88,5], y [88], task_start [4] (task t has rows task_start[t] to task_start[t+1]), probe [12,5]
Outputs, V a variant; [3,...] after each task; entries of classes not seen are 0:
  V/tukey, V/g1, V/g2
  V/means [6,5], V/covariances [6,5,5]   of the transformed features (no class comes twice)
  V/normalised [3,6,5,5] N_c (the same for all seen classes in `common`, `pooled`)
  V/logits [3,12,6], V/pred [3,12]
"""

from __future__ import annotations

import numpy as np
import problem as pb

D, CLASSES = 5, 6
SIZES = ((22, 9), (11, 18), (16, 12))  # rows of the two classes of each task
VARIANTS = {
  'per_class': (0.5, 1.0, 1.0),
  'weights': (0.5, 2.0, 0.5),
  'raw': (1.0, 1.0, 1.0),
  'twice': (0.5, 1.0, 1.0),
  'common': (0.5, 1.0, 1.0),
  'pooled': (0.5, 1.0, 1.0),
}


def shrink(s: pb.Array, g1: float, g2: float) -> pb.Array:
  v1 = np.trace(s) / D
  v2 = (s.sum() - np.trace(s)) / (D * (D - 1))
  return s + g1 * v1 * np.eye(D) + g2 * v2 * (1 - np.eye(D))


def unit(x: pb.Array) -> pb.Array:
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def run(variant: str, x: pb.Array, y: np.ndarray, probe: pb.Array) -> dict:
  tukey, g1, g2 = VARIANTS[variant]
  power = lambda a: np.sign(a) * np.abs(a) ** tukey  # noqa: E731
  g = power(x)
  counts = np.bincount(y)
  means = np.stack([g[y == c].mean(0) for c in range(CLASSES)])
  cov = np.zeros((CLASSES, D, D))
  for c in range(CLASSES):
    centred = g[y == c] - means[c]
    cov[c] = centred.T @ centred / (counts[c] - 1)
  normalised = np.zeros((3, CLASSES, D, D))
  logits = np.zeros((3, len(probe), CLASSES))
  pred = np.zeros((3, len(probe)), np.int64)
  for t in range(3):
    seen = 2 * t + 2
    use = cov[:seen]
    if variant in ('common', 'pooled'):
      weight = np.ones(seen) if variant == 'common' else counts[:seen] - 1.0
      use = np.tile(np.einsum('c,cij->ij', weight, use) / weight.sum(), (seen, 1, 1))
    for c in range(seen):
      k = shrink(use[c], g1, g2)
      k = shrink(k, g1, g2) if variant == 'twice' else k
      root = np.sqrt(np.diag(k))
      normalised[t, c] = k / np.outer(root, root)
      assert np.linalg.eigvalsh(normalised[t, c]).min() > 0.05
      gap = unit(power(probe)) - unit(means[c])
      logits[t, :, c] = -np.einsum('nd,nd->n', gap, np.linalg.solve(normalised[t, c], gap.T).T)
    pred[t] = logits[t, :, :seen].argmax(1)
    order = np.sort(logits[t, :, :seen], axis=1)
    assert (order[:, -1] - order[:, -2]).min() > 1e-4
  return {
    'tukey': tukey,
    'g1': g1,
    'g2': g2,
    'means': means,
    'covariances': cov,
    'normalised': normalised,
    'logits': logits,
    'pred': pred,
  }


def main() -> None:
  rng = np.random.default_rng(1803)
  xs, ys = [], []
  for t, sizes in enumerate(SIZES):
    y = rng.permutation(np.repeat([2 * t, 2 * t + 1], sizes))
    x = np.zeros((len(y), D))
    for c in (2 * t, 2 * t + 1):  # every class has a centre and a shape of its own
      mix = rng.normal(size=(D, D)) * 0.4 + np.eye(D) * 0.7
      here = y == c
      x[here] = rng.normal(size=D) * 1.2 + rng.normal(size=(here.sum(), D)) @ mix
    xs.append(x)
    ys.append(y)
  x, y = np.concatenate(xs), np.concatenate(ys)
  probe = x[rng.choice(len(x), 12, replace=False)] + rng.normal(size=(12, D)) * 0.3
  start = [0, *np.cumsum([sum(s) for s in SIZES]).tolist()]
  assert min(np.abs(x).min(), np.abs(probe).min()) > 1e-4  # |x|^0.5 is steep at 0
  out = {'x': x, 'y': y, 'task_start': start, 'probe': probe}
  for variant in VARIANTS:
    out |= pb.prefixed(variant, run(variant, x, y, probe))
  preds = np.stack([out[f'{v}/pred'] for v in VARIANTS])
  assert len(np.unique(preds.reshape(len(VARIANTS), -1), axis=0)) > 2
  pb.save('fecam', out)


if __name__ == '__main__':
  main()
