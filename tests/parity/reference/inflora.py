"""Reference for InfLoRA on an MLP: golden/inflora.npz. NumPy, gradients by hand.

Liang & Li 2024 (CVPR), alg. 1; liangyanshuo/InfLoRA (methods/inflora.py). A_t [in,r], B_t [r,out], scale 1:

  W_eff = W + sum_{i<=t} A_i B_i

For each of l0, l1 (whose inputs X are x and h0 = relu(...), rows of the network as it is then):
1. The first `warm` steps of task t sum H = X^T X / rows over these steps, X taken before the update of
   the step. B_t stays 0 in them. After the last of them A_t = the r leading left singular vectors of
   (I - P) H, with P [in,in] the projector on what earlier tasks used (0 in the first task). A_t is fixed.
2. Every later step trains B_t by p <- p - lr gradient: dB_t = A_t^T D, D the gradient by W_eff.
3. At the boundary H is taken anew over ALL rows of the task, each once, with the final parameters, and P
   is extended by the fewest leading directions u_1, u_2 ... of the residual for which the kept share of
   the energy is at least eps_t = 0.95 + 0.05 t / T (T tasks, t from 0; 1 is never reached). P <- P + U U^T.
The biases and the head are trained as well, in the warm steps too unless said otherwise.
Sign of a column: the entry of greatest magnitude is positive (a sign of A_t is a sign of B_t's row; A_t B_t,
losses and logits do not depend on it, so compare `product`).
Variants, which differ in 3 (and `paper` in 1):
  singular  u: left singular vectors of (I - P) H; energy: the singular values, unsquared (those of H are
            the squares of the inputs'). kept = 1 - (sum sv((I-P) H) - sum of the first k) / sum sv(H)
  code      the same with every singular value squared, as in the authors' code
  inputs    u: eigenvectors of (I - P) H (I - P), i.e. left singular vectors of the inputs' residual;
            energy: the eigenvalues, so kept = trace(P_new H) / trace(H) exactly
  paper     `inputs`, with A_t too the leading eigenvectors of (I - P) H (I - P)
  still     `singular`, with biases and head too at rest in the warm steps
The numbers of directions of the first two tasks are the same with eps_t = 0.95 + 0.05 t / (T - 1).
Deviations from the authors' code: it takes one direction fewer in the first task, divides A by sqrt(3),
stores the complement once it is the smaller (the same projector), makes a pass over the task's data
before it trains, and trains a head per task and B on the keys and values of attention only.

Keys. Inputs:
  init/l0/w [6,8] ... init/l2/b [6]; xs [3,5,6,6] (task, step, row), ys [3,5,6], probe [8,6]; lr, r, warm
Outputs, V in {singular, code, inputs, paper, still}:
  V/params/<q> [3,5,...]    after every step, <q> l0/B [3,2,8], l1/B [3,2,7] (all slots) l0/b l1/b l2/w l2/b
  V/A/l0 [3,6,2], V/A/l1 [3,8,2]           of every task
  V/H_warm/l0 [3,6,6], V/H_warm/l1 [3,8,8] the moment that A_t comes from
  V/P/l0 [3,6,6], V/P/l1 [3,8,8], V/k/l0 [3], V/k/l1 [3]    after each boundary: P and its rank
  V/product/l0 [3,6,8], V/product/l1 [3,8,7]                A_t B_t at the end of task t
  V/effective/l0/w, V/effective/l1/w [3,...]                W_eff after each task
  V/loss [3,5]              CE at the parameters before the step
  V/probe_logits [3,8,6]    after each task
"""

from __future__ import annotations

import factors as fx
import frozen as fr
import numpy as np
import problem as pb

LR, WARM, EPS = 0.1, 2, 0.95
VARIANTS = ('singular', 'code', 'inputs', 'paper', 'still')


def leading(variant: str, h: pb.Array, p: pb.Array) -> tuple[pb.Array, pb.Array, float]:
  """Directions of the residual (columns), their energies, and the energy of the whole."""
  q = np.eye(len(h)) - p
  if variant in ('inputs', 'paper'):
    values, vectors = np.linalg.eigh(q @ h @ q)
    return vectors[:, ::-1], np.maximum(values[::-1], 0.0), float(np.trace(h))
  u, sv, _ = np.linalg.svd(q @ h)
  power = 2 if variant == 'code' else 1
  return u, sv**power, float((np.linalg.svd(h)[1] ** power).sum())


def cut(vectors: pb.Array, values: pb.Array, k: int, least: float = 1e-3) -> pb.Array:
  """The first k columns with their signs fixed; refuses a cut that rounding could move."""
  assert k == 0 or values[k - 1] > least * values[0]
  assert k == len(values) or k == 0 or values[k] < 0.8 * values[k - 1], (k, values)
  top = vectors[:, :k]
  return top * np.sign(top[np.abs(top).argmax(0), np.arange(k)])


def down(variant: str, h: pb.Array, p: pb.Array) -> pb.Array:
  vectors, values, _ = leading('paper' if variant == 'paper' else 'singular', h, p)
  assert values[1] < 0.9 * values[0]  # the two columns are told apart
  return cut(vectors, values, fx.R)


