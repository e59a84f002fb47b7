"""Reference for Riemannian Walk: golden/rwalk.npz.

Chaudhry et al. 2018 (ECCV), section 4, the average of the scores as in section 4.3:
L(theta) = CE + lam sum_i (Fn_i + Sn_i) (theta_i - theta*_i)^2, without 1/2. Three tasks that share all
four classes; plain SGD on the whole loss.

State: running Fisher F, tmp, small, running score s_run, score_all, Fn, Sn (all 0 at first);
theta_old (the parameters at the last refresh) and theta*, at first the initial parameters.
A refresh of n accumulated steps, in this order:
  s_run <- s_run + max(0, small / (xi + F (theta - theta_old)^2))   with F from before the refresh
  F <- (1 - alpha) F + alpha tmp / n
  tmp <- 0, small <- 0, theta_old <- theta
Step i of a task, i = 1, 2, ...:
  1. if i > 1 and (i - 1) % every == 0: refresh with n = every
  2. g_task = gradient of the mean CE of the batch, at the parameters before the step;
     tmp <- tmp + g_task^2 (the square of the BATCH gradient)
  3. theta moves by SGD on the gradient of L; small <- small - g_task (theta_after - theta_before)
Boundary:
  1. refresh for the n steps since the last refresh (here n = 1: refreshes of 2, 2 and 1 steps)
  2. score_all as below
  3. Sn <- (score_all - min) / (max - min + eps), min and max over ALL parameters together;
     Fn <- the same of F; the penalty uses these two until the next boundary
  4. theta* <- theta, theta_old <- theta; s_run, small, tmp <- 0; F is kept over the boundaries
In the very first refresh F is 0, so that its score is small / xi.
Variants:
  paper   score_all <- s_run in the first task, later (score_all + s_run) / 2 (section 4.3)
  code    as facebookresearch/agem: it doubles the first task's score and ADDS the average:
          first task score_all <- 0 + (0 + 2 s_run) / 2, later
          score_all <- score_all + (score_all + s_run) / 2
  ewcpp   EWC++ of section 4.1: as paper, but Sn is left out of the penalty
Deviations of that code not followed in `code`: it refreshes before step i where i % every == 0, so a
task's first refresh holds every - 1 steps and is still divided by every; it has no refresh at the
boundary, where steps since the last one are dropped; its initial F is copied from a tmp that is
still 0. Its alpha is 0.9, its every 10, its xi (PARAM_XI_STEP) 1e-3.

Keys. Inputs:
  init/<p>            initial parameters, <p> one of l0/w l0/b l1/w l1/b l2/w l2/b
  xs [3,5,5,6], ys [3,5,5]   batches by task and step; probe [12,6]; lr, lam, alpha, xi, eps;
  every (an integer)
Outputs for V in {paper, code, ewcpp}:
  V/params/<p> [3,5,...]     parameters after every step
  V/loss [3,5]               CE + penalty minimised in the step, at the parameters before it
  V/ce [3,5], V/penalty [3,5]   its two terms (the penalty includes lam)
  V/fisher/<p> [3,...]       Fn after each boundary
  V/score/<p> [3,...]        Sn after each boundary
  V/running_fisher/<p> [3,...]  F after each boundary, not normalised
  V/score_all/<p> [3,...]    score_all after each boundary, not normalised
  V/probe_logits [3,12,4]    after each task
The anchor of boundary k is V/params/<p>[k, -1].
"""

from __future__ import annotations

import numpy as np
import problem as pb

TASKS, STEPS, ROWS = 3, 5, 5
LR, LAM, ALPHA, EVERY, XI, EPS = 0.1, 5.0, 0.7, 2, 1e-3, 1e-32
VARIANTS = ('paper', 'code', 'ewcpp')


def normalised(values: pb.Params) -> pb.Params:
  low = min(float(v.min()) for v in values.values())
  high = max(float(v.max()) for v in values.values())
  return {k: (v - low) / (high - low + EPS) for k, v in values.items()}


