"""Learners for small devices: the list of `make edge`.

  python -m experiments.export --config=configs/edge.py:er --target=cortex-m7 --ram=256K --out=runs/edge/er

Split Fashion-MNIST, 100 images a class, 5 tasks of two classes, batches of 8, MLP 784-32-10 that sees each
image five times, SGD 0.05, and 100 images of memory where there is one. Class-incremental, but for HAT and
PackNet, which are told the task. `ncm`, `slda` and `ranpac` learn above a random layer that stays as it is,
in one pass; `lora` adapts that layer by factors of rank 4. Those frozen weights are constants: they are in
flash, not in RAM. `latent` keeps 400 times the 32 hidden units instead of images, `remind` 1,000
times eight bytes; `dreamnet` keeps no examples but the network of the last boundary. HAT's smax of 400, a
ridge parameter of 1 and Dream Net's steps with 0.05, whose dreams are rounded to pixels, would amplify
rounding beyond the tolerance of `verify`, in JAX itself as well; they are 50, 100 and 0.02 here.

The word `int8` keeps the rows of a memory in 8 bits a number, `structured` gives RanPAC features that are
made of a seed, so that no projection is kept.
"""

from configs import common

CLOSED = ('ncm', 'slda', 'ranpac')
CELLS = (
  'naive', 'er', 'er_ace', 'derpp', 'agem', 'latent', 'remind', 'gdumb', 'ewc', 'si', 'lwf', 'ncm', 'slda',
  'ranpac', 'lora', 'task,hat', 'task,packnet', 'ranpac,structured', 'latent,int8', 'dreamnet',
)  # fmt: skip


def get_config(arg: str = 'er') -> dict:
  """`arg`: a scenario, methods and variants, as in CELLS."""
  fields, methods, variants = common.variants(arg, 'class', ('structured', 'int8'))
  told = (fields['base'] or fields['scenario']) == 'task'
  frozen = {*CLOSED, 'lora'} & set(methods)
  replay = {'capacity': 100, 'draw': 8}
  arguments = {
    'er': replay,
    'er_ace': replay,
    'derpp': {**replay, 'alpha': 0.1, 'beta': 0.5},
    'agem': replay,
    'latent': {'capacity': 400, 'draw': 8, 'tap': 'l0'},
    'remind': {'capacity': 1000, 'draw': 8, 'tap': 'l0', 'codebooks': 8, 'codes': 16},
    'gdumb': {'capacity': 100},
    'ewc': {'coef': 10.0},
    'lwf': {'outputs': 'heads' if told else 'seen'},
    'hat': {'smax': 50.0},
    'dreamnet': {'draw': 20, 'rounds': 5, 'hidden': (32,)},
    'ranpac': {
      'width': 100,
      'lam': 100.0,
      'features': 'structured' if 'structured' in variants else 'gaussian',
    },
    'lora': {'rank': 4, 'alpha': 4.0, 'targets': 'l0/w'},
  }
  matching = {'derpp'} & set(methods)  # logits, also those of classes to come
  closed = {*CLOSED} & set(methods)
  return {
    **fields,
    'name': '_'.join(('edge', *variants)),
    'seeds': (0,),
    'dataset': 'fashion_mnist_small',
    'data': {'examples_per_class': 100, 'test_per_task': 200, 'test_batch': 200},
    'tasks': 5,
    'order': 'seed',
    'epochs': 1 if closed else 5,
    'batch': 8,
    'ends_batch': 100,
    'model': {'name': 'mlp', 'sizes': (32,)},
    'freeze': ('l0/.*',) if frozen else (),
    'optimizer': {'name': 'sgd', 'lr': 0.02 if 'dreamnet' in methods else 0.05},
    'head': 'task' if told else 'all' if matching or closed else 'seen',
    'methods': methods,
    'compress': {'memory': 'int8' if 'int8' in variants else ''},
    **{m: arguments[m] for m in methods if m in arguments},
  }
