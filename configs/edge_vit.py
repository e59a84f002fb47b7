"""A small ViT that adapts by LoRA and replays, for devices: 28 x 28 images, 16 patches, two layers of 32.

  python -m experiments.export --config=configs/edge_vit.py --backend=iree --out=runs/edge/vit
  python -m experiments.export --config=configs/edge_vit.py:lora,er,int8 --ram=768K --out=runs/edge/vit8
  python -m experiments.run --config=configs/edge_vit.py:pretrain --workdir=runs/edge/vit_pretraining
  python -m experiments.weights merge runs/edge/vit_pretraining --out=runs/edge/vit_mnist
  python -m experiments.export --config=configs/edge_vit.py:lora,er,int8,pretrained --out=runs/edge/vit8p

Split Fashion-MNIST, 100 images a class, 5 tasks of two classes, batches of 8, Adam 1e-3. The backbone is
drawn and frozen; its weights are constants of the program. The word `int8` keeps those of the layers in 8
bits and computes a gradient in four parts, so that the activations of a quarter of the batch are kept; its
learning rates, 1e-2 and of `prompt_tuning` 3e-2, were the best of three (from 1e-3 and from 3e-3 upwards,
each about three times the one before) on a held-out fifth of one seed's images, with the drawn backbone.
`prompt_tuning` trains four rows that are put before the patches.

The word `pretrained` reads the backbone from runs/edge/vit_mnist, which the third and fourth command make:
MNIST's ten digits at once, 10,000 images, 90.5 % of 2,000 test images. Then `lora,er,int8` reaches 50.4 % of
the clothes at the end of the stream (drawn backbone: 40.4), `prompt_tuning,er,int8` 38.1 % (19.0); one seed.
"""

from configs import common

CELLS = (
  'lora,er', 'lora,er,int8', 'prompt_tuning,er,int8', 'lora,er,int8,pretrained',
  'prompt_tuning,er,int8,pretrained',
)  # fmt: skip
WEIGHTS = 'runs/edge/vit_mnist'
SHAPE = {'image': 28, 'patch': 7, 'channels': 1, 'd': 32, 'depth': 2, 'heads': 2, 'ffn': 64}


def pretraining() -> dict:
  """MNIST's ten digits at once: other images and classes than the stream's."""
  return {
    'name': 'edge_vit_pretraining',
    'seeds': (0,),
    'dataset': 'mnist',
    'data': {'examples_per_class': 1000, 'test_per_task': 2000},
    'scenario': 'class',
    'tasks': 1,
    'epochs': 10,
    'batch': 64,
    'model': {'name': 'vit', 'config': SHAPE},
    'optimizer': {'name': 'adam', 'lr': 1e-3},
    'head': 'all',
  }


def get_config(arg: str = 'lora,er') -> dict:
  """`arg`: a scenario, methods and variants, as in CELLS, or `pretrain`."""
  if arg == 'pretrain':
    return pretraining()
  fields, methods, variants = common.variants(arg, 'class', ('int8', 'pretrained'))
  small = 'int8' in variants
  rate = (3e-2 if 'prompt_tuning' in methods else 1e-2) if small else 1e-3
  arguments = {
    'er': {'capacity': 100, 'draw': 8},
    'prompt_tuning': {'length': 4},
    'lora': {'rank': 4, 'alpha': 4.0, 'targets': 'backbone/layers/(q|v)/w'},
  }
  given = {'pretrained': WEIGHTS} if 'pretrained' in variants else {'config': SHAPE}
  return {
    **fields,
    'name': '_'.join(('edge_vit', *variants)),
    'seeds': (0,),
    'dataset': 'fashion_mnist_small',
    'data': {'examples_per_class': 100, 'test_per_task': 200, 'test_batch': 200},
    'tasks': 5,
    'order': 'seed',
    'epochs': 5,
    'batch': 8,
    'ends_batch': 100,
    'model': {'name': 'vit', **given},
    'freeze': ('backbone/.*',),
    'frozen_bits': 8 if small else None,
    'micro_batches': 4 if small else 1,
    'optimizer': {'name': 'adam', 'lr': rate},
    'head': 'seen',
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
