"""Split MNIST of van de Ven & Tolias 2019 (arXiv:1904.07734), table 4: task-, domain-, class-incremental.

5 tasks of two digits in an order drawn per seed, MLP 784-400-400, Adam 1e-3 through all tasks, 2,000 steps of
128 images per task, pixels in [0, 1], PyTorch's default initialisation; 20 seeds in the paper, with SEM. Read
from GMvandeVen/continual-learning as of April 2019: EWC's Fisher uses the predicted label, the loss of LwF is
1/t CE + (1 - 1/t) T^2 KD with KD averaged over examples AND outputs; "offline" trains task t
on all tasks <= t.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import optax

from cl_jax.compose import chain
from cl_jax.learner import learner
from cl_jax.methods.heads.seen_head import seen_head
from cl_jax.methods.heads.task_head import task_head
from cl_jax.methods.isolation.hat import hat
from cl_jax.methods.isolation.packnet import packnet
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.regularisation.lwf import lwf
from cl_jax.methods.regularisation.si import si
from cl_jax.methods.replay.agem import agem
from cl_jax.methods.replay.derpp import derpp
from cl_jax.methods.replay.dgr import dgr
from cl_jax.methods.replay.er import er
from cl_jax.methods.replay.er_ace import er_ace
from cl_jax.methods.replay.icarl import icarl
from cl_jax.models.layers import in_line
from cl_jax.models.mlp import mlp
from cl_jax.streams import Plan, cumulative, dataset, split
from cl_jax.types import Method
from experiments.published.table import Figure, Row

TASKS, STEPS, BATCH = 5, 2000, 128
HEADS = tuple((2 * t, 2 * t + 1) for t in range(TASKS))
SCENARIOS = ('task', 'domain', 'class')

# (published, SEM) per scenario
PAPER = {
  'naive': ((87.2, 0.94), (59.2, 2.0), (19.9, 0.02)),
  'ewc': ((98.6, 0.22), (64.0, 1.9), (20.0, 0.06)),
  'si': ((99.1, 0.15), (65.4, 1.6), (20.0, 0.06)),
  'lwf': ((99.6, 0.02), (71.5, 1.6), (23.9, 0.44)),
  'dgr': ((99.5, 0.03), (95.7, 0.25), (90.8, 0.41)),
  'offline': ((99.7, None), (98.4, None), (97.9, None)),
}
EWC = {'task': 1e5, 'domain': 1e10, 'class': 1e9}
SI = {'task': 10.0, 'domain': 5e4, 'class': 5e3}
# The defaults of the official repository since f0b1461 (December 2019).
EWC_REPOSITORY = {'task': 1e7, 'domain': 1e6, 'class': 1e8}
SI_REPOSITORY = {'task': 50.0, 'domain': 500.0, 'class': 0.5}


@lru_cache(maxsize=1)
def mnist(data_dir):
  return dataset('mnist', data_dir)


def stream_of(scenario, schedule=None):
  def make(seed, data_dir):
    train, test = relabel(*mnist(data_dir), seed)
    plan = Plan(batch=BATCH, iterations=STEPS, drop_last=True, seed=seed)
    stream = split(train, test, scenario, TASKS, plan=plan)
    return schedule(stream, plan) if schedule else stream

  return make


def relabel(train, test, seed):
  """Shuffles the digits among the labels, as the official code does; then task t has labels 2t, 2t + 1."""
  new = np.random.default_rng([seed, 2019]).permutation(10).astype(np.int32)
  names = tuple(train.names[i] for i in np.argsort(new))
  return train._replace(y=new[train.y], names=names), test._replace(y=new[test.y], names=names)


def head(scenario):
  if scenario == 'task':
    return {'head': task_head(HEADS, 10)}
  return {'head': seen_head(10)} if scenario == 'class' else {}


def build_of(scenario, method, tx=None):
  classes = 2 if scenario == 'domain' else 10

  def build(hp, weights):
    del hp, weights
    named = {} if method is None else method(scenario)
    parts = {**named, **head(scenario)}
    return learner(
      mlp((400, 400), classes, 'torch'),
      tx or optax.adam(1e-3),
      chain(**parts) if parts else Method(),
    )

  return build


def with_lwf(scenario):
  outputs = {'task': 'heads', 'domain': 'all', 'class': 'seen'}[scenario]
  return {'lwf': lwf(1.0, 2.0, outputs, HEADS if scenario == 'task' else (), True, True)}


def with_ewc(scenario, coefs=EWC):
  return {'ewc': ewc(coefs[scenario], 'predicted')}


def with_repository_ewc(scenario):
  return with_ewc(scenario, EWC_REPOSITORY)


def with_si(scenario, coefs=SI):  # the official repository's path, and no clipping
  return {'si': si(coefs[scenario], 0.1, 'total', False)}


def with_repository_si(scenario):
  return with_si(scenario, SI_REPOSITORY)


def with_derpp(scenario):
  return {'derpp': derpp(2000, BATCH, 0.5, 0.5)}


def with_er_ace(scenario):
  return {'er_ace': er_ace(2000, BATCH)}


def with_dgr(scenario):
  outputs = {'task': 'heads', 'domain': 'all', 'class': 'seen'}[scenario]
  return {'dgr': dgr(BATCH, (400, 400), 100, 1e-3, outputs, HEADS if scenario == 'task' else ())}


def with_icarl(scenario):
  # 18 of 146 rows are exemplars: their share of 2,000 in 12,000 + 2,000 images.
  return {'icarl': icarl(10, 2000, 18, 1.0, 2.0)}


def with_er(scenario):
  return {'er': er(2000, BATCH, 'reservoir', classes=10)}


def with_agem(scenario):
  classes, tasks = (2, TASKS) if scenario == 'domain' else (10, 1)
  return {'agem': agem(2000, BATCH, classes, tasks)}


def with_hat(scenario):
  return {'hat': hat(TASKS, STEPS // 20, 0.75, 400.0, wires=in_line(('l0', 'l1')))}


def with_packnet(scenario):
  return {'packnet': packnet(0.75, 0.5, 2 * STEPS // 3)}


def rows() -> list[Row]:
  found = []

  def add(scenario, method, setting, build, figures, schedule=None, note=''):
    stream = stream_of(scenario, schedule)
    found.append(
      Row('split_mnist', 'mnist', scenario, method, setting, stream, build, figures, note)
    )

  methods = {'naive': None, 'ewc': with_ewc, 'si': with_si, 'lwf': with_lwf, 'dgr': with_dgr}
  strengths = {'ewc': ('lambda', EWC), 'si': ('c', SI)}
  for i, scenario in enumerate(SCENARIOS):
    for name, method in methods.items():
      value, err = PAPER[name][i]
      symbol, strength = strengths.get(name, ('', {}))
      setting = f'{symbol} {strength[scenario]:.0e}' if symbol else 'published'
      add(scenario, name, setting, build_of(scenario, method), (Figure('acc', value, err),))
    for name, symbol, strength, method in (
      ('ewc', 'lambda', EWC_REPOSITORY, with_repository_ewc),
      ('si', 'c', SI_REPOSITORY, with_repository_si),
    ):
      value, err = PAPER[name][i]
      add(
        scenario,
        name,
        f'{symbol} {strength[scenario]:.0e}',
        build_of(scenario, method),
        (Figure('acc', value, err),),
        note=f'{symbol} as in the official repository since f0b1461',
      )
    value, err = PAPER['offline'][i]
    add(
      scenario,
      'offline',
      'published',
      build_of(scenario, None),
      (Figure('acc', value, err),),
      lambda stream, plan: cumulative(stream, plan),
      'the schedule cumulative: task t trains on all tasks up to t',
    )
  ours = (Figure('acc', None), Figure('forgetting', None))
  same = 'not in the paper; the same protocol'
  for scenario in SCENARIOS:
    add(scenario, 'er', '2000 images', build_of(scenario, with_er), ours, note=same)
    add(scenario, 'agem', '2000 images', build_of(scenario, with_agem), ours, note=same)
  add(
    'class',
    'icarl',
    '2000 images',
    build_of('class', with_icarl),
    (Figure('acc', 94.6, 0.11),),
    note='temperature 2, as the official repository',
  )
  for name, method in (('derpp', with_derpp), ('er_ace', with_er_ace)):
    add('class', name, '2000 images', build_of('class', method), ours, note=same)
  sgd = optax.sgd(0.05)
  add('task', 'hat', 'sgd 0.05', build_of('task', with_hat, sgd), ours, note=f'{same}, but SGD')
  add('task', 'packnet', 'adam', build_of('task', with_packnet), ours, note=same)
  return found
