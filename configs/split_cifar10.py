"""Split CIFAR-10 with the reduced ResNet-18.

  python -m experiments.run --config=configs/split_cifar10.py:task,er --workdir=runs/split_cifar10/er

5 tasks of two classes drawn by the seed, one pass in batches of 10 and 10 from memory, ResNet-18 of 20
filters, SGD 0.03. The words after the colon are a scenario and methods. `tfds build cifar10
--file_format=array_record` prepares the data; with 10,000 of its images instead of all 50,000, say so.
Measured with such a part (10k/1k), task-incremental, 3 seeds (mean and 95 % interval, per cent): 61.0 +- 14.0
without a method, 81.3 +- 6.8 with er; with 2 seeds 79.5 +- 17.0 with derpp and 80.6 +- 0.5 with er_ace.
"""

from configs import common


def get_config(arg: str = 'class') -> dict:
  return common.images(
    arg,
    name='split_cifar10',
    dataset='cifar10',
    tasks=5,
    model={
      'name': 'resnet',
      'mean': (0.4914, 0.4822, 0.4465),
      'std': (0.2470, 0.2435, 0.2616),
    },
  )
