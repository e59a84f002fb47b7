"""Reference for Gradient Episodic Memory: golden/gem.npz.

Lopez-Paz & Ranzato 2017, section 3, with the QP of the authors' project2cone2 (its eps and margin).
g is the gradient on the batch, G[k] the gradient of the mean cross-entropy over ALL rows stored for
the finished task k, both over all parameters as one vector (in the order of sorted names; the
result does not depend on the order). With T finished tasks, G [T,P]:
  g~ = g                  if <g, G[k]> >= 0 for every k (strict `< 0` is a violation, as published)
  g~ = G^T v + g          otherwise, where v is the minimum over v >= margin (elementwise) of
        1/2 v^T (G G^T + eps I) v + (G g)^T v
then p <- p - lr g~. Signs: quadprog minimises 1/2 v^T A v - a^T v with a = q = -G g, so its linear
term is + (G g)^T v. With mu >= 0 the multipliers of v >= margin, stationarity reads
  (G G^T + eps I) v + G g = mu,   mu_k (v_k - margin) = 0,
hence <g~, G[k]> = mu_k - eps v_k: it is -eps v_k, just below 0, for a v_k above the margin, and at
least -eps margin for the others. (An early version of the authors' code has no eps.)
Without eps and margin g~ is the Euclidean projection of g on
{u : G u >= 0}. eps is absolute, so it outweighs rows of norm below sqrt(eps): they hardly project.
The margin acts only in steps with a violation, and then on EVERY finished task.

v is exact: every set of coordinates held at the margin is tried (2^T linear systems, scaled to a
unit diagonal) and the one that meets the KKT conditions is taken; the QP is strictly convex.

Memory: per task a ring of m slots with the last m rows of the task: slot = task m + (rows of the
task so far) mod m. A step trains, then writes its batch row by row; the current task's rows are
written but give no constraint (the authors write first: no difference, as only finished tasks give
constraints, except that their batches wrap around differently and slots never filled count as rows).

1. Whole runs, 4 tasks that share the 4 classes, 5 steps of 5 rows: variants margin0 (margin 0) and
   margin (0.5), the same data.
2. Single QPs `single/*`: 12 cases with count = 1,1,2,2,...,6,6 rows, P = 16. Rows from `count` on
   are zero padding and no constraints: v is stored as 0 there. (Kept as constraints they would
   change neither g~ nor the other v; their own v would be the margin.) Even cases violate a
   constraint; of the odd ones cases 1, 5, 9 violate none. Cases 4, 8, 10 have row norms from 1e-3
   to 1e2; case 7 has two nearly parallel rows. Where no constraint is violated v is 0 and g~ = g,
   whatever the margin.
No case hinges on rounding: |<g, G[k]>| > 1e-3 |g| |G[k]| for every k; and at the solution, either
(v_k - margin) sqrt(A_kk) or mu_k / sqrt(A_kk) exceeds 1e-3 |g|, with A = G G^T + eps I.

Keys. Inputs:
  init/<p>, lr, m, eps, probe [12,6]; xs [4,5,5,6], ys [4,5,5]; V/margin, V in {margin0, margin}
  single/G [12,6,16], single/count [12], single/g [12,16], single/eps [12], single/margin [12]
Outputs:
  single/dot [12,6] = <g, G[k]> (0 in the padding), single/violated [12], single/v [12,6],
  single/projected [12,16]
  V/params/<p> [4,5,...]        after every step
  V/loss [4,5]                  of the batch before the step
  V/loss_past [4,5,3]           mean cross-entropy over the stored rows of task k (0 if not finished)
  V/dot [4,5,3] = <g, G[k]>     0 if task k is not finished
  V/violated [4,5]              1 if any dot is below 0
  V/v [4,5,3]                   0 where there is no violation or no such task
  V/dot_after [4,5,3] = <g~, G[k]>
  V/memory_stream [4,5,4 m]     content after each step, as positions in xs.reshape(-1,6); -1 empty
  V/probe_logits [4,12,4]       after each task
"""

from __future__ import annotations

import itertools

import numpy as np
import problem as pb

TASKS, STEPS, ROWS, CLASSES = 4, 5, 5, 4
LR, SLOTS, EPS = 0.12, 6, 1e-3


def flat(grads: pb.Params) -> pb.Array:
  return np.concatenate([grads[k].ravel() for k in sorted(grads)])


def unflat(vector: pb.Array, like: pb.Params) -> pb.Params:
  out, at = {}, 0
  for k in sorted(like):
    out[k] = vector[at : at + like[k].size].reshape(like[k].shape)
    at += like[k].size
  return out


def solve_qp(a: pb.Array, b: pb.Array, margin: float, scale: float) -> pb.Array:
  """min 1/2 v^T a v + b^T v over v >= margin, by trying every set of coordinates at the margin."""
  n = len(b)
  d = 1.0 / np.sqrt(np.diag(a))
  unit = d[:, None] * a * d
  found = []
  for held in itertools.product((False, True), repeat=n):
    fixed = np.array(held)
    free = ~fixed
    v = np.full(n, margin)
    if free.any():
      rhs = -(b[free] + a[np.ix_(free, fixed)] @ v[fixed])
      v[free] = d[free] * np.linalg.solve(unit[np.ix_(free, free)], d[free] * rhs)
    slack, mu = (v - margin) / d, (a @ v + b) * d
    if np.all(slack[free] > 0) and np.all(mu[fixed] > 0):
      # A test must not hinge on rounding: the active set is clear.
      assert np.all(slack[free] > 1e-3 * scale) and np.all(mu[fixed] > 1e-3 * scale), (slack, mu)
      found.append(v)
  assert len(found) == 1, found
  return found[0]


