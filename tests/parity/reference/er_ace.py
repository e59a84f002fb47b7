"""Reference for ER with asymmetric cross-entropy: golden/er_ace.npz.

Caccia et al. 2022 (New Insights on Reducing Abrupt Representation Change):
  loss = mean over the batch of CE, the softmax over the classes PRESENT IN THIS BATCH only
       + mean over the drawn memory rows of CE, the softmax over all 4 outputs
Two means, added with weight 1 each. Outputs of absent classes get no gradient from the first term.
Nothing is drawn from an empty memory: the very first step has the first term alone. Tasks do not
matter to the method.

Order in a step: draw min(D, filled) distinct slots, gradient of the loss at the parameters before
the step, p <- p - lr g, then the batch is written row by row in order. Reservoir: see reservoir.py.

aimagelab/mammoth differs: no mask and no memory term in the first task, and outputs from the
highest class seen so far upwards stay in the softmax until the last class has been seen.

Variants:
  tasks       3 tasks with classes [0,1], [2,3], [0,3]; every batch holds both classes of its task.
  one_class   the same tasks, every batch holds ONE class (they alternate at random): the first
              term and its gradient are exactly 0, so the first step changes nothing.

Keys, V in {tasks, one_class}. Inputs:
  init/<p>, lr, capacity (M), probe [12,6]; V/xs [3,5,5,6], V/ys [3,5,5]
  V/j [3,5,5]                   the draw j for each row written; -1 while n < M
  V/draw_slots [3,5,D]          slots drawn before each step; -1 is no row (D = 6: step 1 has 5)
  V/draw_stream [3,5,D]         the same rows as positions in V/xs.reshape(-1,6); -1 is no row
  V/draw_x [3,5,D,6], V/draw_y [3,5,D], V/draw_weight [3,5,D]   the same rows (0, -1, 0 where none)
Outputs:
  V/params/<p> [3,5,...]        after every step
  V/loss [3,5]                  the total, before the step
  V/loss_batch, V/loss_memory [3,5]   its two terms; 0 without a draw
  V/present [3,5,4]             1 where the class is in the batch
  V/memory_stream [3,5,M]       content after each step, as positions; -1 empty
  V/memory_x [3,5,M,6], V/memory_y [3,5,M]   the same content as rows (0 and -1 where empty)
  V/probe_logits [3,12,4]       after each task
"""

from __future__ import annotations

import numpy as np
import problem as pb
from reservoir import Reservoir, both_outcomes, rows_at

STEPS, ROWS, CLASSES = 5, 5, 4
LR, CAPACITY, DRAWN = 0.15, 9, 6
TASKS = [[0, 1], [2, 3], [0, 3]]


def batch_term(params: pb.Params, x: pb.Array, y: np.ndarray) -> tuple[float, pb.Params]:
  """Cross-entropy over the batch's own classes, and its gradient."""
  logits, cache = pb.forward(params, x)
  present = np.unique(y)
  loss, part = pb.cross_entropy(logits[:, present], np.searchsorted(present, y))
  dlogits = np.zeros_like(logits)
  dlogits[:, present] = part
  return loss, pb.backward(params, cache, dlogits)


def run(
  init: pb.Params, xs: pb.Array, ys: np.ndarray, probe: pb.Array, rng: np.random.Generator
) -> dict:
  tasks = len(xs)
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  memory = Reservoir(CAPACITY, rng)
  params = dict(init)
  trace, losses, slots, positions, js, contents, logits = [], [], [], [], [], [], []
  for t in range(tasks):
    for s in range(STEPS):
      slots.append(memory.draw(DRAWN))
      positions.append(memory.at(slots[-1]))
      batch, grads = batch_term(params, xs[t, s], ys[t, s])
      rows, old = positions[-1][positions[-1] >= 0], 0.0
      if len(rows):
        old, more = pb.loss_and_grad(params, stream_x[rows], stream_y[rows])
        grads = {k: grads[k] + more[k] for k in grads}
      params = pb.sgd(params, grads, LR)
      js += [memory.write() for _ in range(ROWS)]
      contents.append(memory.slots.copy())
      trace.append(params)
      losses.append((batch + old, batch, old))
    logits.append(pb.forward(params, probe)[0])
  stream = np.array(positions).reshape(tasks, STEPS, DRAWN)
  content = np.array(contents).reshape(tasks, STEPS, CAPACITY)
  j = np.array(js).reshape(tasks, STEPS, ROWS)
  both_outcomes(j, CAPACITY)
  held = rows_at(content, stream_x, stream_y)
  out = {f'draw_{k}': v for k, v in rows_at(stream, stream_x, stream_y).items()}
  names = ('loss', 'loss_batch', 'loss_memory')
  out |= dict(zip(names, np.array(losses).T.reshape(3, tasks, STEPS), strict=True))
  out |= pb.prefixed('params', pb.per_task(trace, tasks))
  return out | {
    'xs': xs,
    'ys': ys,
    'j': j,
    'draw_slots': np.array(slots).reshape(tasks, STEPS, DRAWN),
    'draw_stream': stream,
    'present': (ys[..., None] == np.arange(CLASSES)).any(2).astype(np.int64),
    'memory_stream': content,
    'memory_x': held['x'],
    'memory_y': held['y'],
    'probe_logits': np.stack(logits),
  }


def one_class_tasks(rng: np.random.Generator) -> tuple[pb.Array, np.ndarray]:
  """Batches of a single class: `make_tasks` with as many one-class tasks as there are batches."""
  classes = []
  for pair in TASKS:  # both classes of a task occur
    order = rng.permutation([*pair, *rng.choice(pair, size=STEPS - 2)])
    classes += [[int(c)] for c in order]
  xs, ys = pb.make_tasks(rng, classes, 1, ROWS)
  return xs.reshape(len(TASKS), STEPS, ROWS, -1), ys.reshape(len(TASKS), STEPS, ROWS)


def main() -> None:
  rng = np.random.default_rng(1711)
  init = pb.init_params(rng)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init) | {'lr': LR, 'capacity': CAPACITY, 'probe': probe}
  for name in ('tasks', 'one_class'):
    if name == 'tasks':
      xs, ys = pb.make_tasks(rng, TASKS, STEPS, ROWS)
    else:
      xs, ys = one_class_tasks(rng)
    out |= pb.prefixed(name, run(init, xs, ys, probe, rng))
  assert np.all(out['tasks/present'].sum(-1) == 2)
  assert np.all(out['one_class/present'].sum(-1) == 1) and np.all(out['one_class/loss_batch'] == 0)
  pb.save('er_ace', out)


if __name__ == '__main__':
  main()
