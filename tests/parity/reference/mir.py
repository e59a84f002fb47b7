"""Reference for Maximally Interfered Retrieval: golden/mir.npz.

Aljundi et al. 2019, alg. 1 (ER form). With theta the parameters before the step:
  g = gradient of CE on the batch at theta;  theta_v = theta - lr_v g
  score(x, y) = CE(theta_v; x, y) - CE(theta; x, y) for each of S candidates
  chosen = the k candidates with the largest scores, in descending order, ties by lower index
  theta <- theta - lr (g + gradient at theta of the mean CE over the chosen rows)
Two means, added with weight 1 each. Candidates are min(S, filled) distinct slots, drawn first; the
rest of the S places has weight 0 and is never chosen. With fewer than k rows in the memory all of
them are chosen and the mean is over those. Nothing is drawn from an empty memory: the very first
step is on the batch alone. After the step the batch is written row by row in order. Reservoir: see
reservoir.py. Tasks do not matter to the method.

optimass/Maximally_Interfered_Retrieval differs: rows of the current task are no candidates, there
is no memory term in the first task, and lr_v is lr.

Variants, 3 tasks with classes [0,1], [2,3], [0,3], 5 steps of 5 rows:
  mir   S = 7, k = 3: step 1 has 5 candidates.
  few   S = 8, k = 6: step 1 has 5 candidates, fewer than k.

No case hinges on rounding: the scores of the last chosen and the first not chosen differ by more
than 1e-4, likewise any two neighbours among the chosen.

Keys, V in {mir, few}. Inputs:
  init/<p>, lr, lr_v, capacity (M), probe [12,6]; xs [3,5,5,6], ys [3,5,5]; V/k
  V/j [3,5,5]                   the draw j for each row written; -1 while n < M
  V/draw_slots [3,5,S]          the candidates' slots; -1 is no row
  V/draw_stream [3,5,S]         the same rows as positions in xs.reshape(-1,6); -1 is no row
  V/draw_x [3,5,S,6], V/draw_y [3,5,S], V/draw_weight [3,5,S]   the same rows (0, -1, 0 where none)
Outputs:
  V/scores [3,5,S]              0 where the weight is 0 (a real score may be below 0)
  V/chosen [3,5,k]              places among the S candidates; -1 where there is none left
  V/chosen_stream [3,5,k]       the same as positions in the stream; -1 where none
  V/params/<p> [3,5,...]        after every step
  V/loss [3,5]                  CE(batch) + mean CE(chosen), before the step
  V/loss_batch, V/loss_memory [3,5]   its two terms; 0 without a draw
  V/memory_stream [3,5,M]       content after each step, as positions; -1 empty
  V/memory_x [3,5,M,6], V/memory_y [3,5,M]   the same content as rows (0 and -1 where empty)
  V/probe_logits [3,12,4]       after each task
"""

from __future__ import annotations

import numpy as np
import problem as pb
from reservoir import Reservoir, both_outcomes, rows_at

STEPS, ROWS, CLASSES = 5, 5, 4
LR, LR_V, CAPACITY = 0.12, 0.2, 10
VARIANTS = {'mir': (7, 3), 'few': (8, 6)}


def row_losses(params: pb.Params, x: pb.Array, y: np.ndarray) -> pb.Array:
  return -pb.log_softmax(pb.forward(params, x)[0])[np.arange(len(y)), y]


def run(
  candidates: int,
  k: int,
  init: pb.Params,
  xs: pb.Array,
  ys: np.ndarray,
  probe: pb.Array,
  rng: np.random.Generator,
) -> dict:
  tasks = len(xs)
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  memory = Reservoir(CAPACITY, rng)
  params = dict(init)
  keep: dict[str, list] = {n: [] for n in ('draw_slots', 'draw_stream', 'scores', 'chosen')}
  keep |= {'j': [], 'memory_stream': []}
  trace, losses, logits = [], [], []
  for t in range(tasks):
    for s in range(STEPS):
      slots = memory.draw(candidates)
      positions = memory.at(slots)
      real = positions[positions >= 0]
      loss, g = pb.loss_and_grad(params, xs[t, s], ys[t, s])
      scores, chosen, old, grads = np.zeros(candidates), np.full(k, -1, dtype=np.int64), 0.0, g
      if len(real):
        x, y = stream_x[real], stream_y[real]
        gain = row_losses(pb.sgd(params, g, LR_V), x, y) - row_losses(params, x, y)
        order = np.argsort(-gain, kind='stable')
        gaps = -np.diff(gain[order])[:k]
        assert np.all(gaps > 1e-4), (t, s, gaps)
        order = order[:k]
        scores[: len(real)], chosen[: len(order)] = gain, order
        old, more = pb.loss_and_grad(params, x[order], y[order])
        grads = {name: g[name] + more[name] for name in g}
      params = pb.sgd(params, grads, LR)
      keep['j'].append([memory.write() for _ in range(ROWS)])
      keep['draw_slots'].append(slots)
      keep['draw_stream'].append(positions)
      keep['scores'].append(scores)
      keep['chosen'].append(chosen)
      keep['memory_stream'].append(memory.slots.copy())
      trace.append(params)
      losses.append((loss + old, loss, old))
    logits.append(pb.forward(params, probe)[0])
  out = {n: np.array(v).reshape(tasks, STEPS, -1) for n, v in keep.items()}
  both_outcomes(out['j'], CAPACITY)
  chosen = out['chosen']
  picked = np.take_along_axis(out['draw_stream'], np.maximum(chosen, 0), axis=2)
  out['chosen_stream'] = np.where(chosen >= 0, picked, -1)
  real = rows_at(out['draw_stream'], stream_x, stream_y)
  # A chosen score below 0 beside places of weight 0: who forgets the weights shows.
  low = np.take_along_axis(out['scores'], np.maximum(chosen, 0), axis=2) < 0
  assert ((low & (chosen >= 0)).any(-1) & (real['weight'] == 0).any(-1)).any()
  held = rows_at(out['memory_stream'], stream_x, stream_y)
  out |= {f'draw_{n}': v for n, v in real.items()}
  out |= {'memory_x': held['x'], 'memory_y': held['y'], 'k': k}
  names = ('loss', 'loss_batch', 'loss_memory')
  out |= dict(zip(names, np.array(losses).T.reshape(3, tasks, STEPS), strict=True))
  out |= pb.prefixed('params', pb.per_task(trace, tasks))
  return out | {'probe_logits': np.stack(logits)}


def main(seed: int = 1712) -> None:
  rng = np.random.default_rng(seed)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1], [2, 3], [0, 3]], STEPS, ROWS)
  probe = rng.normal(size=(12, pb.INPUTS))
  out = pb.prefixed('init', init)
  out |= {'lr': LR, 'lr_v': LR_V, 'capacity': CAPACITY, 'xs': xs, 'ys': ys, 'probe': probe}
  for name, (candidates, k) in VARIANTS.items():
    out |= pb.prefixed(name, run(candidates, k, init, xs, ys, probe, rng))
  pb.save('mir', out)


if __name__ == '__main__':
  main()
