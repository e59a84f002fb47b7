"""Permuted MNIST of van de Ven & Tolias 2019 (arXiv:1904.07734), table 5: 10 tasks at the full protocol.

MLP 1024-1000-1000, images padded to 32 x 32, Adam 1e-4 through all tasks, 5,000 steps of 256 images per task,
a permutation per task and seed. EWC's strengths are the defaults of the official repository since f0b1461,
whose online form applies gamma a second time in the loss: a factor on lambda. A seed of a row takes half
an hour of one CPU core or so, hence `slow`.
"""

from __future__ import annotations

import optax

from cl_jax.compose import chain
from cl_jax.learner import learner
from cl_jax.methods.heads.seen_head import seen_head
from cl_jax.methods.heads.task_head import task_head
from cl_jax.methods.isolation.hat import hat
from cl_jax.methods.isolation.packnet import packnet
from cl_jax.methods.regularisation.ewc import ewc
from cl_jax.methods.regularisation.lwf import lwf
from cl_jax.models.layers import in_line
from cl_jax.models.mlp import mlp
from cl_jax.streams import Plan, cumulative, permuted
from cl_jax.types import Method
from experiments.published.split_mnist import SCENARIOS, mnist
from experiments.published.table import Figure, Row

TASKS, STEPS, BATCH = 10, 5000, 256
SHORT = 940  # of methods that the paper does not have: 4 epochs a task, 6 minutes of a core a seed
HEADS = tuple(tuple(range(10 * t, 10 * t + 10)) for t in range(TASKS))

PAPER = {
  'naive': (81.8, 78.5, 17.3),
  'ewc': (94.7, 94.3, 25.0),
  'ewc online': (96.0, 94.4, 33.9),
  'lwf': (69.8, 72.6, 22.6),
}
EWC = {'task': 500.0, 'domain': 500.0, 'class': 1.0}
ONLINE = {'task': (500.0, 0.8), 'domain': (1000.0, 0.9), 'class': (5.0, 1.0)}


def stream_of(scenario, offline=False, steps=STEPS):
  def make(seed, data_dir):
    plan = Plan(batch=BATCH, iterations=steps, drop_last=True, seed=seed)
    stream = permuted(
      *mnist(data_dir), scenario, TASKS, view_seed=seed, first_plain=seed == 0, pad=2, plan=plan
    )
    return cumulative(stream, plan) if offline else stream

  return make


def parts_of(scenario, method):
  """The methods of a row, then the head of its scenario, by name."""
  online, gamma = ONLINE[scenario]
  outputs = {'task': 'heads', 'domain': 'all', 'class': 'seen'}[scenario]
  parts = {
    'naive': {},
    'offline': {},
    'ewc': {'ewc': ewc(EWC[scenario], 'predicted')},
    'ewc online': {'ewc': ewc(online * gamma, 'predicted', True, gamma)},
    'lwf': {'lwf': lwf(1.0, 2.0, outputs, HEADS if scenario == 'task' else (), True, True)},
    'hat': {'hat': hat(TASKS, SHORT // 4, 0.75, 400.0, wires=in_line(('l0', 'l1')))},
    'packnet': {'packnet': packnet(0.75, 0.75, 2 * SHORT // 3)},
  }[method]
  if scenario == 'task':
    return {**parts, 'head': task_head(HEADS, 10 * TASKS)}
  return {**parts, 'head': seen_head(10 * TASKS)} if scenario == 'class' else parts


def build_of(scenario, method, tx=None):
  classes = 10 if scenario == 'domain' else 10 * TASKS

  def build(hp, weights):
    del hp, weights
    parts = parts_of(scenario, method)
    return learner(
      mlp((1000, 1000), classes, 'torch'),
      tx or optax.adam(1e-4),
      chain(**parts) if parts else Method(),
    )

  return build


def rows() -> list[Row]:
  found = []
  for i, scenario in enumerate(SCENARIOS):
    for method, published in (*PAPER.items(), ('offline', (97.7, 97.7, 97.7))):
      value = published[i]
      found.append(
        Row(
          'permuted_mnist',
          'mnist',
          scenario,
          method,
          'published',
          stream_of(scenario, method == 'offline'),
          build_of(scenario, method),
          (Figure('acc', value),),
          'about half an hour of a core per seed',
          True,
        )
      )
  note = f'not in the paper; the same protocol, but {SHORT} steps a task'
  figures = (Figure('acc', None), Figure('forgetting', None))
  for method, tx, with_ in (('hat', optax.sgd(0.05), ' and SGD'), ('packnet', None, '')):
    found.append(
      Row(
        'permuted_mnist',
        'mnist',
        'task',
        method,
        f'{SHORT} steps',
        stream_of('task', steps=SHORT),
        build_of('task', method, tx),
        figures,
        note + with_,
        True,
      )
    )
  return found
