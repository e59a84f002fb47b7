"""Reference for O-LoRA on an MLP: golden/olora.npz. NumPy, gradients by hand.

Wang et al. 2023 (EMNLP Findings), eq. 5-8; cmnfriend/O-LoRA (src/uie_trainer_lora.py). In task t

  W_eff = W + s sum_{i<=t} A_i B_i,   s = alpha / r,   A [in,r], B [r,out],
  loss  = CE + lam1 sum_{l0,l1} sum_{i<t} sum_{jk} |A_i^T A_t|_jk
             + lam2 sum_{l0,l1} (|A_t|_F^2 + |B_t|_F^2)

and A_t, B_t, the biases and the head follow p <- p - lr gradient; A_i, B_i with i != t and l0/w, l1/w
keep their values. All A_i are given from the start, all B_i start at 0, so later slots add nothing.
By hand, with D the gradient by W_eff and O the old A side by side [in, t r]:
  dB_t = s A_t^T D + 2 lam2 B_t,   dA_t = s D B_t^T + lam1 O sign(O^T A_t) + 2 lam2 A_t.
No entry of O^T A_t comes so close to 0 that its sign is in doubt. Deviations: the authors add norms
that are not squared (lam2), train no biases, and keep the old factors joined in one.

Keys. Inputs:
  init/l0/w [6,8] ... init/l2/b [6]; init/l0/A [3,6,2], init/l0/B [3,2,8] (zeros), init/l1/A [3,8,2],
  init/l1/B [3,2,7]; xs [3,5,6,6] (task, step, row), ys [3,5,6], probe [8,6]; lr, r, alpha
Outputs, V in {plain, both} (lam2 = 0; lam2 > 0):
  V/lam1, V/lam2
  V/params/<q> [3,5,...]    after every step, <q> l0/A l0/B l1/A l1/B (all slots) l0/b l1/b l2/w l2/b
  V/loss [3,5]              what the step minimises, at the parameters before it
  V/ce [3,5], V/orthogonal [3,5], V/squares [3,5]   its parts without lam1, lam2
  V/effective/l0/w, V/effective/l1/w [3,...]        W_eff after each task
  V/probe_logits [3,8,6]    after each task
"""

from __future__ import annotations

import factors as fx
import frozen as fr
import numpy as np
import problem as pb

LR, SCALE = 0.1, fx.ALPHA / fx.R
VARIANTS = {'plain': (0.5, 0.0), 'both': (0.2, 0.05)}


def effective(params: pb.Params, task: int) -> pb.Params:
  updates = {}
  for name in fx.LAYERS:
    a, b = params[f'{name}/A'], params[f'{name}/B']
    updates[name] = SCALE * sum(a[i] @ b[i] for i in range(task + 1))
  return fx.mlp(params, updates)


def run(variant: str, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  lam1, lam2 = VARIANTS[variant]
  params, keys = dict(init), [k for k in init if k not in ('l0/w', 'l1/w')]
  trace, parts, ends = [], [], []
  for t in range(fx.TASKS):
    for s in range(fx.STEPS):
      ce, g = fx.gradients(effective(params, t), xs[t, s], ys[t, s])
      after = params | {k: params[k] - LR * g[k] for k in fx.PLAIN}
      orthogonal = squares = 0.0
      for name in fx.LAYERS:
        a, b, d = params[f'{name}/A'], params[f'{name}/B'], SCALE * g[f'{name}/w']
        old = np.concatenate([np.zeros((len(a[t]), 0)), *a[:t]], axis=1)
        overlap = old.T @ a[t]
        assert t == 0 or np.abs(overlap).min() > 1e-4, np.abs(overlap).min()
        orthogonal += np.abs(overlap).sum()
        squares += (a[t] ** 2).sum() + (b[t] ** 2).sum()
        da = d @ b[t].T + lam1 * old @ np.sign(overlap) + 2 * lam2 * a[t]
        db = a[t].T @ d + 2 * lam2 * b[t]
        for key, slots, grad in ((f'{name}/A', a, da), (f'{name}/B', b, db)):
          after[key] = slots.copy()
          after[key][t] -= LR * grad
      params = after
      trace.append({k: params[k] for k in keys})
      parts.append((ce + lam1 * orthogonal + lam2 * squares, ce, orthogonal, squares))
    ends.append(effective(params, t))
  loss, ce, orthogonal, squares = np.array(parts).T.reshape(4, fx.TASKS, fx.STEPS)
  out = fx.output(trace, loss, ends, probe) | {'lam1': lam1, 'lam2': lam2}
  return out | {'ce': ce, 'orthogonal': orthogonal, 'squares': squares}


def main() -> None:
  rng = np.random.default_rng(1801)
  init = pb.init_params(rng, fx.CLASSES)
  init |= fx.factors(rng, init)
  xs, ys, probe = fx.tasks(rng)
  out = pb.prefixed('init', init)
  out |= {'xs': xs, 'ys': ys, 'probe': probe, 'lr': LR, 'r': fx.R, 'alpha': fx.ALPHA}
  for v in VARIANTS:
    arrays = run(v, init, xs, ys, probe)
    fr.stable(arrays, run(v, fr.nearby(rng, init), xs, ys, probe))
    out |= pb.prefixed(v, arrays)
  pb.save('olora', out)


if __name__ == '__main__':
  main()
