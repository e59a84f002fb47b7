"""Reference for REMIND with a product quantiser on the latent layer: golden/remind.npz.

Hayes, Kafle, Shrestha, Acharya & Kanan 2020 (ECCV). Latent layer h0 = relu(l0 x) [8].
CE is a mean over rows with all 4 outputs in the softmax. Tasks hold the classes [0, 1], [2, 3], [0, 2].

Quantiser: codebook 0 on h0[:4], codebook 1 on h0[4:], 4 codewords each. Encoding: in each codebook the
codeword of least squared distance, ties to the lowest index; decoding: those codewords side by side.
Lloyd's algorithm on points [n, 4], for every codebook by itself:
  codewords <- points[picks], then `iterations` times: assign every point to its nearest codeword, then
  move every codeword to the mean of the points assigned to it; one without points stays where it is

Task 0: SGD on the whole network, p <- p - lr g, on the CE of the batch. Its boundary, in this order:
  1. h0 of all the task's examples, in [step, row] order, with l0 as it is then
  2. the codewords by Lloyd's algorithm on these
  3. l0 is frozen for ever, and so are the codewords
  4. all these examples are encoded with the final codewords and written to the memory in order
Step of a later task, in this order; these tasks have no boundary of their own:
  1. D distinct slots are drawn from the memory
  2. the batch is encoded; its rows and the drawn rows are decoded
  3. loss = CE over batch and drawn rows together, one mean over all; SGD on l1 and l2
  4. the batch's codes are written row by row
Writing a row, with a u in [0, 1) of its own: while the memory is not full, to the lowest empty slot
(slots fill in order). When it is full: the class with most stored rows, the arriving row not counted,
ties to the lowest class number, loses row number floor(u count) of its rows in slot order; the new row
takes that slot. So a row is always stored. Every row of the stream has its u, used only where needed;
no u count is within 1e-3 of an integer.
Predictions after a task's end (after task 0: after its boundary) use decoded h0.
No squared distance is within 1e-4 of the next codeword's, but for two codewords that are equal.

tyler-hayes/REMIND differs: one new row per step with 50 drawn ones; faiss trains the codewords, with 25
iterations, from points of its own choice, and splits a large cluster for an empty codeword; l0 comes
from an offline training of many epochs; all rows of task 0 are stored even beyond the capacity; the
arriving row counts for its class and may itself be the one that is removed; ties go to the class that
came first; random resized crops of the decoded features and mixup, SGD with momentum and weight decay.

Variants:
  full   K = 12, full from the first boundary on
  room   K = 40: 15 slots are free after the first boundary and are filled in task 1
By itself:
  quantiser  Lloyd's algorithm and codes on 20 points; codebook 0 starts from two equal points, so that
             the higher of the two codewords has no points in the first iteration and stays

Keys, V in {full, room}. Inputs:
  init/<p>, lr, D, iterations, xs [3,5,5,6], ys [3,5,5], probe [12,6]; V/K
  picks [2,4]               positions in task 0 of the first codewords, by codebook
  u [3,5,5]                 for every row of the stream
  V/draw_slots [3,5,D]      slots drawn before each step; -1 in task 0
  quantiser/points [20,8], quantiser/picks [2,4]
Outputs:
  V/params/<p> [3,5,...]    after every step
  V/loss [3,5]              over all rows, at the parameters before the step
  V/draw_stream [3,5,D]     the rows drawn, as positions in xs.reshape(-1,6); -1 in task 0
  V/h0 [25,8]               of task 0's examples, at its boundary
  V/codewords [2,4,4]       codebook, codeword, place in its half of h0
  V/codes [3,5,5,2]         of every row of the stream; those of task 0 from its boundary
  V/written [3,5,5]         the slot each row was written to; in task 0 at its boundary
  V/first_codes [K,2], V/first_y [K], V/first_stream [K]   memory after the boundary of task 0
  V/memory_codes [3,5,K,2], V/memory_y [3,5,K], V/memory_stream [3,5,K]
                            memory after every step; -1 where empty, so everywhere in task 0
  V/probe_logits [3,12,4]   after each task, with decoded h0
  V/probe_codes [12,2]
  quantiser/codewords [5,2,4,4]   after every iteration; quantiser/codes [20,2] with the last ones
"""

from __future__ import annotations

import frozen
import numpy as np
import problem as pb

STEPS, ROWS, CLASSES = 5, 5, 4
BOOKS, WORDS, WIDTH, ITERATIONS = 2, 4, 4, 5
LR, DRAWN = 0.15, 4
TASKS = [[0, 1], [2, 3], [0, 2]]
CAPACITY = {'full': 12, 'room': 40}
GAP = 1e-4


