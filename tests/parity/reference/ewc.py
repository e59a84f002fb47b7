"""Reference for diagonal Elastic Weight Consolidation: golden/ewc.npz.

Kirkpatrick et al. 2017, eq. 3: L(theta) = CE + lam/2 sum_k sum_i F_k,i (theta_i - theta*_k,i)^2.
Three tasks that share all four classes; plain SGD on the whole loss. In the first task the penalty
is 0.

Fisher of task k, taken at the end of the task over all its N = steps * rows examples, at the
parameters after its last step, from gradients of SINGLE examples, squared, then averaged:
  exact      F = 1/N sum_n sum_c p(c|x_n) (d log p(c|x_n) / d theta)^2
  empirical  F = 1/N sum_n (d log p(y_n|x_n) / d theta)^2 with the true label y_n
  sampled    the same with a label drawn from p(.|x_n), one per example, stored here as an input
  predicted  the same with the most probable label; van de Ven & Tolias 2019 (separate alone, here)
Accumulation:
  separate   a penalty per past task: F_k and anchor theta*_k are kept for every k
  online     one penalty: F <- gamma F + F_k (F starts at 0), anchor = parameters at the latest
             boundary. The decay is applied once, at the boundary, and NOT again within the loss.
Deviations: GMvandeVen/continual-learning multiplies the stored running Fisher by gamma a second
time within the loss of its online variant; the code of A-GEM's authors keeps a moving average of
squared minibatch gradients instead of a Fisher at the boundary.

Keys. Inputs:
  init/<p>            initial parameters, <p> one of l0/w l0/b l1/w l1/b l2/w l2/b
  xs [3,4,5,6], ys [3,4,5]   batches by task and step; lr, lam, gamma; probe [12,6]
  V/sampled_labels [3,20]    V in sampled_*: labels by task, in the row order of xs[t].reshape(20,6)
Outputs for V in {exact,empirical,sampled}_{separate,online} and predicted_separate:
  V/params/<p> [3,4,...]     parameters after every step
  V/loss [3,4]               CE + penalty minimised in the step, at the parameters before it
  V/ce [3,4], V/penalty [3,4]   its two terms (the penalty includes lam/2)
  V/fisher_new/<p> [3,...]   the Fisher F_k of task k alone
  V/fisher/<p> [3,...]       V in *_online: the accumulated F after boundary k
  V/probe_logits [3,12,4]    after each task
The anchor of boundary k is V/params/<p>[k, -1].
"""

from __future__ import annotations

import numpy as np
import problem as pb

TASKS, STEPS, ROWS = 3, 4, 5
LR, LAM, GAMMA = 0.1, 13.0, 0.9


def example_grad(params: pb.Params, x: pb.Array, label: int) -> pb.Params:
  """Gradient of -log p(label|x) for one input [6]."""
  return pb.loss_and_grad(params, x[None], np.array([label]))[1]


def fisher(params: pb.Params, x: pb.Array, labels: np.ndarray | None) -> pb.Params:
  """Diagonal Fisher over rows x [N,6]: with given labels [N], or (None) over all, weighted by p."""
  total = {k: np.zeros_like(v) for k, v in params.items()}
  for n, row in enumerate(x):
    if labels is None:
      p = pb.softmax(pb.forward(params, row[None])[0])[0]
      weighted = [(c, p[c]) for c in range(len(p))]
    else:
      weighted = [(int(labels[n]), 1.0)]
    for label, weight in weighted:
      g = example_grad(params, row, label)
      for k in total:
        total[k] += weight * g[k] ** 2
  return {k: v / len(x) for k, v in total.items()}


def run(
  kind: str,
  online: bool,
  init: pb.Params,
  xs: pb.Array,
  ys: np.ndarray,
  probe: pb.Array,
  rng: np.random.Generator,
) -> dict:
  params = dict(init)
  penalties: list[tuple[pb.Params, pb.Params]] = []  # (F, anchor)
  trace, ces, pens, news, kept, logits, sampled = [], [], [], [], [], [], []
  for t in range(TASKS):
    for s in range(STEPS):
      ce, grads = pb.loss_and_grad(params, xs[t, s], ys[t, s])
      pen = 0.0
      for f, anchor in penalties:
        for k in params:
          pen += 0.5 * LAM * float((f[k] * (params[k] - anchor[k]) ** 2).sum())
          grads[k] = grads[k] + LAM * f[k] * (params[k] - anchor[k])
      params = pb.sgd(params, grads, LR)
      trace.append(params)
      ces.append(ce)
      pens.append(pen)
    x, y = xs[t].reshape(-1, pb.INPUTS), ys[t].reshape(-1)
    labels = None
    if kind == 'empirical':
      labels = y
    elif kind == 'sampled':
      p = pb.softmax(pb.forward(params, x)[0])
      labels = np.array([rng.choice(p.shape[1], p=row) for row in p])
      sampled.append(labels)
    elif kind == 'predicted':
      scores = pb.forward(params, x)[0]
      labels = scores.argmax(1)
      top = np.sort(scores, axis=1)
      assert (top[:, -1] - top[:, -2]).min() > 1e-3 and np.any(labels != y)
    new = fisher(params, x, labels)
    if online:
      old = penalties[0][0] if penalties else {k: np.zeros_like(v) for k, v in params.items()}
      penalties = [({k: GAMMA * old[k] + new[k] for k in new}, params)]
      kept.append(penalties[0][0])
    else:
      penalties.append((new, params))
    news.append(new)
    logits.append(pb.forward(params, probe)[0])
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  out |= pb.prefixed('fisher_new', pb.stack(news))
  if kept:
    out |= pb.prefixed('fisher', pb.stack(kept))
  if sampled:
    out['sampled_labels'] = np.stack(sampled)
  ce, pen = np.reshape(ces, (TASKS, STEPS)), np.reshape(pens, (TASKS, STEPS))
  return out | {'loss': ce + pen, 'ce': ce, 'penalty': pen, 'probe_logits': np.stack(logits)}


def main() -> None:
  rng = np.random.default_rng(1701)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'xs': xs, 'ys': ys, 'probe': probe, 'lr': LR, 'lam': LAM, 'gamma': GAMMA}
  for kind in ('exact', 'empirical', 'sampled', 'predicted'):
    for online in (False, True)[: 1 if kind == 'predicted' else 2]:
      name = f'{kind}_{"online" if online else "separate"}'
      out |= pb.prefixed(name, run(kind, online, init, xs, ys, probe, rng))
      # A penalty that is lost in rounding, or that blows up, would test nothing.
      late = out[f'{name}/penalty'][1:, 1:]
      assert late.min() > 1e-3 and late.max() < 1.0
  pb.save('ewc', out)


if __name__ == '__main__':
  main()
