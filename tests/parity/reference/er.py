"""Reference for experience replay with a tiny memory: golden/er.npz.

Chaudhry et al. 2019 (On Tiny Episodic Memories), alg. 1: every step minimises the MEAN
cross-entropy over the concatenation of the batch and the drawn memory rows (one mean over all rows,
not a mean of two means), then the batch is written, row by row in order. Nothing is drawn from an
empty memory: the first step is on the batch alone. Tasks do not matter to the method.

reservoir   Vitter's algorithm R, capacity M: with n rows seen before this one, n < M writes slot n;
            otherwise j is uniform on the integers 0..n INCLUSIVE (n + 1 values) and the row
            replaces slot j if j < M, else is dropped. The authors' update_reservior draws from
            0..n-1. Drawn: min(D, filled) distinct slots, as the authors do.
ring        FIFO, m slots per class: slot = class m + (rows of the class so far) mod m.
            Drawn: D filled slots WITH replacement, so that a row may count twice in the mean.

Keys. Inputs:
  init/<p>, lr, capacity (M), m, probe [12,6]; xs [3,5,5,6], ys [3,5,5]: 3 tasks sharing 4 classes
  V/draw_slots [3,5,D]          slots drawn before each step, V in {reservoir,ring}; -1 is no row
  reservoir/j [3,5,5]           the draw j for each row written; -1 while n < M
Outputs:
  V/params/<p> [3,5,...]        after every step
  V/loss [3,5]                  mean over all rows, at the parameters before the step
  V/memory_stream [3,5,slots]   content after each step, as positions in xs.reshape(-1,6); -1 empty
  V/memory_x [3,5,slots,6], V/memory_y [3,5,slots]   the same content as rows (0 and -1 where empty)
  V/probe_logits [3,12,4]       after each task
"""

from __future__ import annotations

import numpy as np
import problem as pb

TASKS, STEPS, ROWS, CLASSES = 3, 5, 5, 4
LR, CAPACITY, SLOTS, DRAWN = 0.15, 9, 2, 5


def run(
  kind: str,
  init: pb.Params,
  xs: pb.Array,
  ys: np.ndarray,
  probe: pb.Array,
  rng: np.random.Generator,
) -> dict:
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  memory = np.full(CAPACITY if kind == 'reservoir' else CLASSES * SLOTS, -1, dtype=np.int64)
  of_class = np.zeros(CLASSES, dtype=np.int64)
  params = dict(init)
  trace, losses, draws, js, contents, logits = [], [], [], [], [], []
  seen = 0
  for t in range(TASKS):
    for s in range(STEPS):
      filled = np.flatnonzero(memory >= 0)
      drawn = np.full(DRAWN, -1, dtype=np.int64)
      if kind == 'reservoir':
        count = min(DRAWN, len(filled))
        drawn[:count] = rng.choice(filled, size=count, replace=False) if count else []
      elif len(filled):
        drawn[:] = rng.choice(filled, size=DRAWN, replace=True)
      rows = memory[drawn[drawn >= 0]]
      x = np.concatenate([xs[t, s], stream_x[rows]])
      y = np.concatenate([ys[t, s], stream_y[rows]])
      loss, grads = pb.loss_and_grad(params, x, y)
      params = pb.sgd(params, grads, LR)
      for label in ys[t, s]:
        j = -1
        if kind == 'ring':
          memory[int(label) * SLOTS + of_class[label] % SLOTS] = seen
          of_class[label] += 1
        elif seen < CAPACITY:
          memory[seen] = seen
        else:
          j = int(rng.integers(0, seen, endpoint=True))
          if j < CAPACITY:
            memory[j] = seen
        js.append(j)
        seen += 1
      trace.append(params)
      losses.append(loss)
      draws.append(drawn)
      contents.append(memory.copy())
    logits.append(pb.forward(params, probe)[0])
  content = np.array(contents).reshape(TASKS, STEPS, -1)
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  if kind == 'reservoir':
    out['j'] = np.array(js).reshape(TASKS, STEPS, ROWS)
  return out | {
    'draw_slots': np.array(draws).reshape(TASKS, STEPS, DRAWN),
    'loss': np.array(losses).reshape(TASKS, STEPS),
    'memory_stream': content,
    'memory_x': np.where(content[..., None] >= 0, stream_x[content], 0.0),
    'memory_y': np.where(content >= 0, stream_y[content], -1),
    'probe_logits': np.stack(logits),
  }


def main() -> None:
  rng = np.random.default_rng(1704)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'lr': LR, 'capacity': CAPACITY, 'm': SLOTS, 'xs': xs, 'ys': ys, 'probe': probe}
  for kind in ('reservoir', 'ring'):
    out |= pb.prefixed(kind, run(kind, init, xs, ys, probe, rng))
  js = out['reservoir/j']  # both outcomes of a draw must occur
  assert ((js >= 0) & (js < CAPACITY)).sum() > 10 and (js >= CAPACITY).sum() > 10
  pb.save('er', out)


if __name__ == '__main__':
  main()
