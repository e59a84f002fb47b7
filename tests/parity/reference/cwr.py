"""Reference for CWR* as a rule on the output layer: golden/cwr.npz.

Lomonaco, Maltoni & Pellegrini 2020 (Rehearsal-free continual learning over small non-i.i.d. batches)
and consolidate_weights in utils.py of vlomonaco/ar1-pytorch, here on a network all of whose layers go
on training.

State, zeros at first: cw [8, 4], a column per class, rows 0..6 the weights l2/w and row 7 the bias
l2/b; past [4] and cur [4], numbers of rows.
Step: cur_c <- cur_c + (rows of class c in the batch), then SGD on the whole network, p <- p - lr g,
on the CE of the batch (mean over rows, all 4 outputs in the softmax).
Boundary, also after the last task; S = the classes with cur_c > 0, W [8, 4] the trained output layer
with the bias as its last row:
  1. avg = the mean of all entries of W[:, S], ONE number (8 |S| entries, the biases among them)
  2. for every c in S, past and cur as they are before this boundary:
     wpast = sqrt(past_c / cur_c);  cw_c <- (cw_c wpast + W_c - avg) / (wpast + 1)
  3. past_c <- past_c + cur_c, then cur <- 0
  4. output layer: column c <- cw_c for every c with past_c > 0, all other columns 0, biases too
In a class's first task wpast = 0 and cw_c = W_c - avg. What training did to the column of a class
without rows in the task is lost in 4. The next task starts from the output layer of 4.

Tasks hold the classes [0, 1], [1, 2] and [0, 1, 3]: class 1 is in all three, class 0 pauses.

Where that code differs: its output layer has no bias, so that avg is over weights alone; a task starts
with cw_c in the columns of its own classes only and 0 in all others (reset_weights), from the first
task on, whose columns are therefore 0 and not `init`; columns of classes never seen are not set to 0
at the boundary, but before the next task; cur also counts the rows of the replay memory. In the paper
the layers below are frozen after the first task.

Keys. Inputs:
  init/<p>, lr, xs [3,5,5,6], ys [3,5,5], probe [12,6]
Outputs:
  cwr/params/<p> [3,5,...]   after every step; at [t, 4] BEFORE the boundary
  cwr/after/<p> [3,...]      after each boundary; task t + 1 starts here
  cwr/loss [3,5]             before the step
  cwr/cur [3,4]              at the end of each task, before 3 sets it to 0
  cwr/avg [3]                of each boundary
  cwr/cw [3,8,4], cwr/past [3,4]   after each boundary
  cwr/probe_logits [3,12,4]  after each boundary
"""

from __future__ import annotations

import frozen
import numpy as np
import problem as pb

STEPS, ROWS, CLASSES = 5, 5, 4
LR = 0.15
TASKS = [[0, 1], [1, 2], [0, 1, 3]]


def consolidate(w: pb.Array, cw: pb.Array, past: pb.Array, cur: pb.Array) -> tuple[float, pb.Array]:
  """avg and the new cw; `past` and `cur` are those before the boundary."""
  now = np.flatnonzero(cur)
  avg = float(w[:, now].mean())
  cw = cw.copy()
  for c in now:
    wpast = np.sqrt(past[c] / cur[c])
    cw[:, c] = (cw[:, c] * wpast + w[:, c] - avg) / (wpast + 1)
  return avg, cw


def run(data: dict, init: pb.Params, rule: bool = True) -> dict:
  """`rule` off: the output layer is left as it was trained, for comparison."""
  xs, ys = data['xs'], data['ys']
  params = dict(init)
  cw = np.zeros((pb.HIDDEN[1] + 1, CLASSES))
  past, cur = np.zeros(CLASSES), np.zeros(CLASSES)
  trace, losses, afters, state, logits = [], [], [], [], []
  for t in range(len(xs)):
    for s in range(STEPS):
      cur = cur + np.bincount(ys[t, s], minlength=CLASSES)
      loss, params = frozen.step_whole(params, xs[t, s], ys[t, s], LR)
      trace.append(params)
      losses.append(loss)
    w = np.concatenate([params['l2/w'], params['l2/b'][None]])
    avg, cw = consolidate(w, cw, past, cur)
    past, counted, cur = past + cur, cur, np.zeros(CLASSES)
    if rule:
      w = np.where(past > 0, cw, 0.0)
      params = params | {'l2/w': w[:-1], 'l2/b': w[-1]}
    afters.append(params)
    state.append({'avg': np.float64(avg), 'cw': cw, 'past': past, 'cur': counted})
    logits.append(frozen.above(params, frozen.latent(params, data['probe']))[0])
  out = pb.prefixed('params', pb.per_task(trace, len(xs)))
  out |= pb.prefixed('after', pb.stack(afters)) | pb.stack(state)
  return out | {'loss': np.array(losses).reshape(-1, STEPS), 'probe_logits': np.stack(logits)}


def main() -> None:
  rng = np.random.default_rng(1822)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, TASKS, STEPS, ROWS)
  data = {'xs': xs, 'ys': ys, 'probe': rng.normal(size=(12, pb.INPUTS))}
  got = run(data, init)
  for _ in range(5):
    frozen.stable(got, run(data, frozen.nearby(rng, init)))
  # The counts of a class differ between its tasks, so that wpast is not 1; all classes differ.
  assert np.all(got['cur'].sum(1) == STEPS * ROWS) and np.all(got['past'] == got['cur'].cumsum(0))
  assert len({*got['cur'][:, 1].tolist(), got['past'][1, 1]}) == 4
  assert got['cur'][0, 0] != got['cur'][2, 0] and np.abs(got['avg']).min() > 1e-3
  # Columns without rows in a task were trained and are thrown away; class 3 is 0 before task 2.
  moved = np.abs(got['params/l2/w'][1, -1] - got['after/l2/w'][1])
  assert moved.max(0).min() > 1e-2 and np.all(got['after/l2/w'][:2, :, 3] == 0)
  plain = run(data, init, rule=False)
  assert np.abs(plain['params/l0/w'] - got['params/l0/w'])[-1, -1].max() > 1e-2
  pb.save('cwr', pb.prefixed('init', init) | {'lr': LR} | data | pb.prefixed('cwr', got))


if __name__ == '__main__':
  main()
