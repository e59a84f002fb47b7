"""Reference for Hard Attention to the Task: golden/hat.npz.

Serra et al. 2018, eq. 1-6, and the order of operations of the authors' code (joansj/hat,
src/approaches/hat.py, src/networks/mlp_hat.py). Task-incremental: the task is known in training and
test, each task has a slice of the output as its head (task 0: columns 0-1, task 1: columns 2-3;
labels here are global, the cross-entropy is over the slice). Embeddings e0 [tasks, 8] and e1
[tasks, 7], one row a task. No dropout. Plain SGD with one lr for everything.

Network at scale s in task t: g_l = sigmoid(s e_l[t]); h0 = relu(x w0 + b0) g_0;
h1 = relu(h0 w1 + b1) g_1; logits = (h1 w2 + b2)[:, head t].

One step, in order:
  1. s by the position in the epoch (below), forward, gates from the step's parameters.
  2. loss = CE + c R, R = sum_l sum_i g_l,i (1 - m_l,i) / sum_l sum_i (1 - m_l,i): ONE quotient over
     both layers together; m is the cumulative gate of the finished tasks, a constant (0 in task 0,
     so R is then the mean gate).
  3. Gradients of everything, embeddings included (through CE and R).
  4. From task 1 on, gradients of weights are multiplied by 1 - min(m of the output unit, m of the
     input unit); in the FIRST layer by 1 - m of the output unit alone; biases by 1 - m of their
     unit. The OUTPUT layer (w2, b2) is not masked: heads are apart, and columns of another head
     have gradient 0.
  5. The embedding gradient (after 3) is multiplied by
     (smax / s) (cosh(clip(s e, -50, 50)) + 1) / (cosh(e) + 1).
  6. The norm of ALL gradients together, compensated ones included, is clipped to 10000 (never
     reached here: max_grad_norm says how far it was; a method without this clip agrees).
  7. p <- p - lr gradient; then every embedding is clipped to [-6, 6].
At the boundary: m_l <- max(m_l, sigmoid(smax e_l[t])) elementwise, soft (no threshold). Test with
s = smax, soft gates. No learning-rate decay, no early stopping, no choice of the best epoch.

Annealing, with batch b = 0..B-1 in an epoch of B batches; it restarts in every epoch:
  paper      s = 1/smax + (smax - 1/smax) b / (B - 1)      reaches smax in the last batch (eq. 3)
  official   s = 1/smax + (smax - 1/smax) b / B            the code's form: never reaches smax

Deviations: smax is far below the published 400 so that gates stay soft and float64 keeps its
digits (at s e > 15 the product g (1 - g) loses them to cancellation, and step 5 multiplies that by
up to cosh 50); the clip of step 5 is tested apart under compensation/*, with smax = 400.

Keys. Inputs:
  init/<p>, init/e0 [2,8], init/e1 [2,7]; lr, c, smax; probe [12,6]
  xs [2,6,5,6], ys [2,6,5]       steps 0-2 are epoch 0, steps 3-5 epoch 1 (the same three batches)
  compensation/e [40], compensation/s [40], compensation/smax, compensation/grad_in [40]
Outputs for V in {paper, official}:
  V/s [2,6]; V/params/<p> [2,6,...]     after every step, V/params/e0 [2,6,2,8], e1 likewise
  V/loss [2,6], V/ce [2,6], V/reg [2,6] loss = ce + c reg, at the parameters before the step
  V/grad_e0 [2,6,8], V/grad_e1 [2,6,7]  gradient of row e[t] after step 5 of the order above
  V/cumulative/g0 [2,8], g1 [2,7]       m after boundary t
  V/gates/g0 [2,8], g1 [2,7]            sigmoid(smax e[t]) at boundary t
  V/probe_logits [2,2,12,2]             [after task, of task (a later task: 0), row, head unit]
  V/max_grad_norm                       largest value compared in step 6
  compensation/grad_out [40]            step 5 for the given values
"""

from __future__ import annotations

import numpy as np
import problem as pb

TASKS, EPOCHS, BATCHES, ROWS = 2, 2, 3, 5
LR, C, SMAX, COSH_CLIP, E_CLIP, NORM_CLIP = 0.2, 0.75, 5.0, 50.0, 6.0, 10000.0
GATES = ('e0', 'e1')


def sigmoid(v: pb.Array) -> pb.Array:
  return 1.0 / (1.0 + np.exp(-v))


def head(task: int) -> slice:
  return slice(2 * task, 2 * task + 2)


def gated(params: pb.Params, task: int, s: float, x: pb.Array) -> tuple[pb.Array, tuple]:
  """Logits of the task's head [n,2], and what `gradients` needs."""
  g0, g1 = sigmoid(s * params['e0'][task]), sigmoid(s * params['e1'][task])
  a0 = x @ params['l0/w'] + params['l0/b']
  r0 = np.maximum(a0, 0)
  a1 = (r0 * g0) @ params['l1/w'] + params['l1/b']
  r1 = np.maximum(a1, 0)
  logits = ((r1 * g1) @ params['l2/w'] + params['l2/b'])[:, head(task)]
  return logits, (x, a0, r0, g0, a1, r1, g1)


