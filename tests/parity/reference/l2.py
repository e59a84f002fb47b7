"""Reference for the L2 penalty towards the last task's parameters: golden/l2.npz.

The baseline of Kirkpatrick et al. 2017 and the transfer of Lee et al. 2017 (L2-transfer):
L(theta) = CE + coef/2 sum_i (theta_i - theta*_i)^2 from the second task on, theta* = the parameters
after the last step of the task before. No penalty in the first task. All parameters are held, biases
and the output layer too. Three tasks that share all four classes; plain SGD on the whole loss.

Keys. Inputs:
  init/<p>            initial parameters, <p> one of l0/w l0/b l1/w l1/b l2/w l2/b
  xs [3,5,5,6], ys [3,5,5]   batches by task and step; probe [12,6]; lr, coef
Outputs:
  l2/params/<p> [3,5,...]    parameters after every step
  l2/loss [3,5]              CE + penalty minimised in the step, at the parameters before it
  l2/ce [3,5], l2/penalty [3,5]   its two terms (the penalty includes coef/2)
  l2/probe_logits [3,12,4]   after each task
The anchor of boundary k is l2/params/<p>[k, -1]. Take care that l2/params/l2/w is the output layer.
"""

from __future__ import annotations

import numpy as np
import problem as pb

TASKS, STEPS, ROWS = 3, 5, 5
LR, COEF = 0.1, 1.5


def run(
  coef: float, lr: float, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array
) -> tuple[dict, list[pb.Params]]:
  """The arrays of a run, and the parameters at every boundary."""
  params, anchor = dict(init), None
  trace, ces, pens, ends, logits = [], [], [], [], []
  for x_task, y_task in zip(xs, ys, strict=True):
    for x, y in zip(x_task, y_task, strict=True):
      ce, grads = pb.loss_and_grad(params, x, y)
      pen = 0.0
      if anchor is not None:
        for k in params:
          gap = params[k] - anchor[k]
          pen += 0.5 * coef * float((gap**2).sum())
          grads[k] = grads[k] + coef * gap
      params = pb.sgd(params, grads, lr)
      trace.append(params)
      ces.append(ce)
      pens.append(pen)
    anchor = params
    ends.append(params)
    logits.append(pb.forward(params, probe)[0])
  out = pb.prefixed('params', pb.per_task(trace, len(xs)))
  ce, pen = np.reshape(ces, (len(xs), -1)), np.reshape(pens, (len(xs), -1))
  out |= {'loss': ce + pen, 'ce': ce, 'penalty': pen, 'probe_logits': np.stack(logits)}
  share = pen / (ce + pen)
  assert np.all(share[0] == 0) and np.all(share[1:].max(axis=1) > 0.01), share
  assert out['loss'].max() < 3.0
  return out, ends


def main() -> None:
  rng = np.random.default_rng(1726)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'xs': xs, 'ys': ys, 'probe': probe, 'lr': LR, 'coef': COEF}
  out |= pb.prefixed('l2', run(COEF, LR, init, xs, ys, probe)[0])
  pb.save('l2', out)


if __name__ == '__main__':
  main()
