"""Split Fashion-MNIST on the images that ship with the package: runs everywhere, in a minute.

  python -m experiments.run --config=configs/split_fashion.py:class,er --workdir=runs/split_fashion/er

6,000 training and 2,000 test images, 5 tasks of two classes drawn by the seed, 5 epochs in batches of 32,
MLP 784-256-256, SGD 0.05. The words after the colon are a scenario and methods. Class-incremental, measured
with 5 seeds (mean and 95 % interval, per cent):

  method   accuracy      forgetting
  (none)   23.9 +- 8.2   92.3 +- 11.1
  ewc      25.1 +- 9.9   90.6 +- 13.2
  lwf      33.9 +- 7.3   32.3 +- 14.5
  agem     34.8 +- 15.6  78.6 +- 20.3
  er       76.8 +- 3.9   19.4 +- 6.6
"""

from configs import common


def get_config(arg: str = 'class') -> dict:
  fields, methods = common.words(arg, 'class')
  base = fields['base'] or fields['scenario']
  arguments = {
    'er': {'capacity': 500, 'draw': 32},
    'agem': {'capacity': 500, 'draw': 128},
    'ewc': {'coef': 100.0},
    'lwf': {'outputs': {'task': 'heads', 'domain': 'all', 'class': 'seen'}[base]},
  }
  return {
    **fields,
    'name': 'split_fashion',
    'seeds': (0, 1, 2, 3, 4),
    'dataset': 'fashion_mnist_small',
    'tasks': 5,
    'order': 'seed',
    'epochs': 5,
    'batch': 32,
    'model': {'name': 'mlp', 'sizes': (256, 256)},
    'optimizer': {'name': 'sgd', 'lr': 0.05},
    'head': {'task': 'task', 'domain': 'all', 'class': 'seen'}[base],
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
