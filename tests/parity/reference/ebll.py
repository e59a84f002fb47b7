"""Reference for encoder-based lifelong learning: golden/ebll.npz.

Rannen Triki, Aljundi, Blaschko & Tuytelaars 2017, multi-head: task t, counted from 0, has the classes
2t and 2t+1, and its head is these two of the 6 outputs. Features F = h1 [rows, 7], the input of l2.
Every finished task k has an encoder E_k [7, C], e_k [C]; the saved network is that of the last
boundary. With z_k the two logits of head k, sg a constant and CE(q, p) = -sum_c q_c log p_c:

  ce    mean over rows of the cross-entropy within the head of task t (label minus 2t)
  kd    sum over k < t of mean over rows of CE(softmax(z_saved_k / T), softmax(z_k / T))
  code  sum over k < t of mean over rows AND over the C units of
        (sigmoid(F E_k + e_k) - sg sigmoid(F_saved E_k + e_k))^2
  loss = ce + lam T^2 kd + beta code;  p <- p - lr gradient, all parameters of the network

kd is as in lwf.py: a sum over the two classes, gradient (softmax_T(z) - softmax_T(z_saved)) / (T rows).
The first task has ce alone.

Boundary of task t:
  1. The saved network is the current one.
  2. A new autoencoder, from the stored E, e, D, d of this task, on the task's batches with the network
     fixed: u = sigmoid(F E + e), r = u D + d,
       loss_a = alpha mean over rows and features of (r - F)^2 + CE within the head of r l2/w + l2/b
     `epochs` passes over the batches in the order of training; after each batch one step of Adam on
     E, e, D and d, whose state starts afresh for every autoencoder (n counts from 1):
       m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2
       p <- p - lr_a (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps), b1 0.9, b2 0.999, eps 1e-8
  3. E and e are kept as E_t and e_t, and never change again.

Mattdl/CLsurvey differs: F are the flattened convolutional features, so the reconstruction passes the
hidden layers of the classifier as well; kd has no T^2; the autoencoder is trained by Adadelta on
shuffled batches and stops by its validation accuracy; the network has momentum, and the new head may
be trained first. The paper has half the squared norm of the codes' difference and a weight per task.

Keys. Inputs:
  init/<p> (C = 6 outputs), lr, lam, T, beta, alpha, lr_a, epochs
  auto/E [3,7,3], auto/e [3,3], auto/D [3,3,7], auto/d [3,7]   initial, by task
  xs [3,5,5,6], ys [3,5,5] (class numbers), probe [12,6]
Outputs:
  ebll/params/<p> [3,5,...]   after every step
  ebll/loss [3,5]             before the step
  ebll/ce, ebll/kd, ebll/code [3,5]   the same without weights; kd and code 0 in the first task
  ebll/auto/E [3,7,3], ebll/auto/e [3,3]   E_t and e_t, after the boundary of task t
  ebll/auto_loss [3,15]       loss_a before each step of the autoencoder, passes one after the other
  ebll/probe_logits [3,12,6]  after each task
"""

from __future__ import annotations

import numpy as np
import problem as pb
from dgr import nearby, sigmoid, stable
from lwf import T, kd

STEPS, ROWS, CLASSES, UNITS, EPOCHS = 5, 5, 6, 3, 3
LR, LAM, BETA = 0.2, 1.0, 12.0  # the temperature T is lwf.py's
ALPHA, LR_A, B1, B2, EPS = 0.5, 0.03, 0.9, 0.999, 1e-8
TASKS = [[0, 1], [2, 3], [4, 5]]
WEIGHTS = {'lam': LAM, 'beta': BETA, 'alpha': ALPHA}


def features(params: pb.Params, x: pb.Array) -> pb.Array:
  return pb.forward(params, x)[1][-1]


def head(task: int) -> slice:
  return slice(2 * task, 2 * task + 2)


def backward(
  params: pb.Params, cache: tuple[pb.Array, ...], dlogits: pb.Array, dfeatures: pb.Array
) -> pb.Params:
  """Like problem.backward, of a scalar that also depends on the features h1 directly."""
  grads = pb.backward(params, cache, dlogits)
  identity = params | {'l2/w': np.eye(pb.HIDDEN[1])}
  direct = pb.backward(identity, cache, dfeatures)
  return {k: g if k.startswith('l2') else g + direct[k] for k, g in grads.items()}


def loss_and_grad(
  params: pb.Params,
  saved: pb.Params,
  encoders: list[pb.Params],
  x: pb.Array,
  y: np.ndarray,
  weights: dict[str, float],
) -> tuple[tuple[float, float, float, float], pb.Params]:
  """(loss, ce, kd, code) and the gradient of the loss."""
  t = len(encoders)
  z, cache = pb.forward(params, x)
  dz, dfeatures = np.zeros_like(z), np.zeros_like(cache[-1])
  ce, dz[:, head(t)] = pb.cross_entropy(z[:, head(t)], y - 2 * t)
  distil = code = 0.0
  z_saved, cache_saved = pb.forward(saved, x)
  for k, enc in enumerate(encoders):
    value, d = kd(z[:, head(k)], pb.softmax(z_saved[:, head(k)] / T))
    distil += value
    dz[:, head(k)] += weights['lam'] * T**2 * d
    u = sigmoid(cache[-1] @ enc['E'] + enc['e'])
    difference = u - sigmoid(cache_saved[-1] @ enc['E'] + enc['e'])
    code += float((difference**2).mean())
    du = weights['beta'] * 2 * difference / difference.size
    dfeatures += (du * u * (1 - u)) @ enc['E'].T
  loss = ce + weights['lam'] * T**2 * distil + weights['beta'] * code
  return (loss, ce, distil, code), backward(params, cache, dz, dfeatures)


