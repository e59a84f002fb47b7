"""Reference for Dark Experience Replay: golden/der.npz.

Buzzega et al. 2020 (Dark Experience for General Continual Learning), DER and DER++. With theta the
parameters before the step:
  loss = CE(batch) + alpha mean over rows i and outputs c of (h(x'_i)_c - z'_ic)^2
                   + beta CE(x'', y'')
CE is a mean over rows. (x', z') and (x'', y'') are TWO independent draws from the memory; each is
min(D, filled) distinct slots. The squared difference is a mean over rows AND outputs (F.mse_loss of
aimagelab/mammoth; the paper writes the squared norm, which is C times that). All outputs compete in
all terms. Nothing is drawn from an empty memory: the very first step is on the batch alone. Tasks
do not matter to the method.

Order in a step: draw, gradient of the whole loss at theta, p <- p - lr g, then the batch is written
row by row in order. A row is written with the logits z the network gave it in THIS step, at theta
(before the update); they are never refreshed. Reservoir: see reservoir.py (as in er.npz).

Variants:
  der     beta = 0; one draw.
  derpp   beta > 0; draw is (x', z'), draw2 is (x'', y'').
2 tasks with classes 0-1 and 2-3, 6 steps of 5 rows, D = 6: the second step has 5 rows to draw.

Keys, V in {der, derpp}. Inputs:
  init/<p>, lr, capacity (M), probe [12,6]; xs [2,6,5,6], ys [2,6,5]
  V/alpha, V/beta
  V/j [2,6,5]                   the draw j for each row written; -1 while n < M
  V/draw_slots [2,6,D]          slots drawn before each step for (x', z'); -1 is no row
  V/draw_stream [2,6,D]         the same rows as positions in xs.reshape(-1,6); -1 is no row
  V/draw_x [2,6,D,6], V/draw_y [2,6,D], V/draw_weight [2,6,D]   the same rows (0, -1, 0 where none)
  derpp/draw2_slots, _stream, _x, _y, _weight                    likewise for (x'', y'')
Outputs:
  V/draw_z [2,6,D,4]            the logits kept with the drawn rows (0 where none)
  V/logits [2,6,5,4]            of the batch at theta: what is written
  V/params/<p> [2,6,...]        after every step
  V/loss [2,6]                  the total, before the step
  V/loss_batch, V/loss_z, V/loss_y [2,6]   CE(batch), mean squared difference, CE(x'', y''), all
                                  without alpha and beta; 0 without a draw
  V/memory_stream [2,6,M]       content after each step, as positions; -1 empty
  V/memory_x [2,6,M,6], V/memory_y [2,6,M], V/memory_z [2,6,M,4]   the same (0, -1, 0 where empty)
  V/probe_logits [2,12,4]       after each task
"""

from __future__ import annotations

import numpy as np
import problem as pb
from reservoir import Reservoir, both_outcomes, rows_at

STEPS, ROWS, CLASSES = 6, 5, 4
LR, CAPACITY, DRAWN = 0.15, 10, 6
VARIANTS = {'der': (0.8, 0.0), 'derpp': (0.5, 0.7)}


def plus(a: pb.Params, scale: float, b: pb.Params) -> pb.Params:
  return {k: a[k] + scale * b[k] for k in a}


def run(
  alpha: float,
  beta: float,
  init: pb.Params,
  xs: pb.Array,
  ys: np.ndarray,
  probe: pb.Array,
  rng: np.random.Generator,
) -> dict:
  tasks = len(xs)
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  stream_z = np.zeros((len(stream_x), CLASSES))  # filled as rows arrive
  memory = Reservoir(CAPACITY, rng)
  params = dict(init)
  draws = ('draw', 'draw2') if beta else ('draw',)
  keep: dict[str, list] = {f'{d}_{k}': [] for d in draws for k in ('slots', 'stream')}
  keep |= {k: [] for k in ('draw_z', 'logits', 'memory_stream', 'memory_z', 'j')}
  trace, losses, logits_after = [], [], []
  for t in range(tasks):
    for s in range(STEPS):
      positions = {}
      for d in draws:
        slots = memory.draw(DRAWN)
        positions[d] = memory.at(slots)
        keep[f'{d}_slots'].append(slots)
        keep[f'{d}_stream'].append(positions[d])
      logits, cache = pb.forward(params, xs[t, s])
      batch, dlogits = pb.cross_entropy(logits, ys[t, s])
      grads = pb.backward(params, cache, dlogits)
      loss_z = loss_y = 0.0
      drawn = positions['draw']
      keep['draw_z'].append(np.where(drawn[:, None] >= 0, stream_z[drawn], 0.0))
      rows = drawn[drawn >= 0]
      if len(rows):
        out, cache = pb.forward(params, stream_x[rows])
        diff = out - stream_z[rows]
        loss_z = float((diff**2).mean())
        grads = plus(grads, alpha, pb.backward(params, cache, 2 * diff / diff.size))
      if beta and len(rows):
        rows = positions['draw2'][positions['draw2'] >= 0]
        loss_y, more = pb.loss_and_grad(params, stream_x[rows], stream_y[rows])
        grads = plus(grads, beta, more)
      losses.append((batch + alpha * loss_z + beta * loss_y, batch, loss_z, loss_y))
      params = pb.sgd(params, grads, LR)
      for z in logits:
        stream_z[memory.seen] = z
        keep['j'].append(memory.write())
      keep['logits'].append(logits)
      keep['memory_stream'].append(memory.slots.copy())
      held = memory.slots
      keep['memory_z'].append(np.where(held[:, None] >= 0, stream_z[held], 0.0))
      trace.append(params)
    logits_after.append(pb.forward(params, probe)[0])
  out = {}
  for k, v in keep.items():
    a = np.array(v)
    tail = (ROWS,) if k == 'j' else a.shape[1:]
    out[k] = a.reshape(tasks, STEPS, *tail)
  for d in (*draws, 'memory'):
    rows = rows_at(out[f'{d}_stream'], stream_x, stream_y)
    out |= {f'{d}_{k}': v for k, v in rows.items() if (d, k) != ('memory', 'weight')}
  both_outcomes(out['j'], CAPACITY)
  names = ('loss', 'loss_batch', 'loss_z', 'loss_y')
  out |= dict(zip(names, np.array(losses).T.reshape(4, tasks, STEPS), strict=True))
  out |= pb.prefixed('params', pb.per_task(trace, tasks))
  return out | {'alpha': alpha, 'beta': beta, 'probe_logits': np.stack(logits_after)}


def main() -> None:
  rng = np.random.default_rng(1710)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1], [2, 3]], STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'lr': LR, 'capacity': CAPACITY, 'xs': xs, 'ys': ys, 'probe': probe}
  for name, (alpha, beta) in VARIANTS.items():
    out |= pb.prefixed(name, run(alpha, beta, init, xs, ys, probe, rng))
  pb.save('der', out)


if __name__ == '__main__':
  main()