def project(
  g: pb.Array, rows: pb.Array, eps: float, margin: float
) -> tuple[pb.Array, pb.Array, pb.Array]:
  """(g~, v, <g, G[k]>)."""
  dots = rows @ g
  norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(g)
  assert np.all(np.abs(dots) > 1e-3 * norms), dots / norms
  if np.all(dots >= 0):
    return g, np.zeros(len(rows)), dots
  gram = rows @ rows.T + eps * np.eye(len(rows))
  v = solve_qp(gram, dots, margin, float(np.linalg.norm(g)))
  return rows.T @ v + g, v, dots


def one_case(
  rng: np.random.Generator, i: int, count: int, size: int, eps: float, margin: float
) -> tuple[pb.Array, ...]:
  """Draws until the case is clear of every decision and is of the kind wanted."""
  clear_of_all = i in (1, 5, 9)
  while True:
    g = rng.normal(size=size)
    rows = rng.normal(size=(count, size))
    if i == 7:
      rows[1] = rows[0] + 0.02 * rng.normal(size=size)
    if i in (4, 8, 10):
      rows /= np.linalg.norm(rows, axis=1, keepdims=True)
      rows *= rng.permutation(np.logspace(-3, 2, count))[:, None]
    if clear_of_all:
      rows *= np.sign(rows @ g)[:, None]
    try:
      projected, v, dots = project(g, rows, eps, margin)
    except AssertionError:
      continue
    active = (v <= margin).sum()
    # Violations wanted: with several rows, some held at the margin and some not.
    if clear_of_all or (dots.min() < 0 and (count < 3 or 0 < active < count)):
      return g, rows, projected, v, dots


def singles(rng: np.random.Generator) -> dict:
  counts = np.repeat(np.arange(1, 7), 2)
  cases, most, size = len(counts), 6, 16
  eps = np.array([1e-3] * cases)
  eps[3], eps[6] = 1e-2, 1e-5
  margin = np.array([0.0, 0.5, 0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 0.5, 0.5, 0.0])
  out = {
    'G': np.zeros((cases, most, size)),
    'g': np.zeros((cases, size)),
    'projected': np.zeros((cases, size)),
    'v': np.zeros((cases, most)),
    'dot': np.zeros((cases, most)),
  }
  for i, n in enumerate(counts):
    g, rows, projected, v, dots = one_case(rng, i, int(n), size, eps[i], margin[i])
    out['G'][i, :n], out['g'][i], out['projected'][i] = rows, g, projected
    out['v'][i, :n], out['dot'][i, :n] = v, dots
  violated = (out['dot'] < 0).any(1).astype(np.int64)
  assert violated.sum() == 9
  return out | {'count': counts, 'eps': eps, 'margin': margin, 'violated': violated}


def run(margin: float, init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array) -> dict:
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  memory = np.full((TASKS, SLOTS), -1, dtype=np.int64)
  params = dict(init)
  names = ('loss_past', 'dot', 'v', 'dot_after')
  keep: dict[str, list] = {n: [] for n in names}
  trace, losses, contents, logits = [], [], [], []
  position = 0
  for t in range(TASKS):
    for s in range(STEPS):
      loss, grads = pb.loss_and_grad(params, xs[t, s], ys[t, s])
      values = {n: np.zeros(TASKS - 1) for n in names}
      if t:
        past = [pb.loss_and_grad(params, stream_x[r], stream_y[r]) for r in memory[:t]]
        rows = np.stack([flat(p[1]) for p in past])
        new, values['v'][:t], values['dot'][:t] = project(flat(grads), rows, EPS, margin)
        values['loss_past'][:t] = [p[0] for p in past]
        values['dot_after'][:t] = rows @ new
        grads = unflat(new, grads)
      params = pb.sgd(params, grads, LR)
      for i in range(ROWS):
        memory[t, (s * ROWS + i) % SLOTS] = position
        position += 1
      trace.append(params)
      losses.append(loss)
      contents.append(memory.ravel().copy())
      for n in names:
        keep[n].append(values[n])
    logits.append(pb.forward(params, probe)[0])
  out = {n: np.array(v).reshape(TASKS, STEPS, TASKS - 1) for n, v in keep.items()}
  violated = (out['dot'] < 0).any(2)
  assert violated.sum() >= 4 and not violated[1:].all(), violated
  out |= pb.prefixed('params', pb.per_task(trace, TASKS))
  return out | {
    'margin': margin,
    'loss': np.array(losses).reshape(TASKS, STEPS),
    'violated': violated.astype(np.int64),
    'memory_stream': np.array(contents).reshape(TASKS, STEPS, -1),
    'probe_logits': np.stack(logits),
  }


def main(seed: int = 1745) -> None:
  rng = np.random.default_rng(seed)
  init = pb.init_params(rng)
  probe = rng.normal(size=(12, pb.INPUTS))
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  out = pb.prefixed('init', init)
  out |= {'lr': LR, 'm': SLOTS, 'eps': EPS, 'xs': xs, 'ys': ys, 'probe': probe}
  for name, margin in (('margin0', 0.0), ('margin', 0.5)):
    out |= pb.prefixed(name, run(margin, init, xs, ys, probe))
  v, many = out['margin0/v'], out['margin0/violated'][2:] == 1
  assert ((v[2:] > 0).sum(-1) >= 2)[many].any() and (v[2:] == 0).any(-1)[many].any()
  out |= pb.prefixed('single', singles(rng))
  pb.save('gem', out)


if __name__ == '__main__':
  main()
