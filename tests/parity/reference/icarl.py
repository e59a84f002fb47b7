"""Reference for iCaRL: golden/icarl.npz.

Rebuffi et al. 2017, algorithms 1-5. Features phi(x) = h1 / |h1|, h1 [7] the input of l2.

Rows of a step: the batch and, from the second task on, D distinct filled slots drawn before it.
Loss: mean over all these rows of sum over the 6 outputs of w_c BCE(sigmoid(z_c), q_c), where
  c in a FINISHED task   q_c = sigmoid of the logit of the saved parameters, for every row; w_c = coef
  any other c            q_c = 1 for the row's own class, else 0; w_c = 1
so outputs of classes to come are trained too (towards 0), and no row of a new class tells an old
output about its label. Gradient at the parameters before the step, p <- p - lr g.

At a boundary, with the parameters at the end of the task:
  1. m = K // (classes seen, the new ones included); old classes keep the first m of their lists.
  2. Every new class, in ascending class number, from ALL its rows of the task in stream order:
     mu = mean of phi (not renormalised); for k = 1, 2, ..., min(m, rows):
     p_k = argmin over rows not yet chosen of |mu - (phi(x) + sum_{j<k} phi(p_j)) / k|,
     ties to the lower position. No choice is within 1e-4 of a tie.
  3. The class learnt o-th (from 0) has slots o m .. o m + m - 1, in the order of its list; the
     slots it leaves and those behind the last class are empty.
  4. mean_c = mean of phi over the stored rows, divided by its norm, for every class seen.
  5. The saved parameters are the current ones.
Scores for prediction: -|phi(x) - mean_c|^2.

Class 0 has 4 rows, fewer than m = 6 at the first boundary: slots 4 and 5 are empty in task 2, and
are not drawn. Class 1 is a mixture of two clouds. No |h1| that is divided by is below 0.05.

srebuffi/iCaRL differs: all exemplars are shuffled into the new data, not D of them drawn per step;
the loss is the mean over outputs, not their sum; m is rounded up; herding takes the argmax of
<w, phi>, w = k mu - sum_{j<k} phi(p_j), the same choice for |phi| = 1, but a row may win again, which
adds it to the sum once more and not to the list; mean_c is over each image and its mirror image.

Variants: plain (coef = 1) and coef (coef = 0.5); task 1 has only other terms, so differs in nothing.
soft is plain with q_c = sigmoid(logit / 2), as GMvandeVen/continual-learning has it, and plain's slots.

Keys, V in {plain, coef, soft}. Inputs:
  init/<p> (C = 6), lr, K, D, xs [3,5,6,6], ys [3,5,6], probe [12,6]; V/coef
  V/draw_slots [3,5,D]      slots drawn before each step; -1 in task 1
  V/draw_stream [3,5,D]     the same rows as positions in xs.reshape(-1,6); -1 is no row
Outputs:
  V/params/<p> [3,5,...]    after every step
  V/loss [3,5]              before the step
  V/loss_old [3,5]          the part of the finished tasks' classes, coef included; 0 in task 1
  V/m [3]                   of each boundary
  V/slots [3,K]             content after each boundary, as positions in the stream; -1 empty
  V/means [3,6,7]           mean_c after each boundary; 0 for classes not seen
  V/probe_scores [3,12,6]   after each boundary; 0 for classes not seen
"""

from __future__ import annotations

import numpy as np
import problem as pb

STEPS, ROWS, CLASSES = 5, 6, 6
LR, CAPACITY, DRAWN = 0.15, 13, 4
TASKS = [[0, 1], [2, 3], [4, 5]]
COEF = {'plain': 1.0, 'coef': 0.5}
RARE = 4  # rows of class 0
GAP, LEAST_NORM = 1e-4, 0.05


def sigmoid(z: pb.Array) -> pb.Array:
  return 1.0 / (1.0 + np.exp(-z))


def features(params: pb.Params, x: pb.Array) -> pb.Array:
  """phi [rows, 7]."""
  h1 = pb.forward(params, x)[1][-1]
  norm = np.sqrt((h1**2).sum(axis=1, keepdims=True))
  assert norm.min() > LEAST_NORM, norm.min()
  return h1 / norm


def loss_and_grad(
  params: pb.Params,
  saved: pb.Params,
  x: pb.Array,
  y: np.ndarray,
  old: list[int],
  coef: float,
  temperature: float,
) -> tuple[float, float, pb.Params]:
  """The loss, its part of the classes `old`, and the gradient of the loss."""
  logits, cache = pb.forward(params, x)
  q = np.eye(CLASSES)[y]
  q[:, old] = sigmoid(pb.forward(saved, x)[0] / temperature)[:, old]
  w = np.ones(CLASSES)
  w[old] = coef
  # BCE(sigmoid(z), q) = log(1 + e^z) - q z
  terms = w * (np.logaddexp(0.0, logits) - q * logits) / len(x)
  grads = pb.backward(params, cache, w * (sigmoid(logits) - q) / len(x))
  return float(terms.sum()), float(terms[:, old].sum()), grads


def herd(phi: pb.Array, count: int) -> list[int]:
  """Rows of phi in the order in which they are chosen."""
  mu = phi.mean(0)
  chosen: list[int] = []
  total = np.zeros_like(mu)
  for k in range(1, min(count, len(phi)) + 1):
    distance = np.sqrt(((mu - (phi + total) / k) ** 2).sum(1))
    distance[chosen] = np.inf
    best = int(np.argmin(distance))
    assert np.delete(distance, best).min(initial=np.inf) - distance[best] > GAP, distance
    chosen.append(best)
    total = total + phi[best]
  return chosen


