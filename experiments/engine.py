"""The loop around the loop: chunks, checkpoints, signals, and what stops a run."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cl_jax import checkpoint, durable
from cl_jax.errors import Fault
from cl_jax.loop import Progress, Record, run_chunks
from cl_jax.types import State, Stream
from experiments import devices
from experiments.build import likelihood
from experiments.job import (
  Job,
  all_finite,
  blank,
  feed,
  forget,
  host,
  leg_steps,
  padded,
  spread,
  without_copies,
)
from experiments.watch import Clock, Interrupted


class Outcome(NamedTuple):
  """What is left of a job.

  Attributes:
    states: the final state of each run, on the host.
    records: the record of each run.
    clock: of all its processes together.
    faults: {run: what stopped it}; states and records of these runs mean nothing.
  """

  states: list[State]
  records: list[Record]
  clock: Clock
  faults: dict[int, dict[str, Any]]


def ignore(job: Job, record: Record, faults: Mapping[int, Any]) -> None:
  """The `leg` of a command that does nothing more at the end of a leg."""


def train(
  job: Job,
  save_every: float,
  stop: Callable[[], int],
  show: Any,
  tolerant: bool = False,
  leg: Callable[[Job, Record, Mapping[int, Any]], None] = ignore,
) -> Outcome:
  """Runs the job to its end, from its latest checkpoint.

  Args:
    save_every: seconds between checkpoints inside a leg; there is one at every leg's end as well.
    stop: () -> the number of the signal that asks to stop, or 0.
    show: see `experiments.show`.
    tolerant: go on with the other runs when the loss of one is not finite.
    leg: (job, record, faults) -> None, called at the end of every leg, when its checkpoint is there.

  Raises:
    Fault: a loss or a parameter is not finite; the last good state is in the checkpoints.
    Interrupted: after a signal.
  """
  config, plan = job.setup.config, spread(job)
  L, S = job.streams[0].index.shape[:2]
  like = blank(job, plan, config['eval_every'])
  clock, faults = Clock(), {}
  found = checkpoint.restore(job.folder, like, job.sha256, show.warn)
  resume = None
  if found is not None:
    p = padded(found.tree, plan)
    resume = p._replace(state=plan.place(p.state), leg=int(p.leg), done=int(p.done))
    clock = Clock(found.extra['wall_s'], found.extra['compile_s'], found.extra['started'])
    faults = {int(k): v for k, v in found.extra['faults'].items()}
    show.say(
      f'{job.name}: going on from {place_of(resume, job.streams[0])} (checkpoint {found.step})'
    )
    leg(job, resume.record, faults)  # a process may have ended between its checkpoint and this
  finite = jax.jit(
    lambda params: all_finite(params, plan.n, plan.lift is not None),
    out_shardings=plan.cut and plan.cut.whole,
  )
  lengths = np.stack([leg_steps(s) for s in job.streams])
  longest = lengths.max(axis=0)
  saved, saved_at = found.step if found else -1, time.monotonic()
  last: Progress | None = resume
  total, runs = int(longest.sum()), len(job.seeds)
  if resume is None:
    side = f', {plan.width} at once on a device' if plan.width > 1 else ''
    show.say(
      f'{job.name}: {runs} run{"s" * (runs > 1)} of {total} steps in {L} legs{side}; compiling'
    )
  show.begin(job.name, total, steps_done(resume, longest))

  def save(p: Progress) -> None:
    nonlocal saved, saved_at
    step = int(p.leg * (S + 1) + p.done)
    if step == saved:
      return
    extra = clock.stand() | {'faults': {str(k): v for k, v in faults.items()}}
    checkpoint.save(job.folder, step, without_copies(host(p), job, plan), job.sha256, extra)
    saved, saved_at = step, time.monotonic()

  def fault(run: int, what: dict[str, Any]) -> None:
    what = what | {'seed': job.seeds[run]}
    if tolerant:
      faults[run] = what
      show.warn(f'{sentence(job, run, what)}; it is left out of the results')
      return
    # Where a step overwrites the state, the last good one is in the checkpoint before.
    if last is not None and plan.cut is None and np.all(finite(last.state.params)):
      save(forget(last, config['eval_every']))
    kept = f'the last good state is checkpoint {saved} in {job.folder}'
    if devices.first():
      durable.write(job.workdir / 'fault.json', json.dumps(what, indent=1))
    without = ', or of config.seeds without this one' if len(job.seeds) > 1 else ''
    raise Fault(
      f'{sentence(job, run, what)}; {kept if saved >= 0 else "no good state came before it"}. A smaller '
      f'config.optimizer.lr or strength is another run, in another --workdir{without}'
    )

  with clock.running(), feed(job) as read:
    for p in run_chunks(
      job.setup.build, plan.hp, plan.key, plan.stream, plan.weights,
      config['chunk'], config['eval_every'], resume, read, plan.lift, donate=plan.cut is not None,
    ):  # fmt: skip
      for run in range(len(job.seeds)):
        if run not in faults and (what := wrong_loss(job, run, last, p, lengths[run])):
          fault(run, what)
      if len(faults) == len(job.seeds):
        break
      ended = last is not None and bool(p.leg > last.leg)
      finished = p.leg == L
      signum, due = devices.agreed(stop(), time.monotonic() - saved_at >= save_every)
      if signum or ended or due:
        good = np.atleast_1d(np.asarray(finite(p.state.params)))
        for run in np.flatnonzero(~good[: len(job.seeds)]):
          if int(run) not in faults:
            at = max(p.leg - 1, 0) if ended else p.leg
            fault(int(run), {'what': 'a parameter', 'leg': at, 'value': 'not finite'})
        save(p)
      if ended:
        leg(job, p.record, faults)
      show.step(steps_done(p, longest), describe(p, job, ended))
      if signum and not finished:
        name = signal.Signals(signum).name
        raise Interrupted(
          signum, f'{job.name}: stopped by {name} at {place_of(p, job.streams[0])}, state saved'
        )
      last = p
  assert last is not None
  runs = range(len(job.seeds))
  whole = host(last)
  pick = (lambda a, i: a[i]) if plan.lift else (lambda a, i: a)
  return Outcome(
    [jax.tree.map(lambda a, i=i: pick(a, i), whole.state) for i in runs],
    [jax.tree.map(lambda a, i=i: pick(a, i), whole.record) for i in runs],
    clock,
    faults,
  )


def wrong_loss(
  job: Job, run: int, last: Progress | None, p: Progress, steps: np.ndarray
) -> dict[str, Any] | None:
  """The first new loss of a run that is not finite, and the batch that it came from."""
  if last is None or p.leg > last.leg:
    return None
  lo, hi = last.done, min(p.done, int(steps[p.leg]))
  loss = p.record.loss.reshape(-1, *p.record.loss.shape[-2:])[run, p.leg, lo:hi]
  bad = np.flatnonzero(~np.isfinite(loss))
  if not len(bad):
    return None
  step = lo + int(bad[0])
  rows = np.asarray(job.streams[run].index[p.leg, step])
  mixed = len(job.streams[run].y)
  return {
    'what': 'the loss',
    'value': str(float(loss[bad[0]])),
    'leg': p.leg,
    'step': step,
    'step_overall': int(steps[: p.leg].sum()) + step,
    'rows': [int(r) % mixed for r in rows if r >= 0],
  }


def sentence(job: Job, run: int, what: Mapping[str, Any]) -> str:
  names = job.streams[run].task_names
  leg, legs = what['leg'], len(job.streams[run].index)
  task = f'leg {leg + 1} of {legs}' + (f' (task {names[leg]})' if len(names) == legs else '')
  text = f'{job.name}, {job.labels[run]}: {what["what"]} is {what["value"]}'
  if 'step' not in what:
    return f'{text} in {task}'
  rows = what['rows']
  shown = ', '.join(map(str, rows[:8])) + (f', ... ({len(rows)} in all)' if len(rows) > 8 else '')
  return f'{text} at step {what["step"]} of {task}, batch of training rows [{shown}]'


def place_of(p: Progress, s: Stream) -> str:
  return f'leg {p.leg + 1} of {len(s.index)}, step {p.done}'


def steps_done(p: Progress | None, longest: np.ndarray) -> int:
  return 0 if p is None else int(longest[: p.leg].sum()) + int(p.done)


def describe(p: Progress, job: Job, ended: bool) -> dict[str, Any]:
  """What there is to show: where the runs stand, their mean loss and accuracies."""
  about: dict[str, Any] = {'leg': p.leg, 'legs': len(job.streams[0].index), 'done': p.done}
  runs = len(job.seeds)
  if ended:
    rows = p.record.R.reshape(-1, *p.record.R.shape[-2:])[:runs, p.leg - 1]
    about['accuracy'] = rows.mean(axis=0).tolist()
    about['measure'] = 'nats' if likelihood(job.setup.config) else 'accuracy'
  if p.done:
    at = min(p.done, p.record.loss.shape[-1]) - 1
    loss = p.record.loss.reshape(-1, *p.record.loss.shape[-2:])[:runs, p.leg, at]
    about['loss'] = float(np.nanmean(loss)) if np.isfinite(loss).any() else math.nan
  return about