def run(variant: str, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  zeros = {k: np.zeros_like(v) for k, v in init.items()}
  params, anchor, old = dict(init), dict(init), dict(init)
  fisher, tmp, small, s_run = dict(zeros), dict(zeros), dict(zeros), dict(zeros)
  score_all, fn, sn = dict(zeros), dict(zeros), dict(zeros)
  trace, ces, pens, logits = [], [], [], []
  fns, sns, fishers, scores = [], [], [], []
  clipped, curvature = 0.0, 0.0

  def refresh(n: int) -> None:
    nonlocal clipped, curvature
    for k in params:
      distance = fisher[k] * (params[k] - old[k]) ** 2
      raw = small[k] / (XI + distance)
      clipped = min(clipped, float(raw.min()))
      curvature = max(curvature, float(distance.max()) / XI)
      s_run[k] = s_run[k] + np.maximum(0.0, raw)
      fisher[k] = (1.0 - ALPHA) * fisher[k] + ALPHA * tmp[k] / n
      tmp[k] = np.zeros_like(tmp[k])
      small[k] = np.zeros_like(small[k])
      old[k] = params[k]

  for t in range(TASKS):
    pending = 0
    for i in range(1, STEPS + 1):
      if i > 1 and (i - 1) % EVERY == 0:
        refresh(EVERY)
        pending = 0
      ce, g_task = pb.loss_and_grad(params, xs[t, i - 1], ys[t, i - 1])
      tmp = {k: tmp[k] + g_task[k] ** 2 for k in params}
      weight = fn if variant == 'ewcpp' else {k: fn[k] + sn[k] for k in params}
      gap = {k: params[k] - anchor[k] for k in params}
      pen = LAM * sum(float((weight[k] * gap[k] ** 2).sum()) for k in params)
      g_total = {k: g_task[k] + 2.0 * LAM * weight[k] * gap[k] for k in params}
      new = pb.sgd(params, g_total, LR)
      small = {k: small[k] - g_task[k] * (new[k] - params[k]) for k in params}
      params = new
      pending += 1
      trace.append(params)
      ces.append(ce)
      pens.append(pen)
    if pending:
      refresh(pending)
    for k in params:
      if variant != 'code':
        score_all[k] = s_run[k] if t == 0 else (score_all[k] + s_run[k]) / 2.0
      else:
        now = 2.0 * s_run[k] if t == 0 else s_run[k]
        score_all[k] = score_all[k] + (score_all[k] + now) / 2.0
    sn, fn = normalised(score_all), normalised(fisher)
    anchor, old = dict(params), dict(params)
    s_run, small, tmp = dict(zeros), dict(zeros), dict(zeros)
    fns.append(fn)
    sns.append(sn)
    fishers.append(dict(fisher))
    scores.append(dict(score_all))
    logits.append(pb.forward(params, probe)[0])
  # The maximum bites, and the Fisher in the score's denominator is not lost beside xi.
  assert clipped < -1e-2, clipped
  assert curvature > 0.1, curvature
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  kept = {'fisher': fns, 'score': sns, 'running_fisher': fishers, 'score_all': scores}
  for what, values in kept.items():
    out |= pb.prefixed(what, pb.stack(values))
  ce, pen = np.reshape(ces, (TASKS, STEPS)), np.reshape(pens, (TASKS, STEPS))
  return out | {'loss': ce + pen, 'ce': ce, 'penalty': pen, 'probe_logits': np.stack(logits)}


def check(out: dict) -> None:
  names = [k.removeprefix('init/') for k in out if k.startswith('init/')]

  def flat(key: str) -> pb.Array:
    return np.concatenate([out[f'{key}/{k}'].reshape(TASKS, -1) for k in names], axis=1)

  for v in VARIANTS:
    share = out[f'{v}/penalty'] / out[f'{v}/loss']
    assert np.all(share[0] == 0) and np.all(share[1:].max(axis=1) > 0.01), (v, share)
    assert out[f'{v}/loss'].max() < 3.0, v
    for what in ('fisher', 'score'):  # each of the two weighs in the penalty
      n = flat(f'{v}/{what}')
      assert np.all(n.min(axis=1) == 0) and np.all(n.max(axis=1) == 1), (v, what)
      assert n.mean() > 0.02, (v, what)
    # Subtracting the minimum shows: it is not 0 at some boundary, for both.
    for what in ('running_fisher', 'score_all'):
      n = flat(f'{v}/{what}')
      assert (n.min(axis=1) / n.max(axis=1)).max() > 1e-5, (v, what)
  assert np.abs(flat('paper/params') - flat('code/params')).max() > 1e-4
  assert np.abs(flat('paper/score') - flat('code/score')).max() > 1e-2


def main() -> None:
  rng = np.random.default_rng(1734)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'xs': xs, 'ys': ys, 'probe': probe, 'lr': LR, 'lam': LAM, 'alpha': ALPHA}
  out |= {'every': EVERY, 'xi': XI, 'eps': EPS}
  for variant in VARIANTS:
    out |= pb.prefixed(variant, run(variant, init, xs, ys, probe))
  check(out)
  pb.save('rwalk', out)


if __name__ == '__main__':
  main()
