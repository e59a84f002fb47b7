"""Accuracy for a budget of bytes, by the codec of the memory: Split Fashion-MNIST, class-incremental.

  python -m experiments.sweep --config=configs/compression.py:er --workdir=runs/compression/er
  python -m experiments.sweep --config=configs/compression.py:latent --workdir=runs/compression/latent
  python -m experiments.sweep --config=configs/compression.py:ewc --workdir=runs/compression/ewc
  python -m experiments.sweep --config=configs/compression.py:adam --workdir=runs/compression/adam

6,000 images that ship with the package, 5 tasks of two classes drawn by the seed, 3 epochs in batches of 32,
MLP 784-128-64. `er` keeps images and `latent` the 128 activations of the first layer, both within 60,000
bytes: fewer bytes a row are more rows. `ewc` (5 tasks of permuted pixels, 2,000 images each) has its
importances and anchor, `adam` (with er's images) its moments in fewer bits. What came out: docs/memory.md.
"""

from configs import common

CELLS = ('er', 'latent', 'ewc', 'adam')
BUDGET = 60_000
SWEEPS = {
  'er': {
    'compress.memory': ('float32', 'bfloat16', 'uint8', 'int4', 'pq98x8')
  },  # int8 leaves images as uint8 does
  'latent': {'compress.memory': ('float32', 'bfloat16', 'uint8', 'int8', 'int4', 'pq32x16')},
  'ewc': {
    'compress.state': (
      (),
      (('.*importance/.*', 'bfloat16'),),
      (('.*importance/.*', 'udynamic8'),),
      (('.*importance/.*', 'udynamic8'), ('.*anchor/.*', 'bfloat16')),
    )
  },
  'adam': {'compress.optimizer': ('', 'bfloat16', 'dynamic8')},
}


def get_config(arg: str = 'er') -> dict:
  """`arg`: a name of CELLS."""
  _, methods = common.words('er' if arg == 'adam' else arg, 'class')
  replay = {'draw': 8}
  own = {
    # Pixels in an order of its own for each of 5 tasks, which fine-tuning forgets.
    'ewc': {
      'scenario': 'domain',
      'transform': {'name': 'permuted'},
      'data': {'examples_per_class': 200, 'test_per_task': 500},
      'ewc': {'coef': 5.0},
    },
    'latent': {'budget_bytes': BUDGET, 'latent': {**replay, 'tap': 'l0'}},
    'er': {'budget_bytes': BUDGET, 'er': replay},
  }
  return {
    'name': f'compression_{arg}',
    'seeds': (0, 1, 2),
    'dataset': 'fashion_mnist_small',
    'scenario': 'class',
    'tasks': 5,
    'order': 'seed',
    'epochs': 3,
    'batch': 32,
    'model': {'name': 'mlp', 'sizes': (128, 64)},
    'optimizer': {'name': 'adam', 'lr': 1e-3} if arg == 'adam' else {'name': 'sgd', 'lr': 0.05},
    'head': 'all' if arg == 'ewc' else 'seen',
    'methods': methods,
    **own[methods[0]],
    'sweep': SWEEPS[arg],
  }
