"""A small ViT that adapts by LoRA and replays, for devices: 28 x 28 images, 16 patches, two layers of 32.

  python -m experiments.export --config=configs/edge_vit.py --backend=iree --out=runs/edge/vit

Split Fashion-MNIST, 100 images a class, 5 tasks of two classes, batches of 8, Adam 1e-3. The backbone is
drawn and frozen; its weights are constants of the program.
"""

from configs import common

CELLS = ('lora,er',)


def get_config(arg: str = 'lora,er') -> dict:
  """`arg`: a scenario and methods."""
  fields, methods = common.words(arg, 'class')
  arguments = {
    'er': {'capacity': 100, 'draw': 8},
    'lora': {'rank': 4, 'alpha': 4.0, 'targets': 'backbone/layers/(q|v)/w'},
  }
  shape = {'image': 28, 'patch': 7, 'channels': 1, 'd': 32, 'depth': 2, 'heads': 2, 'ffn': 64}
  return {
    **fields,
    'name': 'edge_vit',
    'seeds': (0,),
    'dataset': 'fashion_mnist_small',
    'data': {'examples_per_class': 100, 'test_per_task': 200, 'test_batch': 200},
    'tasks': 5,
    'order': 'seed',
    'epochs': 5,
    'batch': 8,
    'ends_batch': 100,
    'model': {'name': 'vit', 'config': shape},
    'freeze': ('backbone/.*',),
    'optimizer': {'name': 'adam', 'lr': 1e-3},
    'head': 'seen',
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
