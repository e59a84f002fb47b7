"""Omniglot by alphabets: a task is the characters of one, as in the survey of De Lange et al. 2022.

  python -m experiments.run --config=configs/omniglot.py:task,er --workdir=runs/omniglot/er

The split `small1`: 5 alphabets of 136 characters, 20 drawings each, of which 5 are the test data; 28 x 28
grey pixels, 20 epochs in batches of 16, two convolutions and a hidden layer, SGD 0.05. `tfds build omniglot
--file_format=array_record` prepares the data; --config.data.train=train gives 30 alphabets. The words after
the colon are a scenario (task or class) and methods. Measured: results/survey_omniglot, 17 methods and
fine-tuning by the framework of the survey; and with this rate 37.4 per cent with hat (--config.seeds=0,
c = 0.75).
"""

from configs import common


def get_config(arg: str = 'task') -> dict:
  return common.images(
    arg,
    capacity=300,
    name='omniglot',
    seeds=(0, 1, 2, 3, 4),
    dataset='omniglot',
    data={'train': 'small1', 'hold_out': 0.25, 'domain': 'alphabet', 'image': (28, 28, 1)},
    by='domain',
    tasks=None,
    epochs=20,
    batch=16,
    model={'name': 'cnn', 'channels': (16, 32), 'sizes': (128,)},
    optimizer={'name': 'sgd', 'lr': 0.05},
    chunk=100,
  )
