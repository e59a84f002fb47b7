"""Reference for latent replay: golden/latent.npz.

Pellegrini, Graffieti, Lomonaco & Maltoni 2020 (IROS), with Algorithm 1 for the memory.
Latent layer h0 = relu(l0 x) [8]. CE is a mean over rows with all 4 outputs in the softmax.
Tasks hold the classes [0, 1], [2, 3] and [1, 3]; every task has clouds of its own.

Memory: K slots of (h0, y), all empty at first.
Step of task 0: SGD on the whole network, p <- p - lr g, on the CE of the batch.
Step of a later task:
  1. D distinct filled slots are drawn (min(D, filled); places left over are -1 with weight 0)
  2. loss = CE over the batch's rows and the drawn rows together: one mean over all of them; the
     drawn rows enter at h0 as they were stored
  3. SGD on l1 and l2; l0/w and l0/b are untouched from the first boundary on
Boundary after task t, counted from 0, also after the last one, with the parameters at its end:
  1. h = min(K // (t + 1), number of the task's examples)
  2. examples: the flat positions examples_perm[t, :h] in the task, in [step, row] order
  3. slots: those still empty in the order of slots_perm[t], then the filled ones in the order of
     slots_perm[t]; the first h of this list, so slots_perm[t, :h] where none is empty
  4. the i-th example goes to the i-th slot, as its h0 with l0 as it is then, and its label
After the first boundary l0 does not change, so no stored h0 is out of date.

Variants:
  plain   K = 7: all slots are filled at the first boundary, h = 7, 3, 2
  few     K = 40: 25 rows at the first boundary leave 15 slots empty; h = 20 at the second fills these
          and replaces 5; h = 13 at the third
  short   K = 3 < D: three rows are drawn and the fourth place is empty; h = 3, 1, 1

vlomonaco/ar1-pytorch (ar1star_lat_replay.py) differs: layers below freeze_below_layer are frozen
from the first task on, the others below the latent layer take no gradient from the second on; what is
stored of a task is h0 as seen in its first epoch; the memory is walked in order, a fixed number of its
rows in every minibatch, not drawn per step; it never grows after the first task, so that only filled
slots are replaced; and it comes with AR1* (CWR* and Synaptic Intelligence) and batch renormalisation,
which are no part of this.

Keys, V in {plain, few, short}. Inputs:
  init/<p>, lr, D, xs [3,5,5,6], ys [3,5,5], probe [12,6]; V/K
  V/examples_perm [3,25]    a permutation of 0..24 for each boundary
  V/slots_perm [3,K]        a permutation of 0..K-1 for each boundary
  V/draw_slots [3,5,D]      slots drawn before each step; -1 is no row, as everywhere in task 0
Outputs:
  V/params/<p> [3,5,...]    after every step
  V/loss [3,5]              over all rows, at the parameters before the step
  V/draw_weight [3,5,D]     1 for a row, 0 for none
  V/draw_stream [3,5,D]     the rows drawn, as positions in xs.reshape(-1,6); -1 is no row
  V/h [3]                   of each boundary
  V/memory_h0 [3,K,8], V/memory_y [3,K], V/memory_filled [3,K], V/memory_stream [3,K]
                            after each boundary; 0, -1, 0 and -1 where empty
  V/probe_logits [3,12,4]   after each task
"""

from __future__ import annotations

import frozen
import numpy as np
import problem as pb

STEPS, ROWS = 5, 5
LR, DRAWN = 0.15, 4
TASKS = [[0, 1], [2, 3], [1, 3]]
CAPACITY = {'plain': 7, 'few': 40, 'short': 3}


def slots_for(order: np.ndarray, filled: np.ndarray, h: int) -> np.ndarray:
  """The slots that are written: empty ones first, both groups in the order given."""
  return np.concatenate([order[~filled[order]], order[filled[order]]])[:h]