def halves(points: pb.Array) -> pb.Array:
  """[n, 8] to [2, n, 4]."""
  return np.stack([points[:, b * WIDTH : (b + 1) * WIDTH] for b in range(BOOKS)])


def nearest(words: pb.Array, points: pb.Array) -> np.ndarray:
  """The codeword of every point, in one codebook."""
  distance = ((points[:, None] - words) ** 2).sum(2)
  best = distance.argmin(1)  # the first of equals
  for row, b in zip(distance, best, strict=True):
    other = np.any(words != words[b], axis=1)
    assert row[other].min() - row[b] > GAP, row
  return best


def encode(words: pb.Array, h0: pb.Array) -> np.ndarray:
  """Codes [n, 2]."""
  return np.stack([nearest(w, p) for w, p in zip(words, halves(h0), strict=True)], axis=1)


def decode(words: pb.Array, codes: np.ndarray) -> pb.Array:
  return np.concatenate([words[b][codes[:, b]] for b in range(BOOKS)], axis=1)


def lloyd(h0: pb.Array, picks: np.ndarray) -> pb.Array:
  """Codewords [iterations, 2, 4, 4] after every iteration."""
  points = halves(h0)
  words = np.stack([points[b][picks[b]] for b in range(BOOKS)])
  trace = []
  for _ in range(ITERATIONS):
    words = words.copy()
    for b in range(BOOKS):
      of = nearest(words[b], points[b])
      for k in range(WORDS):
        if np.any(of == k):
          words[b, k] = points[b][of == k].mean(0)
    trace.append(words)
  return np.stack(trace)


class Memory:
  def __init__(self, size: int) -> None:
    self.codes = np.full((size, BOOKS), -1, dtype=np.int64)
    self.y, self.stream = np.full((2, size), -1, dtype=np.int64)

  def write(self, codes: np.ndarray, y: int, position: int, u: float) -> int:
    if np.any(self.y < 0):
      slot = int(np.flatnonzero(self.y < 0)[0])
    else:
      count = np.bincount(self.y, minlength=CLASSES)
      loser = int(np.argmax(count))  # the first of equals
      place = u * count[loser]
      assert 1e-3 < place % 1 < 1 - 1e-3
      slot = int(np.flatnonzero(self.y == loser)[int(np.floor(place))])
    self.codes[slot], self.y[slot], self.stream[slot] = codes, y, position
    return slot

  def content(self) -> dict:
    return {'codes': self.codes.copy(), 'y': self.y.copy(), 'stream': self.stream.copy()}


def run(
  data: dict,
  init: pb.Params,
  size: int,
  draw_slots: np.ndarray | None,
  rng: np.random.Generator,
  replay: bool = True,
  quantise: bool = True,
) -> dict:
  """Slots are drawn from `rng`, or given. `replay` off: no drawn rows. `quantise` off: h0 as it is."""
  xs, ys, u = data['xs'], data['ys'], data['u'].reshape(-1)
  tasks, per_task = len(xs), STEPS * ROWS
  stream_x, stream_y = xs.reshape(-1, pb.INPUTS), ys.reshape(-1)
  params, memory = dict(init), Memory(size)
  trace, losses, drawn, positions, contents, codes, written, logits = ([] for _ in range(8))
  words, first, h0_first = np.zeros((BOOKS, WORDS, WIDTH)), {}, np.zeros((0, 2 * WIDTH))

  def coded(h0: pb.Array) -> pb.Array:
    return decode(words, encode(words, h0)) if quantise else h0

  def write(h0: pb.Array, start: int) -> None:
    for i, code in enumerate(encode(words, h0), start):
      codes.append(code)
      written.append(memory.write(code, int(stream_y[i]), i, float(u[i])))

  for t in range(tasks):
    for s in range(STEPS):
      slots = np.full(DRAWN, -1, dtype=np.int64)
      if t == 0:
        loss, params = frozen.step_whole(params, xs[t, s], ys[t, s], LR)
      else:
        slots = rng.choice(np.flatnonzero(memory.y >= 0), size=DRAWN, replace=False)
        if draw_slots is not None:
          slots = draw_slots[t, s]
        h0 = frozen.latent(params, xs[t, s])
        rows, labels = coded(h0), ys[t, s]
        if replay:
          rows = np.concatenate([rows, decode(words, memory.codes[slots])])
          labels = np.concatenate([labels, memory.y[slots]])
        loss, params = frozen.step_above(params, rows, labels, LR)
      positions.append(np.where(slots >= 0, memory.stream[np.maximum(slots, 0)], -1))
      if t > 0:
        write(h0, t * per_task + s * ROWS)
      trace.append(params)
      losses.append(loss)
      drawn.append(slots)
      contents.append(memory.content())
    if t == 0:
      h0_first = frozen.latent(params, stream_x[:per_task])
      words = lloyd(h0_first, data['picks'])[-1]
      write(h0_first, 0)
      first = memory.content()
    probe = frozen.latent(params, data['probe'])
    logits.append(frozen.above(params, coded(probe))[0])
  shape = (tasks, STEPS)
  out = pb.prefixed('params', pb.per_task(trace, tasks))
  for name, content in (('first', first), ('memory', pb.per_task(contents, tasks))):
    out |= {f'{name}_{k}': value for k, value in content.items()}
  return out | {
    'K': size,
    'draw_slots': np.array(drawn).reshape(*shape, DRAWN),
    'draw_stream': np.array(positions).reshape(*shape, DRAWN),
    'loss': np.array(losses).reshape(shape),
    'h0': h0_first,
    'codewords': words,
    'codes': np.array(codes).reshape(*shape, ROWS, BOOKS),
    'written': np.array(written).reshape(*shape, ROWS),
    'probe_logits': np.stack(logits),
    'probe_codes': encode(words, probe),
  }


