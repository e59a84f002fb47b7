"""Split Tiny ImageNet, the benchmark of De Lange et al. 2022: 10 tasks of 20 classes.

  python -m experiments.run --config=configs/split_tiny_imagenet.py:task,er \\
    --workdir=runs/split_tiny_imagenet/er

64 x 64 pixels, 4,500 images of memory as the survey's larger one, ResNet-18 of 20 filters in place of its
VGG, 10 epochs in batches of 200. Unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip in
DATA_DIR/images; its `val` is the test data. Published for the survey's BASE network, task-incremental, per
cent: PackNet 49.1, iCaRL 47.3, MAS 46.9, EBLL 45.3, GEM 45.1, HAT 43.6, EWC 42.4, LwF 41.9, R-FM 37.3,
mode-IMM 36.9, R-PM 36.1, SI 33.9. Not measured here: the data is not at hand.
"""

from configs import common


def get_config(arg: str = 'task') -> dict:
  return common.images(
    arg,
    capacity=4500,
    name='split_tiny_imagenet',
    dataset='tiny_imagenet',
    tasks=10,
    epochs=10,
    batch=200,
  )