def extend(variant: str, h: pb.Array, p: pb.Array, task: int) -> tuple[pb.Array, int]:
  vectors, values, total = leading(variant, h, p)
  kept = 1 - (values.sum() - np.concatenate([[0.0], np.cumsum(values)])) / total
  counts = []
  for steps in (fx.TASKS, fx.TASKS - 1) if task < fx.TASKS - 1 else (fx.TASKS,):
    eps = EPS + (1 - EPS) * task / steps
    assert np.abs(kept - eps).min() > 2e-4, kept
    counts.append(int(np.argmax(kept >= eps)))
  assert len(set(counts)) == 1, (counts, kept)
  u = cut(vectors, values, counts[0], 1e-6 if variant == 'code' else 1e-3)
  return p + u @ u.T, counts[0]


def effective(params: pb.Params, task: int) -> pb.Params:
  updates = {}
  for name in fx.LAYERS:
    a, b = params[f'{name}/A'], params[f'{name}/B']
    updates[name] = np.asarray(sum(a[i] @ b[i] for i in range(task + 1)))
  return fx.mlp(params, updates)


def moments(plain: pb.Params, x: pb.Array) -> pb.Params:
  """X^T X / rows of the inputs of l0 and l1."""
  h0 = pb.forward(plain, x)[1][2]
  return {'l0': x.T @ x / len(x), 'l1': h0.T @ h0 / len(x)}


def run(variant: str, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  params = dict(init)
  keys = ['l0/B', 'l1/B', *fx.PLAIN]
  for name in fx.LAYERS:
    fan_in, fan_out = init[f'{name}/w'].shape
    params[f'{name}/A'] = np.zeros((fx.TASKS, fan_in, fx.R))
    params[f'{name}/B'] = np.zeros((fx.TASKS, fx.R, fan_out))
  p = {n: np.zeros((len(init[f'{n}/w']),) * 2) for n in fx.LAYERS}
  rank = dict.fromkeys(fx.LAYERS, 0)
  trace, losses, ends, tasks = [], [], [], []
  for t in range(fx.TASKS):
    warm: list[pb.Params] = []
    for s in range(fx.STEPS):
      plain = effective(params, t)
      loss, g = fx.gradients(plain, xs[t, s], ys[t, s])
      losses.append(loss)
      after = dict(params)
      if s >= WARM or variant != 'still':
        after |= {k: params[k] - LR * g[k] for k in fx.PLAIN}
      if s >= WARM:
        for name in fx.LAYERS:
          after[f'{name}/B'] = params[f'{name}/B'].copy()
          after[f'{name}/B'][t] -= LR * params[f'{name}/A'][t].T @ g[f'{name}/w']
      else:
        warm.append(moments(plain, xs[t, s]))
      if s == WARM - 1:
        mean = {n: np.mean([m[n] for m in warm], axis=0) for n in fx.LAYERS}
        for name in fx.LAYERS:
          after[f'{name}/A'] = params[f'{name}/A'].copy()
          after[f'{name}/A'][t] = down(variant, mean[name], p[name])
      params = after
      trace.append({k: params[k] for k in keys})
    plain = effective(params, t)
    ends.append(plain)
    whole = moments(plain, xs[t].reshape(-1, pb.INPUTS))
    entry = pb.prefixed('H_warm', mean)
    for name in fx.LAYERS:
      a, b = params[f'{name}/A'][t], params[f'{name}/B'][t]
      assert np.abs(p[name] @ a).max() < 1e-9  # A_t is orthogonal to what was kept
      p[name], more = extend(variant, whole[name], p[name], t)
      rank[name] += more
      entry |= {f'A/{name}': a, f'product/{name}': a @ b}
      entry |= {f'P/{name}': p[name], f'k/{name}': rank[name]}
    tasks.append(entry)
  return fx.output(trace, losses, ends, probe) | pb.stack(tasks)


def data(rng: np.random.Generator) -> tuple[pb.Array, np.ndarray, pb.Array]:
  """As fx.tasks, with the inputs of every task close to a plane of its own."""
  _, ys, probe = fx.tasks(rng)
  axes = np.linalg.qr(rng.normal(size=(pb.INPUTS, pb.INPUTS)))[0]
  xs = np.zeros((*ys.shape, pb.INPUTS))
  for t in range(fx.TASKS):
    sizes = np.full(pb.INPUTS, 0.15)
    sizes[2 * t : 2 * t + 2] = 1.6, 0.9
    sizes *= rng.uniform(0.7, 1.3, size=pb.INPUTS)
    centre = rng.normal(size=(2, pb.INPUTS))
    within = rng.normal(size=xs[t].shape)
    xs[t] = ((centre[ys[t] - 2 * t] + within) * sizes) @ axes.T
  return xs, ys, probe


def generate(seed: int) -> dict:
  rng = np.random.default_rng(seed)
  init = pb.init_params(rng, fx.CLASSES)
  xs, ys, probe = data(rng)
  out = pb.prefixed('init', init)
  out |= {'xs': xs, 'ys': ys, 'probe': probe, 'lr': LR, 'r': fx.R, 'warm': WARM}
  for v in VARIANTS:
    arrays = run(v, init, xs, ys, probe)
    fr.stable(arrays, run(v, fr.nearby(rng, init), xs, ys, probe))
    out |= pb.prefixed(v, arrays)
  return out


def main() -> None:
  pb.save('inflora', generate(3539))


if __name__ == '__main__':
  main()