def draw(slots: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """D distinct filled slots; -1 before the first boundary."""
  filled = np.flatnonzero(slots >= 0)
  if len(filled) == 0:
    return np.full(DRAWN, -1, dtype=np.int64)
  return rng.choice(filled, size=DRAWN, replace=False)


def class_means(params: pb.Params, lists: dict[int, list[int]], stream_x: pb.Array) -> pb.Array:
  means = np.zeros((CLASSES, pb.HIDDEN[1]))
  for c, rows in lists.items():
    mean = features(params, stream_x[rows]).mean(0)
    means[c] = mean / np.sqrt((mean**2).sum())
  return means


def run(
  init: pb.Params,
  xs: pb.Array,
  ys: np.ndarray,
  probe: pb.Array,
  coef: float,
  draw_slots: np.ndarray | None,
  rng: np.random.Generator,
  temperature: float = 1.0,
) -> dict:
  """A whole run; the slots are drawn from `rng`, or taken from `draw_slots` [3,5,D]."""
  tasks = len(xs)
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  params, saved = dict(init), dict(init)
  lists: dict[int, list[int]] = {}  # class -> positions in the order chosen; the order of arrival
  slots = np.full(CAPACITY, -1, dtype=np.int64)
  trace, losses, drawn, positions = [], [], [], []
  ms, contents, means, scores = [], [], [], []
  for t in range(tasks):
    old = list(lists)
    for s in range(STEPS):
      pick = draw(slots, rng) if draw_slots is None else draw_slots[t, s]
      position = np.where(pick >= 0, slots[np.maximum(pick, 0)], -1)
      rows = position[position >= 0]
      assert len(rows) == (DRAWN if t else 0)
      x = np.concatenate([xs[t, s], stream_x[rows]])
      y = np.concatenate([ys[t, s], stream_y[rows]])
      loss, of_old, grads = loss_and_grad(params, saved, x, y, old, coef, temperature)
      params = pb.sgd(params, grads, LR)
      trace.append(params)
      losses.append((loss, of_old))
      drawn.append(pick)
      positions.append(position)
    new = sorted(set(ys[t].ravel().tolist()))
    m = CAPACITY // (len(old) + len(new))
    lists = {c: rows[:m] for c, rows in lists.items()}
    start, end = t * STEPS * ROWS, (t + 1) * STEPS * ROWS
    for c in new:
      own = start + np.flatnonzero(stream_y[start:end] == c)
      lists[c] = own[herd(features(params, stream_x[own]), m)].tolist()
    slots = np.full(CAPACITY, -1, dtype=np.int64)
    for o, rows in enumerate(lists.values()):
      slots[o * m : o * m + len(rows)] = rows
    ms.append(m)
    contents.append(slots)
    means.append(class_means(params, lists, stream_x))
    score = -((features(params, probe)[:, None] - means[-1]) ** 2).sum(2)
    scores.append(np.where(np.isin(np.arange(CLASSES), list(lists)), score, 0.0))
    saved = params
  out = dict(zip(('loss', 'loss_old'), np.array(losses).T.reshape(2, tasks, STEPS), strict=True))
  out |= pb.prefixed('params', pb.per_task(trace, tasks))
  return out | {
    'coef': coef,
    'draw_slots': np.array(drawn).reshape(tasks, STEPS, DRAWN),
    'draw_stream': np.array(positions).reshape(tasks, STEPS, DRAWN),
    'm': np.array(ms),
    'slots': np.array(contents),
    'means': np.array(means),
    'probe_scores': np.array(scores),
  }


def stable(out: dict, again: dict) -> None:
  """A run from nearly the same parameters: equal choices, and values that moved little."""
  for key, value in out.items():
    tolerance = 0 if np.asarray(value).dtype.kind == 'i' else 4e-7
    assert np.abs(np.asarray(value) - again[key]).max() <= tolerance, key


def main() -> None:
  rng = np.random.default_rng(1730)
  init = pb.init_params(rng, CLASSES)
  xs, ys = pb.make_tasks(rng, TASKS, STEPS, ROWS)
  ys[0].reshape(-1)[np.flatnonzero(ys[0] == 0)[RARE:]] = 1
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'lr': LR, 'K': CAPACITY, 'D': DRAWN, 'xs': xs, 'ys': ys, 'probe': probe}
  runs = {v: run(init, xs, ys, probe, coef, None, rng) for v, coef in COEF.items()}
  for v, got in runs.items():
    for _ in range(5):
      near = {k: p * (1 + 6e-8 * rng.uniform(-1, 1, p.shape)) for k, p in init.items()}
      stable(got, run(near, xs, ys, probe, COEF[v], got['draw_slots'], rng))
    assert (got['loss_old'] / got['loss'])[1:].min() > 0.05
    # Without the distillation other parameters, well beyond rounding.
    without = run(init, xs, ys, probe, 0.0, got['draw_slots'], rng)
    assert np.abs(without['params/l0/w'] - got['params/l0/w'])[-1, -1].max() > 1e-3
    assert (got['slots'][0] >= 0).sum() == RARE + 6 and got['m'].tolist() == [6, 3, 2]
    out |= pb.prefixed(v, got)
  hard, soft = (run(init, xs, ys, probe, 1.0, runs['plain']['draw_slots'], rng, T) for T in (1, 2))
  assert np.abs(hard['params/l0/w'] - soft['params/l0/w'])[-1, -1].max() > 1e-3
  out |= pb.prefixed('soft', soft)
  pb.save('icarl', out)


if __name__ == '__main__':
  main()