def draw(stream: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """D distinct filled slots, or all of them; -1 for the rest."""
  filled = np.flatnonzero(stream >= 0)
  slots = np.full(DRAWN, -1, dtype=np.int64)
  count = min(DRAWN, len(filled))
  if count:
    slots[:count] = rng.choice(filled, size=count, replace=False)
  return slots


def run(
  data: dict, init: pb.Params, inputs: dict, rng: np.random.Generator, replay: bool = True
) -> dict:
  """Slots are drawn from `rng` unless `inputs` has them. `replay` off: drawn rows are left out."""
  xs, ys = data['xs'], data['ys']
  tasks, size = len(xs), inputs['K']
  per_task = STEPS * ROWS
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  params = dict(init)
  stream = np.full(size, -1, dtype=np.int64)
  h0, y = np.zeros((size, pb.HIDDEN[0])), np.full(size, -1, dtype=np.int64)
  trace, losses, drawn, positions, hs, contents, logits = [], [], [], [], [], [], []
  for t in range(tasks):
    for s in range(STEPS):
      given = inputs.get('draw_slots')
      slots = draw(stream, rng) if given is None else given[t, s]
      drawn.append(slots)
      positions.append(np.where(slots >= 0, stream[np.maximum(slots, 0)], -1))
      if t == 0:
        loss, params = frozen.step_whole(params, xs[t, s], ys[t, s], LR)
      else:
        rows, labels = frozen.latent(params, xs[t, s]), ys[t, s]
        if replay:
          there = slots[slots >= 0]
          rows, labels = np.concatenate([rows, h0[there]]), np.concatenate([labels, y[there]])
        loss, params = frozen.step_above(params, rows, labels, LR)
      trace.append(params)
      losses.append(loss)
    h = min(size // (t + 1), per_task)
    examples = t * per_task + inputs['examples_perm'][t, :h]
    target = slots_for(inputs['slots_perm'][t], stream >= 0, h)
    h0[target] = frozen.latent(params, stream_x[examples])
    y[target], stream[target] = stream_y[examples], examples
    hs.append(h)
    contents.append((h0.copy(), y.copy(), (stream >= 0).astype(np.int64), stream.copy()))
    logits.append(frozen.above(params, frozen.latent(params, data['probe']))[0])
  slots = np.array(drawn).reshape(tasks, STEPS, DRAWN)
  names = ('memory_h0', 'memory_y', 'memory_filled', 'memory_stream')
  columns = (np.stack(c) for c in zip(*contents, strict=True))
  out = inputs | pb.prefixed('params', pb.per_task(trace, tasks))
  out |= dict(zip(names, columns, strict=True))
  return out | {
    'draw_slots': slots,
    'draw_weight': (slots >= 0).astype(np.float64),
    'draw_stream': np.array(positions).reshape(tasks, STEPS, DRAWN),
    'loss': np.array(losses).reshape(tasks, STEPS),
    'h': np.array(hs),
    'probe_logits': np.stack(logits),
  }


def main() -> None:
  rng = np.random.default_rng(1810)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, TASKS, STEPS, ROWS)
  data = {'xs': xs, 'ys': ys, 'probe': rng.normal(size=(12, pb.INPUTS))}
  out = pb.prefixed('init', init) | {'lr': LR, 'D': DRAWN} | data
  for v, size in CAPACITY.items():
    inputs = {
      'K': size,
      'examples_perm': np.stack([rng.permutation(STEPS * ROWS) for _ in TASKS]),
      'slots_perm': np.stack([rng.permutation(size) for _ in TASKS]),
    }
    got = run(data, init, inputs, rng)
    inputs['draw_slots'] = got['draw_slots']
    for _ in range(5):
      frozen.stable(got, run(data, frozen.nearby(rng, init), inputs, rng))
    # Replay matters; l0 learns in task 0 alone, but then it does; everything drawn is there.
    without = run(data, init, inputs, rng, replay=False)
    assert np.abs(without['params/l1/w'] - got['params/l1/w'])[-1, -1].max() > 1e-2
    l0 = got['params/l0/w']
    assert np.abs(l0[0, -1] - init['l0/w']).max() > 1e-2 and np.all(l0[1:] == l0[0, -1])
    weight = got['draw_weight'].sum(2)
    assert np.all(weight[0] == 0) and np.all(weight[1:] == min(size, DRAWN))
    if v != 'short':  # after the second boundary the memory holds rows of both tasks
      assert set(got['memory_y'][1].tolist()) - {-1} == {0, 1, 2, 3}
    out |= pb.prefixed(v, got)
  assert out['plain/h'].tolist() == [7, 3, 2] and out['short/h'].tolist() == [3, 1, 1]
  assert out['few/h'].tolist() == [25, 20, 13]
  assert out['few/memory_filled'].sum(1).tolist() == [25, 40, 40]
  assert out['plain/memory_filled'].all() and out['short/memory_filled'].all()
  # The order of empty and filled slots matters in `few`: slots_perm[1, :20] holds both.
  first = out['few/memory_filled'][0][out['few/slots_perm'][1, :20]]
  assert 5 < first.sum() < 20
  pb.save('latent', out)


if __name__ == '__main__':
  main()