def auto_loss_and_grad(
  auto: pb.Params, params: pb.Params, t: int, x: pb.Array, y: np.ndarray, alpha: float
) -> tuple[float, pb.Params]:
  """loss_a and its gradient by E, e, D and d."""
  f = features(params, x)
  u = sigmoid(f @ auto['E'] + auto['e'])
  r = u @ auto['D'] + auto['d']
  w, b = params['l2/w'][:, head(t)], params['l2/b'][head(t)]
  ce, dz = pb.cross_entropy(r @ w + b, y - 2 * t)
  dr = alpha * 2 * (r - f) / f.size + dz @ w.T
  da = (dr @ auto['D'].T) * u * (1 - u)
  loss = alpha * float(((r - f) ** 2).mean()) + ce
  return loss, {'E': f.T @ da, 'e': da.sum(0), 'D': u.T @ dr, 'd': dr.sum(0)}


def train_autoencoder(
  auto: pb.Params, params: pb.Params, t: int, xs: pb.Array, ys: np.ndarray, alpha: float
) -> tuple[pb.Params, list[float]]:
  """E, e, D and d after all passes over xs [steps, rows, 6]; the losses before the steps."""
  m = {k: np.zeros_like(p) for k, p in auto.items()}
  v = {k: np.zeros_like(p) for k, p in auto.items()}
  losses = []
  for n in range(1, EPOCHS * STEPS + 1):
    s = (n - 1) % STEPS
    loss, grads = auto_loss_and_grad(auto, params, t, xs[s], ys[s], alpha)
    losses.append(loss)
    stepped: pb.Params = {}
    for k, g in grads.items():
      m[k] = B1 * m[k] + (1 - B1) * g
      v[k] = B2 * v[k] + (1 - B2) * g**2
      mean, square = m[k] / (1 - B1**n), v[k] / (1 - B2**n)
      stepped[k] = auto[k] - LR_A * mean / (np.sqrt(square) + EPS)
    auto = stepped
  return auto, losses


def run(data: dict, init: pb.Params, autos: pb.Params, weights: dict[str, float]) -> dict:
  xs, ys = data['xs'], data['ys']
  tasks = len(xs)
  params, saved, encoders = dict(init), dict(init), []
  trace, losses, auto_losses, logits = [], [], [], []
  for t in range(tasks):
    for s in range(STEPS):
      terms, grads = loss_and_grad(params, saved, encoders, xs[t, s], ys[t, s], weights)
      params = pb.sgd(params, grads, LR)
      trace.append(params)
      losses.append(terms)
    saved = params
    start = {k: a[t] for k, a in autos.items()}
    auto, of_auto = train_autoencoder(start, params, t, xs[t], ys[t], weights['alpha'])
    encoders.append({k: auto[k] for k in ('E', 'e')})
    auto_losses.append(of_auto)
    logits.append(pb.forward(params, data['probe'])[0])
  out = pb.prefixed('params', pb.per_task(trace, tasks)) | pb.prefixed('auto', pb.stack(encoders))
  terms = np.array(losses).T.reshape(4, tasks, STEPS)
  out |= dict(zip(('loss', 'ce', 'kd', 'code'), terms, strict=True))
  return out | {'auto_loss': np.array(auto_losses), 'probe_logits': np.stack(logits)}


def main() -> None:
  rng = np.random.default_rng(2101)
  init = pb.init_params(rng, CLASSES)
  n, f = len(TASKS), pb.HIDDEN[1]
  autos = {
    'E': rng.normal(size=(n, f, UNITS)) * np.sqrt(1 / f),
    'e': rng.normal(size=(n, UNITS)) * 0.2,
    'D': rng.normal(size=(n, UNITS, f)) * np.sqrt(1 / UNITS),
    'd': rng.normal(size=(n, f)) * 0.2,
  }
  xs, ys = pb.make_tasks(rng, TASKS, STEPS, ROWS)
  data = {'xs': xs, 'ys': ys, 'probe': rng.normal(size=(12, pb.INPUTS))}
  got = run(data, init, autos, WEIGHTS)
  for _ in range(5):
    stable(got, run(data, nearby(rng, init), nearby(rng, autos), WEIGHTS))
  # Every term matters, well beyond rounding; the autoencoder's own loss has both of its terms.
  for k in ('lam', 'beta'):
    other = run(data, init, autos, WEIGHTS | {k: 0.0})
    for p in ('l0/w', 'l1/w'):
      assert np.abs(other[f'params/{p}'] - got[f'params/{p}'])[-1, -1].max() > 3e-3, (k, p)
  other = run(data, init, autos, WEIGHTS | {'alpha': 0.0})
  assert np.abs(other['auto/E'] - got['auto/E']).max() > 1e-2
  assert got['auto_loss'][:, -STEPS:].mean() < got['auto_loss'][:, :STEPS].mean()
  for t in range(n):
    last = {k: got[f'params/{k}'][t, -1] for k in init}
    active = features(last, xs[t].reshape(-1, pb.INPUTS)).std(0) > 0.05
    assert active.sum() >= 4, active
  out = pb.prefixed('init', init) | pb.prefixed('auto', autos) | data
  out |= WEIGHTS | {'lr': LR, 'T': T, 'lr_a': LR_A, 'epochs': EPOCHS}
  pb.save('ebll', out | pb.prefixed('ebll', got))


if __name__ == '__main__':
  main()
