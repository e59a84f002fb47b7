"""G1 to G4: a whole stream on one core, against Avalanche, PyTorch, the processor and a bare scan."""

from __future__ import annotations

from benchmarks import workloads
from benchmarks.goals import Setup
from benchmarks.measure import Row, Worker, core, disagreement, interleave, row

# Of the medians over turns: the peers draw other numbers, and Avalanche rehearses nothing in its first task.
TOLERANCE = 0.06
STOCK = 'PyTorch as installed: its MKL takes a slow path on this AMD processor'


def sizes(setup: Setup) -> tuple[tuple[int, ...], workloads.Size]:
  return ((32,), workloads.QUICK1) if setup.quick else ((256, 100), workloads.W1)


def absent(work: str, against: str, target: float | None, setup: Setup, metric: str = 'CPU') -> Row:
  return Row(work, against, metric, target, note=setup.missing)


def g1(setup: Setup) -> list[Row]:
  """Avalanche, preloaded and by its usual path, whole W1."""
  targets = {256: (3.6, 11.0), 100: (9.0, 30.0)}
  units, size = sizes(setup)
  rows = []
  for h in units:
    work = f'G1 W1, {h} units'
    wanted = targets.get(h, (None, None))
    names = ('Avalanche, preloaded', 'Avalanche, PIL')
    if not setup.peers:
      rows += [absent(work, n, w, setup) for n, w in zip(names, wanted, strict=True)]
      continue
    stream, facts = workloads.w1(size)
    data = workloads.export(stream, facts)
    common = {'data': str(data), 'units': h, 'cores': core()}
    turns = interleave(
      {
        'ours': Worker('ours', units=h, size=size, cores=core()),
        **{
          name: Worker('avalanche_stream', setup.peers, setup.env, kind=kind, **common)
          for name, kind in zip(names, ('preloaded', 'pil'), strict=True)
        },
      },
      setup.runs,
    )
    workloads.remove(data)
    note = '' if setup.quick else disagreement(turns, ('ours', *names), TOLERANCE)
    for name, target in zip(names, wanted, strict=True):
      rows.append(row(turns, 'ours', name, work, name, target, note=note))
  return rows


def g2(setup: Setup) -> list[Row]:
  """PyTorch, tuned by hand; what autograd and torch.compile make of it stands beside."""
  targets = {256: 1.35, 100: 1.7}
  units, size = sizes(setup)
  rows = []
  for h in units:
    work = f'G2 W1, {h} units'
    if not setup.peers:
      rows.append(absent(work, 'PyTorch, by hand', targets.get(h), setup))
      continue
    stream, facts = workloads.w1(size)
    data = workloads.export(stream, facts)

    def torch(env, kind='hand', data=data, h=h):
      return Worker('torch_w1', setup.peers, env, kind=kind, data=str(data), units=h, cores=core())

    names = {
      'PyTorch, by hand': torch(setup.env),
      'PyTorch, foreach': torch(setup.env, 'foreach'),
    }
    if setup.env:
      names['PyTorch as installed, by hand'] = torch({})
    if not setup.quick:
      names['PyTorch, torch.compile'] = torch(setup.env, 'compile')
    turns = interleave(
      {'ours': Worker('ours', units=h, size=size, cores=core()), **names}, setup.runs
    )
    workloads.remove(data)
    note = '' if setup.quick else disagreement(turns, ('ours', *names), TOLERANCE)
    for name in names:
      target = targets.get(h) if 'by hand' in name else None
      why = STOCK if 'installed' in name else 'both sides do their products at the same rate'
      rows.append(row(turns, 'ours', name, work, name, target, note=note or why))
  return rows


def g3(setup: Setup) -> list[Row]:
  """The fraction of the processor's matrix-product rate that a run reaches."""
  units, size = sizes(setup)
  rows = []
  for h in units[:1]:
    for part, target in (('run', 0.90), ('steps', 0.80)):
      ours = Worker('ours', units=h, size=size, part=part, cores=core())
      flops = ours.ready()['flops']
      turns = interleave(
        {'ours': ours, 'sgemm': Worker('sgemm', flops=flops, cores=core())}, setup.runs
      )
      what = 'whole run' if part == 'run' else 'steps alone'
      work = f'G3 W1, {h} units, {what}'
      note = 'products of 20 rows, and the update reads and writes the weights once more'
      rows.append(row(turns, 'ours', 'sgemm', work, 'sgemm 2048', target, note=note))
  return rows


def g4(setup: Setup) -> list[Row]:
  """What the abstraction costs over one hand-written scan."""
  units, size = sizes(setup)
  rows = []
  for h in units:
    work = f'G4 W1, {h} units'
    stream, facts = workloads.w1(size)
    data = workloads.export(stream, facts)
    turns = interleave(
      {
        'ours': Worker('ours', units=h, size=size, cores=core()),
        'bare': Worker('bare', units=h, data=str(data), cores=core()),
      },
      setup.runs,
    )
    workloads.remove(data)
    note = '' if setup.quick else disagreement(turns, ('ours', 'bare'), TOLERANCE)
    against = 'bare scan'
    rows.append(row(turns, 'ours', 'bare', work, against, 1 / 1.05, note=note))
    rows.append(
      row(turns, 'ours', 'bare', work, against, 1 / 1.05, 'rss', 'memory', 'MB', 1e6, note)
    )
  return rows
