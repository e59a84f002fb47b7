"""Spoken digits on a microcontroller: new words, or new speakers, learnt clip by clip in 256 KB of RAM.

  python -m experiments.run --config=configs/spoken_digits.py:class,er --workdir=runs/spoken_digits/class-er
  python -m experiments.device --config=configs/spoken_digits.py:class,er --whole --out=runs/device/class

2,700 training and 300 test clips of six speakers (Free Spoken Digit Dataset, `CL_JAX_DATA`/audio), each as 10
by 16 bytes of log-mel energies, computed before they reach the learner. `class` brings the ten words in five
tasks of two, drawn by the seed; `domain` brings the speakers one after the other, in an order that the seed
draws. Every clip comes once, two at a time, and nobody tells which task it belongs to.

`er` learns an MLP 160-64-10 with 750 clips in memory, 30 of them rehearsed with every two new ones: with
weights, gradients, activations, stack and the code that saves, as many as fit. Of words the last 75 each, of
speakers a sample of all. `joint` is the bound: the same
network, all clips at once, 20 times. `ncm` and `slda` keep no clips: a mean a word, and for `slda` one
covariance, above 128 random units that are constants in flash. Accuracies and bytes: docs/edge.md.
"""

from configs import common

CELLS = ('class,er', 'class,slda', 'class,ncm', 'class,naive', 'class,joint')
CELLS += ('domain,er', 'domain,slda', 'domain,naive', 'domain,joint')
CLOSED = ('ncm', 'slda')


def get_config(arg: str = 'class,er') -> dict:
  """`arg`: a scenario and methods, as in CELLS."""
  fields, methods = common.words(arg, 'class')
  base = fields['base'] or fields['scenario']
  closed, joint = bool({*CLOSED} & {*methods}), fields['scenario'] == 'joint'
  # Each the best on held-out training clips.
  rate = 0.1 if joint else 0.01 if not methods else 0.2 if closed or base == 'domain' else 0.15
  slda = 'slda' in methods
  # A ring keeps words apart, and would keep the last speaker's clips alone.
  writer = 'reservoir' if base == 'domain' else 'ring'
  replay = {'capacity': 750, 'draw': 30, 'writer': writer}
  arguments = {'er': replay, 'slda': {'shrinkage': 0.01}}
  return {
    **fields,
    'name': 'spoken_digits',
    'seeds': (0, 1, 2),
    'dataset': 'spoken_digit',
    'data': {'test_batch': 60},
    'told': (),
    'by': 'domain' if base == 'domain' else 'label',
    'tasks': None if base == 'domain' else 5,
    'order': 'seed',
    'epochs': 20 if joint else 1,
    'batch': 8 if joint else 2,
    # Nothing above the input is trained where a closed form learns from it.
    'model': {
      'name': 'mlp',
      'sizes': (128,) if slda else () if closed else (64,),
      'mean': (0.5,),
      'std': (0.25,),
    },
    'freeze': ('.*',) if closed else (),
    'optimizer': {'name': 'sgd', 'lr': rate},
    'head': 'all' if base == 'domain' or closed else 'seen',
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