def quantiser(rng: np.random.Generator) -> dict:
  """Lloyd's algorithm by itself, from two equal points in codebook 0."""
  points = rng.normal(size=(20, BOOKS * WIDTH))
  picks = np.stack([rng.permutation(20)[:WORDS] for _ in range(BOOKS)])
  points[picks[0, 2], :WIDTH] = points[picks[0, 1], :WIDTH]
  words = lloyd(points, picks)
  twin = points[picks[0, 2], :WIDTH]
  assert np.all(words[0, 0, 2] == twin) and np.abs(words[0, 0, 1] - twin).max() > 1e-2
  assert np.abs(words[-1, 0, 2] - twin).max() > 1e-2  # it has points again
  assert np.abs(words[1] - words[0]).max((1, 2)).min() > 1e-2
  return {'points': points, 'picks': picks, 'codewords': words, 'codes': encode(words[-1], points)}


def main() -> None:
  rng = np.random.default_rng(1815)
  init = pb.init_params(rng)
  xs, ys = pb.make_tasks(rng, TASKS, STEPS, ROWS)
  data = {'xs': xs, 'ys': ys, 'probe': rng.normal(size=(12, pb.INPUTS)), 'u': rng.random(ys.shape)}
  data['picks'] = np.stack([rng.permutation(STEPS * ROWS)[:WORDS] for _ in range(BOOKS)])
  out = pb.prefixed('init', init) | {'lr': LR, 'D': DRAWN, 'iterations': ITERATIONS} | data
  for v, size in CAPACITY.items():
    got = run(data, init, size, None, rng)
    slots = got['draw_slots']
    for _ in range(5):
      frozen.stable(got, run(data, frozen.nearby(rng, init), size, slots, rng))
    # Replay and quantisation matter; the codewords are distinct and all in use.
    for change in ({'replay': False}, {'quantise': False}):
      other = run(data, init, size, slots, rng, **change)
      assert np.abs(other['params/l1/w'] - got['params/l1/w'])[-1, -1].max() > 1e-2, change
    for b in range(BOOKS):
      assert set(got['codes'][0, ..., b].ravel().tolist()) == set(range(WORDS))
      assert len(set(got['codes'][1:, ..., b].ravel().tolist())) >= 3
      words = got['codewords'][b]
      assert np.abs(words[:, None] - words)[~np.eye(WORDS, dtype=bool)].max(1).min() > 1e-2
    assert np.abs(got['h0'] - decode(got['codewords'], got['codes'][0].reshape(-1, 2))).max() > 0.1
    # Every class is stored, and when a batch comes to a full memory there is a tie at some time.
    assert set(got['memory_y'][-1, -1].tolist()) == set(range(CLASSES))
    full = got['memory_y'][np.all(got['memory_y'] >= 0, axis=2)][:-1]
    count = np.sort([np.bincount(y, minlength=CLASSES) for y in full])
    assert np.any(count[:, -1] == count[:, -2])
    out |= pb.prefixed(v, got)
  free = (out['room/memory_y'] < 0).sum(2)
  assert (out['room/first_y'] < 0).sum() == 15 and free[1].tolist() == [10, 5, 0, 0, 0]
  assert np.all(out['full/first_y'] >= 0)
  pb.save('remind', out | pb.prefixed('quantiser', quantiser(rng)))


if __name__ == '__main__':
  main()
