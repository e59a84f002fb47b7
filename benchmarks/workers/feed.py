"""CIFAR-10 from array_record files by grain, or from memory: reading alone, and steps of a reduced ResNet-18.

A turn is timed after some batches that are not, so that it reads as much as it uses; CPU time is that of the
process and of its workers.
"""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import multiprocessing  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

from cl_jax import host_feed, learner, streams  # noqa: E402
from cl_jax.loop import programs  # noqa: E402
from cl_jax.models.resnet import resnet  # noqa: E402
from cl_jax.streams.take import without_data  # noqa: E402

CHUNK, MEAN, STD = 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def spent() -> float:
  """CPU seconds of this process and of those it has started and that live."""
  total = time.process_time()
  for child in multiprocessing.active_children():
    fields = Path(f'/proc/{child.pid}/stat').read_text().rpartition(')')[2].split()
    total += (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')
  return total


def prepare(workers: int | None, batch: int, reads: int, chunks: int, examples: int):
  """Chunks read alone and chunks of steps in a turn; workers None takes the data from memory."""
  files = workers is not None
  data = streams.dataset('tfds:cifar10', in_files=files)
  plan = streams.Plan(batch=batch, iterations=(reads + chunks) * CHUNK * 12)
  select = streams.Select(test_per_task=batch, test_batch=batch, examples_per_task=examples)
  stream = streams.split(*data, 'class', 1, plan=plan, select=select)
  feed = streams.grain_feed(stream, workers) if workers is not None else host_feed(stream)
  resident = without_data(stream) if files else streams.put(stream)
  build = lambda hp, w: learner(resnet(stream.classes, mean=MEAN, std=STD), optax.sgd(hp))  # noqa: E731
  parts, hp = programs(build, CHUNK), np.float32(0.03)
  index, key = np.asarray(stream.index[0]), jax.random.key(0)
  first = jax.tree.map(lambda a: a[0], feed(0, index[:1]))
  state, at = parts.begin(hp, key, resident, None, first)[0], 0

  def read():
    nonlocal at
    at += CHUNK
    return feed(0, index[at - CHUNK : at])

  def step(state):
    lo = at
    return parts.advance(hp, state, resident, None, 0, lo, read() if files else skip())

  def skip():
    nonlocal at
    at += CHUNK

  def timed(times: int, do):
    cpu, wall = spent(), time.perf_counter()
    for _ in range(times):
      do()
    return spent() - cpu, time.perf_counter() - wall

  def repeat(i):
    nonlocal state
    jax.block_until_ready(read())  # what was ready before the turn
    read_cpu, read_wall = timed(reads, lambda: jax.block_until_ready(read()))
    loss = np.zeros(0)

    def once():
      nonlocal state, loss
      state, part = step(state)
      loss = np.asarray(part)

    once()
    cpu, wall = timed(chunks, once)
    n = reads * CHUNK * batch
    rates = {'per_cpu': n / read_cpu, 'per_wall': n / read_wall}
    steps = chunks * CHUNK
    return {'cpu': cpu / steps, 'wall': wall / steps, **rates, 'accuracy': float(loss[-1])}

  return repeat, {}


if __name__ == '__main__':  # workers import it again
  serve(lambda: prepare(**GIVEN))
