"""G12 and G14: convolutions and transformers against PyTorch."""

from __future__ import annotations

from benchmarks import workloads
from benchmarks.goals import Setup
from benchmarks.goals.stream import absent
from benchmarks.measure import Row, Worker, core, disagreement, interleave, row

RATES = {'cnn': 0.05, 'resnet': 0.1}


def g12(setup: Setup) -> list[Row]:
  """W2 with a small convolutional network and with the reduced ResNet-18."""
  goals = {'PyTorch, channels last': 1.1, 'Avalanche, preloaded': 1.5}
  rows = []
  full = {'cnn': workloads.W2, 'resnet': workloads.Size(5, 160, 50)}
  for net in full:
    size = workloads.QUICK2 if setup.quick else full[net]
    work = f'G12 W2, {net}, {size.tasks} x {size.examples}'
    if not setup.peers:
      rows += [absent(work, n, t, setup) for n, t in goals.items()]
      continue
    data = workloads.export(*workloads.w2(size))
    common = {'net': net, 'rate': RATES[net], 'cores': core()}
    peer = {**common, 'data': str(data), 'draw': workloads.DRAW['w2']}
    turns = interleave(
      {
        'ours': Worker('ours', work='w2', size=size, **common),
        'PyTorch, channels last': Worker('torch_w2', setup.peers, setup.env, **peer),
        'PyTorch, channels first': Worker(
          'torch_w2', setup.peers, setup.env, channels_last=False, **peer
        ),
        'Avalanche, preloaded': Worker('avalanche_stream', setup.peers, setup.env, **peer),
      },
      min(setup.runs, 5),
    )
    workloads.remove(data)
    names = ('ours', 'PyTorch, channels last', 'PyTorch, channels first')
    note = '' if setup.quick else disagreement(turns, names, 0.06)
    goal = {**goals, 'PyTorch, channels first': None}
    for name, target in goal.items():
      rows.append(row(turns, 'ours', name, work, name, target, note=note))
  return rows


def g14(setup: Setup) -> list[Row]:
  """A ViT-S/16 step, whole and with LoRA, against PyTorch with transformers and peft."""
  rows = []
  for kind in ('full', 'lora'):
    work = f'G14 ViT-S step, {"LoRA on q and v" if kind == "lora" else "all weights"}'
    against = 'PyTorch + peft' if kind == 'lora' else 'PyTorch'
    if not setup.peers:
      rows += [absent(work, against, t, setup, m) for m, t in (('CPU', 1.2), ('memory', 1.25))]
      continue
    batch = 1 if setup.quick else 8
    common = {'kind': kind, 'batch': batch, 'cores': core()}
    turns = interleave(
      {
        'ours': Worker('vit_ours', **common),
        against: Worker('torch_vit', setup.peers, setup.env, **common),
      },
      setup.runs,
    )
    rows.append(row(turns, 'ours', against, work, against, 1.2))
    rows.append(row(turns, 'ours', against, work, against, 1.25, 'rss', 'memory', 'MB', 1e6))
  llm = Row('G14 SmolLM2 step, LoRA', 'PyTorch + peft', 'CPU', 1.2, note='no LLM in this release')
  return [*rows, llm]
