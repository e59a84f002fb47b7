"""Split CIFAR-100 with the reduced ResNet-18, at the protocol of Chaudhry et al. 2019 (arXiv:1902.10486).

  python -m experiments.run --config=configs/split_cifar100.py:task,er --workdir=runs/split_cifar100/er

17 tasks of 5 classes (the paper holds 3 of 20 back to choose settings: `validation` does that here), one
pass in batches of 10 and 10 from memory, SGD 0.03; the memory holds one image per class, capacities of
255, 425 and 1105 hold 3, 5 and 13. `tfds build cifar100 --file_format=array_record` prepares the data.
Published with 17 tasks, task-incremental, for 1/3/5/13 images per class, per cent: none 40.6, agem
54.9/56.9/59.9/63.1, er (reservoir) 53.1/59.7/65.5/68.5, er (ring) 56.2/60.9/62.6/64.3, joint 68.3. Not
measured here: the data is not at hand.
"""

from configs import common

TASKS = 17


def get_config(arg: str = 'task') -> dict:
  return common.images(
    arg,
    capacity=5 * TASKS,
    name='split_cifar100',
    dataset='cifar100',
    task_sizes=(5,) * TASKS,
    tasks=TASKS,
    model={
      'name': 'resnet',
      'mean': (0.4914, 0.4822, 0.4465),
      'std': (0.2470, 0.2435, 0.2616),
    },
  )
