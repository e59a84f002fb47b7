"""G9, G10 and G13: methods. Many in one program, what each costs over naive, the exact Fisher information."""

from __future__ import annotations

import numpy as np

from benchmarks import workloads
from benchmarks.goals import Setup
from benchmarks.goals.stream import sizes
from benchmarks.measure import Row, Worker, core, interleave, row


def g9(setup: Setup) -> list[Row]:
  """6 methods x 8 seeds in one program with switches, against a program for each method; cold."""
  rows = []
  small = {'size': workloads.QUICK1, 'seeds': 2} if setup.quick else {}
  for units, target in ((32, 2.0),) if setup.quick else ((256, 1.25), (32, 2.0)):
    turns = interleave(
      {
        kind: Worker('ablation', kind=kind, units=units, cores=core(), **small)
        for kind in ('superset', 'separate')
      },
      max(setup.runs // 2, 1),
      warm=0,
    )
    a, b = (np.array([t['table'] for t in turns[k]]) for k in ('superset', 'separate'))
    note = 'compiling a method takes less time than it did when the goal was set'
    if (gap := float(np.abs(a - b).max())) > 0.01:
      note = f'ACCURACIES DIFFER by {gap:.3f}'
    work = f'G9 W1, {units} units, 6 methods x 8 seeds'
    rows.append(row(turns, 'superset', 'separate', work, 'a program each', target, note=note))
  return rows


def g10(setup: Setup) -> list[Row]:
  """What a method costs over naive training, whole W1."""
  (units, *_), size = sizes(setup)
  names = ('naive', 'er', 'ewc', 'lwf', 'si')
  workers = {n: Worker('ours', units=units, size=size, method_name=n, cores=core()) for n in names}
  flops = {n: workers[n].ready()['flops'] for n in names}
  turns = interleave(workers, setup.runs)
  work = f'G10 W1, {units} units'
  goals = {'er': flops['naive'] / flops['er'], 'ewc': 1 / 1.25, 'lwf': 1 / 1.1, 'si': 1 / 1.15}
  notes = {'er': 'the goal is its FLOPs', 'ewc': '', 'lwf': 'the teacher is one more forward pass'}
  notes['si'] = 'the path and the penalty read and write three more copies of the weights'
  return [
    row(turns, n, 'naive', f'{work}, {n}', 'naive', goal, note=notes[n])
    for n, goal in goals.items()
  ]


def g13(setup: Setup) -> list[Row]:
  """The exact diagonal Fisher information in closed form, against a gradient for each example."""
  (units, *_), size = sizes(setup)
  turns = interleave(
    {
      k: Worker('fisher', kind=k, units=units, size=size, cores=core())
      for k in ('closed', 'gradients')
    },
    setup.runs,
  )
  for kind in turns:
    for t in turns[kind]:
      t['each'] = t['cpu'] / t['times']
  a, b = (turns[k][0]['trace'] for k in ('closed', 'gradients'))
  note = '' if abs(a - b) <= 1e-3 * abs(b) else f'RESULTS DIFFER: trace {a} and {b}'
  work = f'G13 Fisher of {units} units, {size.examples} images'
  return [row(turns, 'closed', 'gradients', work, 'vmapped gradients', 5.0, 'each', note=note)]
