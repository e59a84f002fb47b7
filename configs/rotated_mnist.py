"""Rotated MNIST: the digits turned a little further in every task (Lopez-Paz & Ranzato 2017).

  python -m experiments.run --config=configs/rotated_mnist.py:er --workdir=runs/rotated_mnist/er

20 tasks of 1,000 digits at angles evenly over [0, 180), one pass in batches of 10, MLP 784-100-100-10, SGD
0.1. Differs from the paper in its angles, which are drawn there, and in
testing on all 10,000 test digits. Words after the colon: methods, or joint. Measured with 5 seeds (mean and
95 % interval, per cent): accuracy 43.1 +- 2.1, forgetting 47.8 +- 2.3 without a method; no other is measured.
"""

from configs import common

TASKS = 20


def get_config(arg: str = 'domain') -> dict:
  fields, methods = common.words(arg, 'domain')
  arguments = {'er': {'capacity': 1000}, 'agem': {'capacity': 1000}, 'ewc': {'coef': 10.0}}
  return {
    **fields,
    'name': 'rotated_mnist',
    'seeds': (0, 1, 2, 3, 4),
    'dataset': 'mnist',
    'data': {'examples_per_task': 1000, 'test_batch': 1000},
    'transform': {'name': 'rotated'},
    'tasks': TASKS,
    'batch': 10,
    'model': {'name': 'mlp', 'sizes': (100, 100)},
    'optimizer': {'name': 'sgd', 'lr': 0.1},
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
