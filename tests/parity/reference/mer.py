"""Reference for Meta-Experience Replay: golden/mer.npz.

Riemer et al. 2019, alg. 1. A batch of the stream is processed row by row; for each row (x, y):
  theta_A0 = theta
  for i in 1..s:
    theta_i0 = theta
    for each row j of batch i, in order:  theta <- theta - alpha gradient of CE(theta; row j)
    theta <- theta_i0 + beta (theta - theta_i0)         within-batch Reptile
  theta <- theta_A0 + gamma (theta - theta_A0)          across-batch Reptile
  then (x, y) is written to the reservoir (see reservoir.py)
Batch i is min(k - 1, filled) distinct memory rows in the order drawn, then the current row LAST,
directly after them. The s draws are independent. With an empty memory a batch is the current row
alone (still s times). Tasks do not matter to the method.

mattriemer/MER differs in its alg. 1: the current row comes first, up to k (not k - 1) memory rows
follow, and a memory row may come twice.

Variants: `mer`, 2 tasks with classes 0-1 and 2-3, 4 stream batches of 3 rows, s = 2, k = 4; and `alg6`, on
the same rows the paper's alg. 6: one batch alone, and across-batch Reptile alone:
  theta_A0 = theta; a step for each row of the batch; theta <- theta_A0 + gamma (theta - theta_A0)

Keys, those of `mer` are of `alg6` too, with s = 1. Inputs:
  init/<p>, capacity (M), s, k, probe [12,6]; xs [2,4,3,6], ys [2,4,3]
  lr (this is alpha), beta, gamma
  mer/j [2,4,3]                   the draw j for each row written; -1 while n < M
  mer/count [2,4,3]               memory rows in each of the s batches of this row, 0..k-1
  mer/draw_slots [2,4,3,s,k-1]    slots drawn; -1 is no row (always at the end)
  mer/draw_stream [2,4,3,s,k-1]   the same rows as positions in xs.reshape(-1,6); -1 is no row
  mer/draw_x [...,6], mer/draw_y, mer/draw_weight   the same rows (0, -1, 0 where none)
Outputs:
  mer/params/<p> [2,4,...]        after every STREAM BATCH (3 rows)
  mer/loss [2,4]                  mean CE of the stream batch at the parameters before it
  mer/loss_row [2,4,3]            CE of each row at the parameters when it arrives
  mer/memory_stream [2,4,3,M]     content after each ROW is written, as positions; -1 empty
  mer/probe_logits [2,12,4]       after each task
"""

from __future__ import annotations

import numpy as np
import problem as pb
from reservoir import Reservoir, both_outcomes, rows_at

STEPS, ROWS, CLASSES = 4, 3, 4
ALPHA, BETA, GAMMA, CAPACITY, BATCHES, K = 0.15, 0.6, 0.7, 5, 2, 4


def between(a: pb.Params, b: pb.Params, weight: float) -> pb.Params:
  return {k: a[k] + weight * (b[k] - a[k]) for k in a}


def run(
  init: pb.Params,
  xs: pb.Array,
  ys: np.ndarray,
  probe: pb.Array,
  rng: np.random.Generator,
  batches: int = BATCHES,
  within: bool = True,
) -> dict:
  tasks = len(xs)
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  memory = Reservoir(CAPACITY, rng)
  params = dict(init)
  keep: dict[str, list] = {n: [] for n in ('j', 'count', 'draw_slots', 'draw_stream', 'loss_row')}
  keep['memory_stream'] = []
  trace, losses, logits = [], [], []
  for t in range(tasks):
    for b in range(STEPS):
      losses.append(pb.loss_and_grad(params, xs[t, b], ys[t, b])[0])
      for _ in range(ROWS):
        row = memory.seen
        keep['loss_row'].append(
          pb.loss_and_grad(params, stream_x[row][None], stream_y[row][None])[0]
        )
        start = params
        slots = np.stack([memory.draw(K - 1) for _ in range(batches)])
        positions = memory.at(slots)
        for drawn in positions:
          first = params
          for r in (*drawn[drawn >= 0], row):
            g = pb.loss_and_grad(params, stream_x[r][None], stream_y[r][None])[1]
            params = pb.sgd(params, g, ALPHA)
          if within:
            params = between(first, params, BETA)
        params = between(start, params, GAMMA)
        keep['j'].append(memory.write())
        keep['count'].append((slots[0] >= 0).sum())
        keep['draw_slots'].append(slots)
        keep['draw_stream'].append(positions)
        keep['memory_stream'].append(memory.slots.copy())
      trace.append(params)
    logits.append(pb.forward(params, probe)[0])
  arrays = {n: np.array(v) for n, v in keep.items()}
  out = {n: a.reshape(tasks, STEPS, ROWS, *a.shape[1:]) for n, a in arrays.items()}
  both_outcomes(out['j'], CAPACITY)
  assert set(out['count'].ravel().tolist()) == {0, 1, 2, 3}
  real = rows_at(out['draw_stream'], stream_x, stream_y)
  out |= {f'draw_{n}': v for n, v in real.items()}
  out |= pb.prefixed('params', pb.per_task(trace, tasks))
  return out | {'loss': np.array(losses).reshape(tasks, STEPS), 'probe_logits': np.stack(logits)}


def main() -> None:
  rng = np.random.default_rng(1716)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1], [2, 3]], STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init) | {
    'lr': ALPHA,
    'beta': BETA,
    'gamma': GAMMA,
    's': BATCHES,
    'k': K,
  }
  out |= {'capacity': CAPACITY, 'xs': xs, 'ys': ys, 'probe': probe}
  out |= pb.prefixed('mer', run(init, xs, ys, probe, rng))
  out |= pb.prefixed('alg6', run(init, xs, ys, probe, rng, 1, False))
  pb.save('mer', out)


if __name__ == '__main__':
  main()
