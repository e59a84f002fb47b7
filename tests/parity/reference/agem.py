"""Reference for Averaged GEM: golden/agem.npz.

Chaudhry et al. 2019 (A-GEM), eq. 11: with g the gradient on the batch and r the gradient of the
mean cross-entropy on a reference batch of past examples, both over all parameters as one vector,
  g~ = g                       if <g, r> >= 0
  g~ = g - (<g, r> / <r, r>) r  if <g, r> < 0
No epsilon in the denominator (GMvandeVen/continual-learning adds 1e-7). Then p <- p - lr g~.

1. Single projections: `single/*`, eight cases at the parameters init with a batch and a reference
   batch each; some violate the constraint and some do not.
2. Whole runs with a ring memory: FIFO with m slots per key, written after the step, row by row in
   batch order. Only what tasks FINISHED so far have written may be drawn: while task t trains, its
   own rows are written but not drawable, as in the authors' fc_permute_mnist.py. In the first task
   there is no reference.
   by_class   2 tasks with classes 0-1 and 2-3, slots keyed by class:
              slot = class m + (rows of the class so far) mod m. No class occurs in two tasks.
   by_task    3 tasks that share the 4 classes, slots keyed by task and class:
              slot = (task 4 + class) m + (rows of that task and class so far) mod m.
   A reference batch is D distinct rows of the drawable FILLED slots. Deviation: the authors' code
   may draw slots of finished tasks that were never filled (zero rows).

Keys. Inputs:
  init/<p>, lr, m, probe [12,6]
  single/x [8,5,6] single/y [8,5] single/x_ref [8,6,6] single/y_ref [8,6]
  V/xs [K,5,5,6], V/ys [K,5,5]    for V in by_class (K=2), by_task (K=3)
  V/draw_slots [K,5,D]            the slots drawn for each step, -1 in the first task
Outputs:
  single/g/<p>, single/g_ref/<p>, single/projected/<p> [8,...]; single/dot [8] = <g, r>;
  single/violated [8] (0 or 1)
  V/x_ref [K,5,D,6], V/y_ref [K,5,D]   the rows that draw_slots fetch (0 and -1 in the first task)
  V/draw_stream [K,5,D]           the same rows as positions in the stream of all rows seen,
                                  V/xs.reshape(-1, 6)
  V/params/<p> [K,5,...]          after every step
  V/loss [K,5], V/loss_ref [K,5]  batch and reference loss before the step (0 without reference)
  V/dot [K,5], V/violated [K,5]
  V/memory_stream [K,5,slots]     content after each step's write, as positions in the stream of all
                                  rows; -1 is empty
  V/probe_logits [K,12,4]         after each task
"""

from __future__ import annotations

import numpy as np
import problem as pb

STEPS, ROWS, CLASSES = 5, 5, 4
LR, SLOTS, DRAWN = 0.3, 3, 4


def flat(grads: pb.Params) -> pb.Array:
  return np.concatenate([grads[k].ravel() for k in sorted(grads)])


def project(g: pb.Params, ref: pb.Params) -> tuple[pb.Params, float]:
  """(projected gradient, inner product <g, r>)."""
  vg, vr = flat(g), flat(ref)
  dot = float(vg @ vr)
  # A test must not hinge on rounding: no case within a hair of orthogonality.
  assert abs(dot) > 1e-3 * np.linalg.norm(vg) * np.linalg.norm(vr), dot
  if dot >= 0:
    return g, dot
  return {k: g[k] - (dot / float(vr @ vr)) * ref[k] for k in g}, dot


