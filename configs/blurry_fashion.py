"""Fashion-MNIST whose classes come and go gradually: no task and no boundary is told.

  python -m experiments.run --config=configs/blurry_fashion.py:er --workdir=runs/blurry_fashion/er

The images that ship with the package, 10 classes in an order drawn by the seed, one pass in batches of 10,
arrival times blurred by a standard deviation of half the distance between classes; evaluated ten times.
Methods that need a boundary (ewc, lwf, agem) are refused. Accuracy at the end, measured with 5 seeds (mean
and 95 % interval, per cent): 22.2 +- 4.8 without a method, 71.2 +- 3.0 with er.
"""

from configs import common


def get_config(arg: str = 'blurry') -> dict:
  fields, methods = common.words(f'blurry,{arg}', 'class')
  return {
    **fields,
    'name': 'blurry_fashion',
    'seeds': (0, 1, 2, 3, 4),
    'dataset': 'fashion_mnist_small',
    'tasks': 10,
    'order': 'seed',
    'blurry': {'by': 'class', 'width': 0.5},
    'batch': 10,
    'model': {'name': 'mlp', 'sizes': (256, 256)},
    'optimizer': {'name': 'sgd', 'lr': 0.05},
    'head': 'seen',
    'methods': methods,
    **({'er': {'capacity': 500, 'draw': 10}} if 'er' in methods else {}),
  }
