"""Split CIFAR-10 with a reduced ResNet-18.

  python -m experiments.run --config=configs/split_cifar10.py:task,er --workdir=runs/split_cifar10/er

5 tasks of two classes drawn by the seed, one pass in batches of 10 and 10 from memory, ResNet-18 of 20
filters, SGD 0.03. With the 10,000 images of the first batch file instead of all 50,000, say so: "10k/1k".
The words after the colon are a scenario and methods. No figure of it is measured yet.
"""

from configs import common


def get_config(arg: str = 'class') -> dict:
  fields, methods = common.words(arg, 'class')
  base = fields['base'] or fields['scenario']
  arguments = {
    'er': {'capacity': 500, 'draw': 10},
    'agem': {'capacity': 500, 'draw': 64},
    'ewc': {'coef': 10.0, 'labels': 'empirical'},
    'lwf': {'outputs': {'task': 'heads', 'domain': 'all', 'class': 'seen'}[base]},
  }
  return {
    **fields,
    'name': 'split_cifar10',
    'seeds': (0, 1, 2),
    'dataset': 'cifar10',
    'tasks': 5,
    'order': 'seed',
    'batch': 10,
    'model': {
      'name': 'resnet',
      'mean': (0.4914, 0.4822, 0.4465),
      'std': (0.2470, 0.2435, 0.2616),
    },
    'optimizer': {'name': 'sgd', 'lr': 0.03},
    'head': {'task': 'task', 'domain': 'all', 'class': 'seen'}[base],
    'methods': methods,
    'chunk': 25,
    **{m: arguments[m] for m in methods if m in arguments},
  }
