"""Reference for Incremental Moment Matching: golden/imm.npz.

Lee et al. 2017 (NeurIPS), sections 3.1, 3.2 and 4.2 (L2-transfer). Three tasks that share all four
classes. Training is that of `l2.py` with a coefficient of its own: plain SGD on
CE + coef/2 sum_i (theta_i - theta_{t-1,i})^2 from the second task on, theta_{t-1} = the TRAINED
parameters of the task before, from which task t also starts. Merging never touches the training.

After every task t the model that is evaluated is merged from theta_1 .. theta_t, equal weights 1/t:
  mean   theta_i = 1/t sum_k theta_k,i
  mode   theta_i = sum_k G_k,i theta_k,i / sum_k G_k,i, G_k = F_k + eps (eps added in every task), with
         F_k = 1/N sum_n (d log p(y_n|x_n) / d theta)^2 over all N = steps * rows examples of task k, at
         theta_k: squares of SINGLE examples' gradients, averaged, true labels (empirical)
The output layer l2/w, l2/b is not merged: it is that of theta_t. With t = 1 both are theta_1.

Keys. Inputs:
  init/<p>            initial parameters, <p> one of l0/w l0/b l1/w l1/b l2/w l2/b
  xs [3,5,5,6], ys [3,5,5]   batches by task and step; probe [12,6]; lr, coef, eps
Outputs for V in {mean, mode}:
  V/params/<p> [3,5,...]     trained parameters after every step (the same in both variants)
  V/loss [3,5]               CE + penalty minimised in the step, at the parameters before it
  V/ce [3,5], V/penalty [3,5]   its two terms (the penalty includes coef/2)
  V/merged/<p> [3,...]       the merged model after each task (l2/w, l2/b: the trained ones)
  V/probe_logits [3,12,4]    of the MERGED model after each task
  mode/fisher/<p> [3,...]    F_k of task k, eps not yet added (those of l2/w, l2/b are not used)
The parameters theta_k are V/params/<p>[k, -1].
"""

from __future__ import annotations

import l2
import numpy as np
import problem as pb

TASKS, STEPS, ROWS = 3, 5, 5
LR, COEF, EPS = 0.1, 1.5, 1e-8
HEAD = ('l2/w', 'l2/b')


def fisher(params: pb.Params, x: pb.Array, labels: np.ndarray) -> pb.Params:
  """Empirical diagonal Fisher over rows x [N,6] with labels [N]."""
  total = {k: np.zeros_like(v) for k, v in params.items()}
  for row, label in zip(x, labels, strict=True):
    for k, g in pb.loss_and_grad(params, row[None], np.array([label]))[1].items():
      total[k] += g**2
  return {k: v / len(x) for k, v in total.items()}


def merge(models: list[pb.Params], weights: list[pb.Params]) -> pb.Params:
  merged = {}
  for k in models[-1]:
    top = sum(w[k] * m[k] for w, m in zip(weights, models, strict=True))
    merged[k] = models[-1][k] if k in HEAD else top / sum(w[k] for w in weights)
  return merged


def run(init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  trained, ends = l2.run(COEF, LR, init, xs, ys, probe)
  fishers = [
    fisher(p, x.reshape(-1, pb.INPUTS), y.reshape(-1)) for p, x, y in zip(ends, xs, ys, strict=True)
  ]
  ones = [{k: np.ones_like(v) for k, v in p.items()} for p in ends]
  precision = [{k: f[k] + EPS for k in f} for f in fishers]
  out = {}
  for variant, weights in (('mean', ones), ('mode', precision)):
    merged = [merge(ends[: t + 1], weights[: t + 1]) for t in range(TASKS)]
    arrays = trained | pb.prefixed('merged', pb.stack(merged))
    arrays['probe_logits'] = np.stack([pb.forward(p, probe)[0] for p in merged])
    out |= pb.prefixed(variant, arrays)
  return out | pb.prefixed('mode/fisher', pb.stack(fishers))


def check(out: dict) -> None:
  """The two merged models differ from each other and from the trained one; eps does not lead."""
  for k in ('l0/w', 'l0/b', 'l1/w', 'l1/b'):
    mean, mode = out[f'mean/merged/{k}'], out[f'mode/merged/{k}']
    last = out[f'mean/params/{k}'][:, -1]
    assert np.allclose(mean[0], last[0], rtol=0, atol=1e-15)
    assert np.allclose(mode[0], last[0], rtol=0, atol=1e-15)
    for a, b in ((mean, mode), (mean, last), (mode, last)):
      assert np.abs(a - b)[1:].reshape(2, -1).max(axis=1).min() > 1e-3, k
    assert (out[f'mode/fisher/{k}'] > 100 * EPS).mean() > 0.5, k
  gap = np.abs(out['mean/probe_logits'] - out['mode/probe_logits']).max(axis=(1, 2))
  assert gap[0] < 1e-12 and gap[1:].min() > 1e-3, gap


def main() -> None:
  rng = np.random.default_rng(1721)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'xs': xs, 'ys': ys, 'probe': probe, 'lr': LR, 'coef': COEF, 'eps': EPS}
  out |= run(init, xs, ys, probe)
  check(out)
  pb.save('imm', out)


if __name__ == '__main__':
  main()