def gradients(
  params: pb.Params, task: int, s: float, x: pb.Array, y: np.ndarray, m: list[pb.Array]
) -> tuple[float, float, pb.Params]:
  """(CE, R, gradients of CE + c R)."""
  logits, (x, a0, r0, g0, a1, r1, g1) = gated(params, task, s, x)
  ce, d = pb.cross_entropy(logits, y - 2 * task)
  free = sum(float((1 - v).sum()) for v in m)
  reg = float((g0 * (1 - m[0])).sum() + (g1 * (1 - m[1])).sum()) / free
  grads = {k: np.zeros_like(v) for k, v in params.items()}
  grads['l2/w'][:, head(task)] = (r1 * g1).T @ d
  grads['l2/b'][head(task)] = d.sum(0)
  dh1 = d @ params['l2/w'][:, head(task)].T
  da1 = dh1 * g1 * (a1 > 0)
  grads['l1/w'], grads['l1/b'] = (r0 * g0).T @ da1, da1.sum(0)
  dh0 = da1 @ params['l1/w'].T
  da0 = dh0 * g0 * (a0 > 0)
  grads['l0/w'], grads['l0/b'] = x.T @ da0, da0.sum(0)
  dg0 = (dh0 * r0).sum(0) + C * (1 - m[0]) / free
  dg1 = (dh1 * r1).sum(0) + C * (1 - m[1]) / free
  grads['e0'][task] = dg0 * s * g0 * (1 - g0)
  grads['e1'][task] = dg1 * s * g1 * (1 - g1)
  return ce, reg, grads


def compensate(grad: pb.Array, e: pb.Array, s: pb.Array | float, smax: float) -> pb.Array:
  top = np.cosh(np.clip(s * e, -COSH_CLIP, COSH_CLIP)) + 1
  return grad * (smax / s) * top / (np.cosh(e) + 1)


def anneal(kind: str, batch: int) -> float:
  whole = BATCHES - 1 if kind == 'paper' else BATCHES
  return 1 / SMAX + (SMAX - 1 / SMAX) * batch / whole


def run(kind: str, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  params = dict(init)
  m = [np.zeros(pb.HIDDEN[0]), np.zeros(pb.HIDDEN[1])]
  trace, scalars, e_grads, cumulative, own = [], [], [], [], []
  logits = np.zeros((TASKS, TASKS, len(probe), 2))
  largest = 0.0
  for t in range(TASKS):
    for step in range(EPOCHS * BATCHES):
      s = anneal(kind, step % BATCHES)
      ce, reg, grads = gradients(params, t, s, xs[t, step], ys[t, step], m)
      if t > 0:
        grads['l0/w'] *= 1 - m[0][None, :]
        grads['l0/b'] *= 1 - m[0]
        grads['l1/w'] *= 1 - np.minimum(m[1][None, :], m[0][:, None])
        grads['l1/b'] *= 1 - m[1]
      for k in GATES:
        # Digits: see the docstring. The negative side is harmless, 1 - g is then near 1.
        assert (s * params[k][t]).max() < 14, (kind, t, step, k, (s * params[k][t]).max())
        grads[k] = compensate(grads[k], params[k], s, SMAX)
      norm = float(np.sqrt(sum((g**2).sum() for g in grads.values())))
      assert norm < NORM_CLIP
      largest = max(largest, norm)
      params = pb.sgd(params, grads, LR)
      for k in GATES:
        params[k] = np.clip(params[k], -E_CLIP, E_CLIP)
      trace.append(params)
      scalars.append((s, ce + C * reg, ce, reg))
      e_grads.append({k: grads[k][t] for k in GATES})
    gates = [sigmoid(SMAX * params[k][t]) for k in GATES]
    m = [np.maximum(a, b) for a, b in zip(m, gates, strict=True)]
    own.append({'g0': gates[0], 'g1': gates[1]})
    cumulative.append({'g0': m[0], 'g1': m[1]})
    for of in range(t + 1):
      logits[t, of] = gated(params, of, SMAX, probe)[0]
  s, loss, ce, reg = np.array(scalars).T.reshape(4, TASKS, -1)
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  out |= pb.prefixed('cumulative', pb.stack(cumulative)) | pb.prefixed('gates', pb.stack(own))
  out |= {f'grad_{k}': v for k, v in pb.per_task(e_grads, TASKS).items()}
  return out | {
    's': s,
    'loss': loss,
    'ce': ce,
    'reg': reg,
    'probe_logits': logits,
    'max_grad_norm': largest,
  }


def main() -> None:
  rng = np.random.default_rng(1705)
  init = pb.init_params(rng)
  for k, units in zip(GATES, pb.HIDDEN, strict=True):
    init[k] = rng.normal(size=(TASKS, units)) * 0.5
    init[k][:, 1] = -5.999  # the regulariser pushes this gate down, into the clip at -6
  x, y = pb.make_tasks(rng, [[0, 1], [2, 3]], BATCHES, ROWS)
  xs, ys = np.tile(x, (1, EPOCHS, 1, 1)), np.tile(y, (1, EPOCHS, 1))
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'lr': LR, 'c': C, 'smax': SMAX, 'xs': xs, 'ys': ys, 'probe': probe}
  for kind in ('paper', 'official'):
    out |= pb.prefixed(kind, run(kind, init, xs, ys, probe))
  smax = 400.0
  e, g = rng.uniform(-6, 6, size=40), rng.normal(size=40)
  s = 1 / smax + (smax - 1 / smax) * rng.choice([0, 0.01, 0.1, 0.5, 1.0], size=40)
  assert 5 < (np.abs(s * e) > COSH_CLIP).sum() < 35
  out |= pb.prefixed(
    'compensation',
    {'e': e, 's': s, 'smax': smax, 'grad_in': g, 'grad_out': compensate(g, e, s, smax)},
  )
  pb.save('hat', out)


if __name__ == '__main__':
  main()
