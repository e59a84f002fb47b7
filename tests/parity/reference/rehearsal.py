"""Reference for the rehearsal baselines R-PM and R-FM: golden/rehearsal.npz.

De Lange et al. 2022, partial and full memory. Three tasks with the SAME four classes; all 4 outputs are
in every softmax. The memory of K slots belongs to tasks, not to classes.

  pm  every task may hold m = K // tasks slots, always
  fm  from the beginning of task t (from 0) on every task may hold m = K // (t + 1) slots: an earlier
      task keeps the first m of its positions 0, 1, ..., whatever was written there last, and the
      current task starts empty. These are not the oldest or the latest m of its rows.

A step of task t, CE a mean over rows:
  1. Loss CE(batch) + coef CE(drawn rows), the second term from the second task on: D distinct rows,
     uniform over all that the EARLIER tasks hold, whichever task they belong to.
  2. p <- p - lr gradient.
  3. The rows of the batch are written one by one to the positions 0, 1, ..., m - 1, 0, 1, ... of task
     t; the position goes on from step to step, and starts at 0 in every task.

Mattdl/CLsurvey differs: a batch is written before the step, and what does not fit before position m - 1
is dropped, not wrapped around; D // t rows of every earlier task (the rest to tasks drawn at random),
and the mean of the tasks' losses; each row within the head of its own task; no coef.

Keys, V in {pm, fm}. Inputs:
  init/<p>, lr, coef, K, D, xs [3,4,5,6], ys [3,4,5], probe [12,6]
  V/draw_stream [3,4,D]        rows drawn before each step, as positions in xs.reshape(-1,6); -1 in task 0
  V/draw_x [3,4,D,6], V/draw_y [3,4,D], V/draw_weight [3,4,D]   the same rows; 0, -1 and 0 in task 0
Outputs:
  V/params/<p> [3,4,...]       after every step
  V/loss [3,4]                 before the step, coef included
  V/loss_batch, V/loss_memory [3,4]   its two terms without coef; the second 0 in task 0
  V/m [3]                      slots of a task, in each task
  V/memory_stream [3,4,3,K]    after every step: for each task the stream positions that its positions
                               0, 1, ... hold, -1 empty or beyond m. fm cuts the earlier tasks' rows
                               before the first step, so [t,-1] and [t+1,0] differ there.
  V/probe_logits [3,12,4]      after each task
"""

from __future__ import annotations

import numpy as np
import problem as pb
from dgr import nearby, stable
from reservoir import rows_at

STEPS, ROWS, TASKS = 4, 5, 3
LR, COEF, CAPACITY, DRAWN = 0.2, 0.7, 12, 3


def draw(memory: np.ndarray, task: int, rng: np.random.Generator) -> np.ndarray:
  """D distinct stream positions out of the earlier tasks' memory [tasks, K]; -1 in the first."""
  held = memory[:task][memory[:task] >= 0]
  if len(held) == 0:
    return np.full(DRAWN, -1, dtype=np.int64)
  return rng.choice(held, size=DRAWN, replace=False)


def run(
  variant: str,
  data: dict,
  init: pb.Params,
  draws: np.ndarray | None,
  rng: np.random.Generator,
  coef: float = COEF,
) -> dict:
  """A whole run; rows are drawn from `rng`, or taken from `draws` [3,4,D]."""
  xs, ys = data['xs'], data['ys']
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  memory = np.full((TASKS, CAPACITY), -1, dtype=np.int64)
  params = dict(init)
  trace, losses, drawn, contents, ms, logits = [], [], [], [], [], []
  row = 0
  for t in range(TASKS):
    m = CAPACITY // (t + 1 if variant == 'fm' else TASKS)
    memory[:t, m:] = -1
    position = 0
    for s in range(STEPS):
      pick = draw(memory, t, rng) if draws is None else draws[t, s]
      assert not t or np.all(np.isin(pick, memory[:t]))
      loss, grads = pb.loss_and_grad(params, xs[t, s], ys[t, s])
      of_memory = 0.0
      if t:
        of_memory, g = pb.loss_and_grad(params, stream_x[pick], stream_y[pick])
        grads = {k: grads[k] + coef * g[k] for k in grads}
      params = pb.sgd(params, grads, LR)
      for _ in range(ROWS):
        memory[t, position] = row
        position = (position + 1) % m
        row += 1
      trace.append(params)
      losses.append((loss + coef * of_memory, loss, of_memory))
      drawn.append(pick)
      contents.append(memory.copy())
    ms.append(m)
    logits.append(pb.forward(params, data['probe'])[0])
  terms = np.array(losses).T.reshape(3, TASKS, STEPS)
  out = pb.prefixed('params', pb.per_task(trace, TASKS))
  out |= dict(zip(('loss', 'loss_batch', 'loss_memory'), terms, strict=True))
  picked = np.array(drawn).reshape(TASKS, STEPS, DRAWN)
  out['draw_stream'] = picked
  out |= {f'draw_{k}': v for k, v in rows_at(picked, stream_x, stream_y).items()}
  return out | {
    'm': np.array(ms),
    'memory_stream': np.array(contents).reshape(TASKS, STEPS, TASKS, CAPACITY),
    'probe_logits': np.stack(logits),
  }


def main() -> None:
  rng = np.random.default_rng(2104)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, [[0, 1, 2, 3]] * TASKS, STEPS, ROWS)
  data = {'xs': xs, 'ys': ys, 'probe': rng.normal(size=(12, pb.INPUTS))}
  out = pb.prefixed('init', init) | data
  out |= {'lr': LR, 'coef': COEF, 'K': CAPACITY, 'D': DRAWN}
  for v in ('pm', 'fm'):
    got = run(v, data, init, None, rng)
    for _ in range(5):
      stable(got, run(v, data, nearby(rng, init), got['draw_stream'], rng))
    without = run(v, data, init, got['draw_stream'], rng, coef=0.0)
    assert np.abs(without['params/l0/w'] - got['params/l0/w'])[-1, -1].max() > 1e-2
    # Both earlier tasks are drawn from in the last one, and m is K // tasks at the end of both.
    assert set((got['draw_stream'][2] // (STEPS * ROWS)).flatten().tolist()) == {0, 1}
    assert got['m'].tolist() == ([12, 6, 4] if v == 'fm' else [4, 4, 4])
    out |= pb.prefixed(v, got)
  # The order of position is neither that of arrival nor the latest rows of a task.
  assert out['fm/memory_stream'][0, -1, 0].tolist() == [*range(12, 20), *range(8, 12)]
  assert out['fm/memory_stream'][1, 0, 0, :7].tolist() == [12, 13, 14, 15, 16, 17, -1]
  assert out['fm/memory_stream'][2, 0, 1, :5].tolist() == [38, 39, 34, 35, -1]
  pb.save('rehearsal', out)


if __name__ == '__main__':
  main()
