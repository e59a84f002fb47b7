"""5-datasets: SVHN, MNIST, CIFAR-10, notMNIST and Fashion-MNIST one after the other (Ebrahimi et al. 2020).

  python -m experiments.run --config=configs/five_datasets.py:task,er --workdir=runs/five_datasets/er

5 tasks of 10 classes, images brought to 32 x 32 x 3, one pass in batches of 32. `tfds build NAME
--file_format=array_record` prepares svhn_cropped, mnist, cifar10 and fashion_mnist; unpack
http://yaroslavvb.com/upload/notMNIST/notMNIST_small.tar.gz in DATA_DIR/images. Any others take their
place by --config.dataset=NAME+NAME+... Not measured here: SVHN and notMNIST are not at hand.
"""

from configs import common


def get_config(arg: str = 'task') -> dict:
  return common.images(
    arg,
    name='five_datasets',
    dataset='svhn_cropped+mnist+cifar10+notmnist+fashion_mnist',
    data={'image': (32, 32, 3)},
    order='fixed',
    tasks=5,
    batch=32,
  )