def singles(rng: np.random.Generator, params: pb.Params) -> dict:
  cases = 8
  x, x_ref = rng.normal(size=(cases, ROWS, pb.INPUTS)), rng.normal(size=(cases, 6, pb.INPUTS))
  y = rng.integers(0, CLASSES, size=(cases, ROWS))
  y_ref = rng.integers(0, CLASSES, size=(cases, 6))
  for i in range(0, cases, 2):  # near-copies of the batch under other labels: a conflict
    x_ref[i, :ROWS] = x[i] + 0.1 * x_ref[i, :ROWS]
    y_ref[i, :ROWS] = (y[i] + 1) % CLASSES
  gs, refs, projected, dots = [], [], [], []
  for i in range(cases):
    g = pb.loss_and_grad(params, x[i], y[i])[1]
    ref = pb.loss_and_grad(params, x_ref[i], y_ref[i])[1]
    new, dot = project(g, ref)
    gs.append(g)
    refs.append(ref)
    projected.append(new)
    dots.append(dot)
  violated = np.array(dots) < 0
  assert 2 <= violated.sum() <= cases - 2, dots
  out = {
    'x': x,
    'y': y,
    'x_ref': x_ref,
    'y_ref': y_ref,
    'dot': dots,
    'violated': violated.astype(np.int64),
  }
  out |= pb.prefixed('g', pb.stack(gs)) | pb.prefixed('g_ref', pb.stack(refs))
  return out | pb.prefixed('projected', pb.stack(projected))


def run(
  by_task: bool,
  init: pb.Params,
  xs: pb.Array,
  ys: np.ndarray,
  probe: pb.Array,
  rng: np.random.Generator,
) -> dict:
  tasks = len(xs)
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  keys = (tasks if by_task else 1) * CLASSES
  memory = np.full(keys * SLOTS, -1, dtype=np.int64)  # slot -> position in the stream
  written = np.zeros(keys, dtype=np.int64)
  params = dict(init)
  trace, scalars, slots_drawn, contents, logits = [], [], [], [], []
  position = 0
  for t in range(tasks):
    # What may be drawn is fixed at the boundary. No slot of it is overwritten during the task: a
    # key belongs to one task only in both layouts.
    drawable = np.flatnonzero(memory >= 0)
    for s in range(STEPS):
      loss, g = pb.loss_and_grad(params, xs[t, s], ys[t, s])
      drawn, loss_ref, dot = np.full(DRAWN, -1, dtype=np.int64), 0.0, 0.0
      if len(drawable):
        drawn = rng.choice(drawable, size=DRAWN, replace=False)
        rows = memory[drawn]
        assert np.all(rows < t * STEPS * ROWS)
        loss_ref, ref = pb.loss_and_grad(params, stream_x[rows], stream_y[rows])
        g, dot = project(g, ref)
      params = pb.sgd(params, g, LR)
      for label in ys[t, s]:
        key = (t * CLASSES if by_task else 0) + int(label)
        memory[key * SLOTS + written[key] % SLOTS] = position
        written[key] += 1
        position += 1
      trace.append(params)
      scalars.append((loss, loss_ref, dot, dot < 0))
      slots_drawn.append(drawn)
      contents.append(memory.copy())
    logits.append(pb.forward(params, probe)[0])
  loss, loss_ref, dot, violated = np.array(scalars).T.reshape(4, tasks, STEPS)
  assert violated.any() and (not by_task or not violated[1:].all())
  draw = np.array(slots_drawn).reshape(tasks, STEPS, DRAWN)
  # The slots of finished tasks do not change, so the memory after the step still holds the rows.
  after = np.array(contents).reshape(tasks, STEPS, -1)
  rows = np.where(draw >= 0, np.take_along_axis(after, np.maximum(draw, 0), axis=2), -1)
  out = pb.prefixed('params', pb.per_task(trace, tasks))
  return out | {
    'xs': xs,
    'ys': ys,
    'draw_slots': draw,
    'draw_stream': rows,
    'x_ref': np.where(rows[..., None] >= 0, stream_x[rows], 0.0),
    'y_ref': np.where(rows >= 0, stream_y[rows], -1),
    'loss': loss,
    'loss_ref': loss_ref,
    'dot': dot,
    'violated': violated.astype(np.int64),
    'memory_stream': after,
    'probe_logits': np.stack(logits),
  }


def main() -> None:
  rng = np.random.default_rng(1703)
  init = pb.init_params(rng)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init) | {'lr': LR, 'm': SLOTS, 'probe': probe}
  out |= pb.prefixed('single', singles(rng, init))
  for name, by_task, classes in (
    ('by_class', False, [[0, 1], [2, 3]]),
    ('by_task', True, [[0, 1, 2, 3]] * 3),
  ):
    xs, ys = pb.make_tasks(rng, classes, STEPS, ROWS)
    out |= pb.prefixed(name, run(by_task, init, xs, ys, probe, rng))
  pb.save('agem', out)


if __name__ == '__main__':
  main()
