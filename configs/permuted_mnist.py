"""Permuted MNIST with tiny memories, at the protocol of Chaudhry et al. 2019 (arXiv:1902.10486).

  python -m experiments.run --config=configs/permuted_mnist.py:er --workdir=runs/permuted_mnist/er
  python -m experiments.run --config=configs/permuted_mnist.py:er --workdir=runs/permuted_mnist/ring5 \\
    --config.er.writer=ring --config.er.capacity=850

17 tasks of 1,000 digits, pixels in an order of their own, one pass in batches of 10 and 10 from memory, MLP
784-256-256-10, SGD 0.1. The memory holds 1 digit per class and task; capacities of 510, 850 and 2550 hold
3, 5 and 15. Accuracy at the end in per cent, published, for 1/3/5/15:

  (none)            53.5
  ewc               63.1                            Fisher over its largest entry
  agem              62.1 / 63.2 / 64.1 / 66.0
  er, reservoir     68.9 / 75.2 / 76.2 / 79.8
  er, ring          70.2 / 73.5 / 75.8 / 79.4
  joint             about 83                        as :joint

Measured with 5 seeds and 1 digit per class and task (mean and 95 % interval): 53.9 +- 2.9 without a method,
70.3 +- 1.0 with er (reservoir), 79.4 +- 1.1 for joint. The others are not measured here.
"""

from configs import common

TASKS = 17


def get_config(arg: str = 'domain') -> dict:
  fields, methods = common.words(arg, 'domain')
  arguments = {
    'er': {'capacity': 10 * TASKS, 'draw': 10},
    'agem': {'capacity': 10 * TASKS, 'draw': 256},
    'ewc': {'coef': 10.0, 'labels': 'empirical', 'online': True, 'decay': 0.54, 'normalise': True},
  }
  return {
    **fields,
    'name': 'permuted_mnist',
    'seeds': (0, 1, 2, 3, 4),
    'dataset': 'mnist',
    'data': {'examples_per_task': 1000, 'test_batch': 1000},
    'transform': {'name': 'permuted'},
    'tasks': TASKS,
    'order': 'seed',
    'batch': 10,
    'model': {'name': 'mlp', 'sizes': (256, 256), 'init': 0.1, 'bias': 0.1},
    'optimizer': {'name': 'sgd', 'lr': 0.1},
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
