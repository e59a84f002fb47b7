"""Reference for SD-LoRA on an MLP: golden/sdlora.npz. NumPy, gradients by hand.

Wu et al. 2025 (ICLR), eq. 3-6; WuYichen-97/SD-Lora-CL (backbone/lora.py). In task t, A [in,r], B [r,out],

  W_eff = W + sum_{i<=t} m_i A_i B_i / (|A_i|_F |B_i|_F + 1e-8)

with a magnitude m_i. A_i, B_i of earlier tasks are frozen directions; A_t, B_t and all m_i with i <= t
are trained by p <- p - lr gradient, and so are the biases and the head. The norms are inside the
gradient. Slots i > t take no part, though their B is not 0. There is no alpha / r. m_i starts at 0.8
and is carried over the boundaries. By hand, with a = |A_t|_F, b = |B_t|_F, D the gradient by W_eff,
C = A_t B_t, n = a b + 1e-8 and k = <D, C> / n^2:
  dm_i = <D, A_i B_i> / n_i,   dA_t = m_t (D B_t^T / n - k (b / a) A_t),   dB_t likewise.
Variants:
  each      a magnitude for every matrix and task; B ~ N(0, 0.001^2): the direction turns at once
  shared    one for every task, of all matrices, as in the authors' code: its gradient is a sum
  wide      `each` with B ~ N(0, 0.3^2), where the first step is an ordinary one
Deviations from the authors' code: there the current A_t B_t is not normalised until its task is over,
and the scale of a finished task becomes a new parameter.

Keys. Inputs:
  init/l0/w [6,8] ... init/l2/b [6]; init/l0/A [3,6,2], init/l1/A [3,8,2]; init/l0/m [3], init/l1/m [3],
  init/m [3] (`shared`); init/l0/B [3,2,8], init/l1/B [3,2,7] (`each`, `shared`), wide_init/l0/B,
  wide_init/l1/B; xs [3,5,6,6] (task, step, row), ys [3,5,6], probe [8,6]; lr, r, eps
Outputs, V in {each, shared, wide}:
  V/params/<q> [3,5,...]    after every step, <q> l0/A l0/B l1/A l1/B (all slots) l0/b l1/b l2/w l2/b and
                            l0/m, l1/m [3,5,3] (`shared`: m [3,5,3])
  V/loss [3,5]              CE at the parameters before the step
  V/effective/l0/w, V/effective/l1/w [3,...]   W_eff after each task
  V/probe_logits [3,8,6]    after each task
"""

from __future__ import annotations

import factors as fx
import frozen as fr
import numpy as np
import problem as pb

LR, EPS, MAGNITUDE = 0.05, 1e-8, 0.8
SMALL, WIDE = 1e-3, 0.3


def magnitudes(params: pb.Params, name: str) -> pb.Array:
  return params.get(f'{name}/m', params.get('m'))


def direction(a: pb.Array, b: pb.Array) -> pb.Array:
  return a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + EPS)


def effective(params: pb.Params, task: int) -> pb.Params:
  updates = {}
  for name in fx.LAYERS:
    a, b, m = params[f'{name}/A'], params[f'{name}/B'], magnitudes(params, name)
    updates[name] = sum(m[i] * direction(a[i], b[i]) for i in range(task + 1))
  return fx.mlp(params, updates)


def run(init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  params, keys = dict(init), [k for k in init if k not in ('l0/w', 'l1/w')]
  trace, losses, ends = [], [], []
  for t in range(fx.TASKS):
    for s in range(fx.STEPS):
      loss, g = fx.gradients(effective(params, t), xs[t, s], ys[t, s])
      losses.append(loss)
      after = params | {k: params[k] - LR * g[k] for k in fx.PLAIN}
      for name in fx.LAYERS:
        a, b, d = params[f'{name}/A'], params[f'{name}/B'], g[f'{name}/w']
        m, key = magnitudes(params, name), f'{name}/m' if f'{name}/m' in params else 'm'
        after[key] = after[key].copy()
        for i in range(t + 1):
          after[key][i] -= LR * (d * direction(a[i], b[i])).sum()
        na, nb = np.linalg.norm(a[t]), np.linalg.norm(b[t])
        n = na * nb + EPS
        k = (d * (a[t] @ b[t])).sum() / n**2
        after[f'{name}/A'], after[f'{name}/B'] = a.copy(), b.copy()
        after[f'{name}/A'][t] -= LR * m[t] * (d @ b[t].T / n - k * nb / na * a[t])
        after[f'{name}/B'][t] -= LR * m[t] * (a[t].T @ d / n - k * na / nb * b[t])
      params = after
      trace.append({k: params[k] for k in keys})
    ends.append(effective(params, t))
  return fx.output(trace, losses, ends, probe)


def main() -> None:
  rng = np.random.default_rng(1802)
  init = pb.init_params(rng, fx.CLASSES)
  init |= fx.factors(rng, init, SMALL)
  wide = {k: v for k, v in fx.factors(rng, init, WIDE).items() if k.endswith('B')}
  each = {f'{name}/m': np.full(fx.TASKS, MAGNITUDE) for name in fx.LAYERS}
  shared = {'m': np.full(fx.TASKS, MAGNITUDE)}
  xs, ys, probe = fx.tasks(rng)
  out = pb.prefixed('init', init | each | shared) | pb.prefixed('wide_init', wide)
  out |= {'xs': xs, 'ys': ys, 'probe': probe, 'lr': LR, 'r': fx.R, 'eps': EPS}
  for v, start in (('each', init | each), ('shared', init | shared), ('wide', init | wide | each)):
    arrays = run(start, xs, ys, probe)
    fr.stable(arrays, run(fr.nearby(rng, start), xs, ys, probe))
    out |= pb.prefixed(v, arrays)
  pb.save('sdlora', out)


if __name__ == '__main__':
  main()
