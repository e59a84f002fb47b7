"""The worker's side of a measurement: prepare once, then one repetition for every line on stdin.

Imports nothing but the standard library, so that pinning comes before any library counts the cores.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable


def options() -> dict:
  """The options of this worker; pins the process to the cores they name."""
  given = json.loads(sys.argv[1])
  if (cores := given.pop('cores', None)) and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, cores)
  return given


def peak_rss() -> int:
  """Bytes of the largest resident set so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
    1 if sys.platform == 'darwin' else 1024
  )


def serve(prepare: Callable[[], tuple[Callable[[int], dict], dict]]) -> None:
  """Answers on what was stdout; whatever else prints goes to stderr.

  Args:
    prepare: () -> (repeat, facts). `repeat(i)` does repetition i completely and returns what it found,
      at least 'accuracy' or another number that depends on all of its work; `facts` are told once.
  """
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)
  begin = time.process_time()
  repeat, facts = prepare()
  ready = {'ready': True, 'prepare_cpu': time.process_time() - begin, **facts}
  print(json.dumps(ready), file=answers)
  for i, _ in enumerate(sys.stdin):
    wall, cpu = time.perf_counter(), time.process_time()
    found = repeat(i)
    spent = {'cpu': time.process_time() - cpu, 'wall': time.perf_counter() - wall}
    spent['process_cpu'] = time.process_time()
    print(json.dumps({**spent, 'rss': peak_rss(), **found}), file=answers)
