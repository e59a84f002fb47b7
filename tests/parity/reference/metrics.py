"""Reference for continual-learning metrics: golden/metrics.npz.

R[t, i] is the accuracy on task i after training on task t (both from 0 here), T tasks; b[i] is the
accuracy on task i at the random initialisation.
  acc                  mean_i R[T-1, i] (Lopez-Paz & Ranzato 2017)
  bwt                  mean over i < T-1 of R[T-1, i] - R[i, i] (the same)
  fwt                  mean over i > 0 of R[i-1, i] - b[i] (the same)
  forgetting           mean over i < T-1 of max_{t < T-1} R[t, i] - R[T-1, i] (Chaudhry et al. 2018)
                       The maximum leaves the final row out, so the value can be negative. It runs
                       over ALL earlier rows, also those before task i was learned, as published.
  forgetting_from_i    the same with the maximum over i <= t < T-1 only
  learning_accuracy    mean_i R[i, i] (Riemer et al. 2019)
  average_incremental  mean_t of mean_{i <= t} R[t, i], the first task included
With T = 1 the means over no task are not defined; 0.0 is stored as a convention, not as a result.

Keys: for every case V: V/R [T,T], V/b [T] (inputs) and V/<metric> (outputs).
  random5   uniform entries, T = 5
  typical5  learning, then forgetting, T = 5
  early5    typical5, but the best accuracy on task 2 came before it was learned (row 0): forgetting
            and forgetting_from_i differ
  gain3     later tasks improve earlier ones: negative forgetting, positive bwt
  two, one  T = 2 and T = 1
"""

from __future__ import annotations

import numpy as np
import problem as pb


def metrics(r: pb.Array, b: pb.Array) -> dict:
  """By plain loops, one term at a time."""
  n = len(r)
  acc = sum(r[n - 1][i] for i in range(n)) / n
  learning = sum(r[i][i] for i in range(n)) / n
  incremental = sum(sum(r[t][i] for i in range(t + 1)) / (t + 1) for t in range(n)) / n
  bwt = fwt = forgetting = forgetting_from = 0.0
  for i in range(n - 1):
    bwt += (r[n - 1][i] - r[i][i]) / (n - 1)
    forgetting += (max(r[t][i] for t in range(n - 1)) - r[n - 1][i]) / (n - 1)
    forgetting_from += (max(r[t][i] for t in range(i, n - 1)) - r[n - 1][i]) / (n - 1)
  for i in range(1, n):
    fwt += (r[i - 1][i] - b[i]) / (n - 1)
  return {
    'acc': acc,
    'bwt': bwt,
    'fwt': fwt,
    'forgetting': forgetting,
    'forgetting_from_i': forgetting_from,
    'learning_accuracy': learning,
    'average_incremental': incremental,
  }


def main() -> None:
  rng = np.random.default_rng(1709)
  typical = rng.uniform(0.15, 0.3, size=(5, 5))
  for i in range(5):
    for t in range(i, 5):
      typical[t, i] = 0.95 - 0.08 * (t - i) - 0.03 * rng.uniform()
  early = typical.copy()
  early[0, 2] = 0.99
  gain = np.array([[0.6, 0.3, 0.2], [0.7, 0.65, 0.35], [0.8, 0.75, 0.7]])
  cases = {
    'random5': (rng.uniform(size=(5, 5)), rng.uniform(size=5)),
    'typical5': (typical, rng.uniform(0.05, 0.15, size=5)),
    'early5': (early, rng.uniform(0.05, 0.15, size=5)),
    'gain3': (gain, np.array([0.1, 0.25, 0.1])),
    'two': (rng.uniform(size=(2, 2)), rng.uniform(size=2)),
    'one': (np.array([[0.75]]), np.array([0.1])),
  }
  out = {}
  for name, (r, b) in cases.items():
    out |= pb.prefixed(name, {'R': r, 'b': b} | metrics(r, b))
  assert out['gain3/forgetting'] < 0 < out['gain3/bwt']
  assert out['early5/forgetting'] > out['early5/forgetting_from_i']
  pb.save('metrics', out)


if __name__ == '__main__':
  main()
