"""CORe50-NC: objects filmed on the go; 10 of them first, then 5 at a time (Lomonaco & Maltoni 2017).

  python -m experiments.run --config=configs/core50.py:latent,si,cwr --workdir=runs/core50/ar1

9 tasks over 50 objects, frames brought to 32 x 32 pixels, 1,500 rows of memory, ResNet-18 of 20 filters with
batch renormalisation; `latent,si,cwr` is AR1* with latent replay. Unpack
http://bias.csr.unibo.it/maltoni/download/core50/core50_128x128.zip in DATA_DIR/images; sessions 3, 7 and 10
are the test data. Differs from the published runs in its network, which is not pretrained, and its frames,
where theirs have 128 pixels. Not measured here: the data is not at hand.
"""

from configs import common


def get_config(arg: str = 'class') -> dict:
  return common.images(
    arg,
    capacity=1500,
    name='core50',
    dataset='core50',
    data={'image': (32, 32, 3)},
    order='fixed',
    tasks=9,
    task_sizes=(10, 5, 5, 5, 5, 5, 5, 5, 5),
    batch=64,
    model={
      'name': 'resnet',
      'mean': (0.5, 0.5, 0.5),
      'std': (0.25, 0.25, 0.25),
      'renorm': (1.25, 0.5),
    },
  )
