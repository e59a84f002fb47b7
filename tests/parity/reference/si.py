"""Reference for Synaptic Intelligence: golden/si.npz.

Zenke et al. 2017, eq. 3-5: L(theta) = CE + c sum_i Omega_i (theta_i - theta*_i)^2, without 1/2. Three
tasks that share all four classes. Omega and omega start at 0, theta* at the initial parameters.

Order of operations:
  step       g_task = gradient of CE alone and g_total = gradient of L, both at the parameters before
             the step; theta moves by the optimiser on g_total; then
             omega <- omega - g (theta_after - theta_before), g = g_task but for `total`
  boundary   Omega <- Omega + max(0, omega / ((theta - theta*)^2 + xi)), then theta* <- theta and
             omega <- 0. The maximum is taken of one task's term, not of the sum over tasks.
Variants:
  task       as above; plain SGD theta <- theta - lr g_total
  total      g = g_total in omega. With plain SGD omega then never falls, and the maximum does nothing
  unclipped  g = g_task, and Omega <- Omega + omega / (...), which may be negative
  momentum   as `task`, but v <- momentum v + g_total; theta <- theta - lr v. v starts at 0 and is
             kept over the boundaries
Deviations: facebookresearch/agem (its PI) takes g_task and clips, as `task`, with xi = 1e-3;
GMvandeVen/continual-learning takes the gradient of the whole loss, as `total`, does not clip, and has
xi = 0.1. Importance and anchor cover all parameters, biases and the output layer too.

Keys. Inputs:
  init/<p>            initial parameters, <p> one of l0/w l0/b l1/w l1/b l2/w l2/b
  xs [3,5,5,6], ys [3,5,5]   batches by task and step; probe [12,6]; lr, c, xi, momentum
Outputs for V in {task, total, unclipped, momentum}:
  V/params/<p> [3,5,...]     parameters after every step
  V/loss [3,5]               CE + penalty minimised in the step, at the parameters before it
  V/ce [3,5], V/penalty [3,5]   its two terms (the penalty includes c)
  V/omega/<p> [3,5,...]      omega after every step (its last row: before the boundary sets it to 0)
  V/importance/<p> [3,...]   Omega after each boundary
  V/probe_logits [3,12,4]    after each task
The anchor of boundary k is V/params/<p>[k, -1].
"""

from __future__ import annotations

import numpy as np
import problem as pb

TASKS, STEPS, ROWS = 3, 5, 5
LR, C, XI, MOMENTUM = 0.1, 15.0, 0.1, 0.9
VARIANTS = ('task', 'total', 'unclipped', 'momentum')


def run(variant: str, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  params, anchor = dict(init), dict(init)
  zeros = {k: np.zeros_like(v) for k, v in init.items()}
  importance, velocity = dict(zeros), dict(zeros)
  trace, ces, pens, omegas, kept, logits = [], [], [], [], [], []
  for t in range(TASKS):
    omega = dict(zeros)
    for s in range(STEPS):
      ce, g_task = pb.loss_and_grad(params, xs[t, s], ys[t, s])
      gap = {k: params[k] - anchor[k] for k in params}
      pen = C * sum(float((importance[k] * gap[k] ** 2).sum()) for k in params)
      g_total = {k: g_task[k] + 2.0 * C * importance[k] * gap[k] for k in params}
      if variant == 'momentum':
        velocity = {k: MOMENTUM * velocity[k] + g_total[k] for k in params}
        new = pb.sgd(params, velocity, LR)
      else:
        new = pb.sgd(params, g_total, LR)
      g = g_total if variant == 'total' else g_task
      omega = {k: omega[k] - g[k] * (new[k] - params[k]) for k in params}
      params = new
      trace.append(params)
      ces.append(ce)
      pens.append(pen)
      omegas.append(omega)
    for k in params:
      term = omega[k] / ((params[k] - anchor[k]) ** 2 + XI)
      importance[k] = importance[k] + (term if variant == 'unclipped' else np.maximum(0.0, term))
    anchor = params
    kept.append(dict(importance))
    logits.append(pb.forward(params, probe)[0])
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  out |= pb.prefixed('omega', pb.per_task(omegas, TASKS))
  out |= pb.prefixed('importance', pb.stack(kept))
  ce, pen = np.reshape(ces, (TASKS, STEPS)), np.reshape(pens, (TASKS, STEPS))
  return out | {'loss': ce + pen, 'ce': ce, 'penalty': pen, 'probe_logits': np.stack(logits)}


def check(out: dict) -> None:
  """A mechanism that is lost in rounding would test nothing."""
  names = [k.removeprefix('init/') for k in out if k.startswith('init/')]
  flat = {
    (v, what): np.concatenate([out[f'{v}/{what}/{k}'].reshape(TASKS, -1) for k in names], axis=1)
    for v in VARIANTS
    for what in ('params', 'importance')
  }
  for v in VARIANTS:
    share = out[f'{v}/penalty'] / out[f'{v}/loss']
    assert np.all(share[0] == 0) and np.all(share[1:].max(axis=1) > 0.01), (v, share)
    assert out[f'{v}/loss'].max() < 3.0, v
    last = np.concatenate([out[f'{v}/omega/{k}'][:, -1].reshape(TASKS, -1) for k in names], axis=1)
    if v == 'total':
      assert last.min() >= 0
    else:  # the maximum bites, and on more than rounding
      assert (last[1:] < -1e-4).any(axis=1).any(), (v, last.min(axis=1))
    if v != 'task':
      assert np.abs(flat[v, 'params'] - flat['task', 'params']).max() > 1e-4, v
      assert np.abs(flat[v, 'importance'] - flat['task', 'importance']).max() > 1e-3, v
  falls = np.diff(flat['unclipped', 'importance'], axis=0)
  assert falls.min() < -1e-3, falls.min()


def main() -> None:
  rng = np.random.default_rng(1731)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'xs': xs, 'ys': ys, 'probe': probe, 'lr': LR, 'c': C, 'xi': XI, 'momentum': MOMENTUM}
  for variant in VARIANTS:
    out |= pb.prefixed(variant, run(variant, init, xs, ys, probe))
  check(out)
  pb.save('si', out)


if __name__ == '__main__':
  main()
