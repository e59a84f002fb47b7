"""Reference for Memory Aware Synapses: golden/mas.npz.

Aljundi et al. 2018 (global form): L(theta) = CE + lam sum_i Omega_i (theta_i - theta*_i)^2, without 1/2.
Three tasks that share all four classes; plain SGD on the whole loss. Omega starts at 0, so the first
task has no penalty.

Boundary, over all N = steps * rows training examples x_n of the finished task, at the parameters after
its last step, f = the logits of all four classes:
  Omega <- Omega + 1/N sum_n |d ||f(x_n)||_2^2 / d theta|
(the absolute value of the gradient of a SINGLE example, then the mean; the squared norm without 1/2),
then theta* <- theta. No labels are needed. Variant `sum`: Omega is summed over the tasks, as published.
Deviations: facebookresearch/agem takes the gradient of a batch of ten before the absolute value,
divides by the number of examples, and starts from 0 at every boundary instead of adding.

Keys. Inputs:
  init/<p>            initial parameters, <p> one of l0/w l0/b l1/w l1/b l2/w l2/b
  xs [3,5,5,6], ys [3,5,5]   batches by task and step; probe [12,6]; lr, lam
Outputs:
  sum/params/<p> [3,5,...]   parameters after every step
  sum/loss [3,5]             CE + penalty minimised in the step, at the parameters before it
  sum/ce [3,5], sum/penalty [3,5]   its two terms (the penalty includes lam)
  sum/importance_new/<p> [3,...]    the finished task's own term
  sum/importance/<p> [3,...]        Omega after the boundary
  sum/probe_logits [3,12,4]  after each task
The anchor of boundary k is sum/params/<p>[k, -1].
"""

from __future__ import annotations

import numpy as np
import problem as pb

TASKS, STEPS, ROWS = 3, 5, 5
LR, LAM = 0.1, 2.5


def sensitivity(params: pb.Params, x: pb.Array) -> pb.Params:
  """Mean over rows x [N,6] of the absolute gradient of one row's squared logit norm."""
  total = {k: np.zeros_like(v) for k, v in params.items()}
  for row in x:
    logits, cache = pb.forward(params, row[None])
    for k, g in pb.backward(params, cache, 2.0 * logits).items():
      total[k] += np.abs(g)
  return {k: v / len(x) for k, v in total.items()}


def run(init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  params, anchor = dict(init), dict(init)
  importance = {k: np.zeros_like(v) for k, v in init.items()}
  trace, ces, pens, news, kept, logits = [], [], [], [], [], []
  for t in range(TASKS):
    for s in range(STEPS):
      ce, grads = pb.loss_and_grad(params, xs[t, s], ys[t, s])
      gap = {k: params[k] - anchor[k] for k in params}
      pen = LAM * sum(float((importance[k] * gap[k] ** 2).sum()) for k in params)
      grads = {k: grads[k] + 2.0 * LAM * importance[k] * gap[k] for k in params}
      params = pb.sgd(params, grads, LR)
      trace.append(params)
      ces.append(ce)
      pens.append(pen)
    new = sensitivity(params, xs[t].reshape(-1, pb.INPUTS))
    importance = {k: importance[k] + new[k] for k in new}
    anchor = params
    news.append(new)
    kept.append(importance)
    logits.append(pb.forward(params, probe)[0])
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  out |= pb.prefixed('importance_new', pb.stack(news))
  out |= pb.prefixed('importance', pb.stack(kept))
  ce, pen = np.reshape(ces, (TASKS, STEPS)), np.reshape(pens, (TASKS, STEPS))
  return out | {'loss': ce + pen, 'ce': ce, 'penalty': pen, 'probe_logits': np.stack(logits)}


def check(out: dict) -> None:
  """The penalty matters, and the absolute value is not that of the mean gradient."""
  share = out['sum/penalty'] / out['sum/loss']
  assert np.all(share[0] == 0) and np.all(share[1:].max(axis=1) > 0.01), share
  assert out['sum/loss'].max() < 3.0
  names = [k.removeprefix('init/') for k in out if k.startswith('init/')]
  params = {k: out[f'sum/params/{k}'][0, -1] for k in names}
  x = out['xs'][0].reshape(-1, pb.INPUTS)
  logits, cache = pb.forward(params, x)
  mixed = pb.backward(params, cache, 2.0 * logits / len(x))
  for k, g in mixed.items():
    assert np.abs(out[f'sum/importance_new/{k}'][0] - np.abs(g)).max() > 1e-2, k


def main() -> None:
  rng = np.random.default_rng(1729)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'xs': xs, 'ys': ys, 'probe': probe, 'lr': LR, 'lam': LAM}
  out |= pb.prefixed('sum', run(init, xs, ys, probe))
  check(out)
  pb.save('mas', out)


if __name__ == '__main__':
  main()
