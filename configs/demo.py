"""Does a foundation model forget? MiniLM learns CLINC150 domain by domain, class-incremental.

  make demo                      all of it, with this file's settings: some 5 minutes on two idle cores
  python -m experiments.run --config=configs/demo.py:er --workdir=runs/er      one method

The 150 intents of 10 domains (banking, travel, ...), 15 a domain, share one output layer that grows with
the classes seen; no method is told the task at test time. 20 sentences an intent are learnt from.

Network: all-MiniLM-L6-v2 (22 million parameters), mean of the last hidden states, a linear layer that starts
from zero. `naive`, `er`, `ewc`, `lwf` and the `joint` bound fine-tune all of it but the token embeddings
(11.9 million parameters, of which 300 sentences touch a few hundred rows); `lora` adapts queries and values
of the frozen network; `ncm`, `slda` and `ranpac` learn from its features in one pass.

The recipe is the same wherever the network is trained, LoRA's rate for its own kind of parameters aside: two
passes, Adam, and a cosine down to 0 within every domain. It was chosen on a fifth of the training
sentences, held out, and never on the test sentences; see results/demo/README.md.
"""

from configs import common

MODEL = 'all-MiniLM-L6-v2'
CLOSED = ('ncm', 'slda', 'ranpac')
TRAINED = ('joint', 'ewc', 'er', 'lwf', 'naive', 'lora')
# In the order in which they are started: something to see at once, and the features that the other closed
# forms wait for; then the dearest first, so that the last ones do not leave a core idle for long.
METHODS = ('ncm', 'joint', 'slda', 'ranpac', 'ewc', 'er', 'lwf', 'naive', 'lora')
CLOSED_SEEDS = (0, 1, 2)
NAMES = {
  'joint': 'all domains at once, the bound',
  'naive': 'full fine-tuning',
  'lora': 'low-rank adapters',
  'ewc': 'elastic weight consolidation',
  'lwf': 'learning without forgetting',
  'er': 'experience replay',
  'ncm': 'nearest class mean',
  'slda': 'streaming LDA',
  'ranpac': 'random projections, ridge',
}


def get_config(arg: str = 'naive') -> dict:
  """`arg`: a name of METHODS, after 'quick,' for few sentences and one pass."""
  words = arg.split(',')
  quick = 'quick' in words
  fields, methods = common.words(','.join(w for w in words if w != 'quick'), 'class')
  closed, lora = bool({*CLOSED} & {*methods}), 'lora' in methods
  rate, head = (5e-4 if lora else 1e-4), 5e-3
  arguments = {
    # 5 sentences an intent, 70 kB in all; as many old sentences in a step as new ones.
    'er': {'capacity': 750, 'draw': 30},
    # Fisher information of the true labels, over the domain's training sentences.
    'ewc': {'coef': 1e5, 'labels': 'empirical'},
    # The old network's answers on the new sentences, over the classes that it knew.
    'lwf': {'outputs': 'seen', 'coef': 0.5},
    'lora': {'rank': 8, 'alpha': 16.0, 'targets': 'backbone/layers/(q|v)/w'},
    'ranpac': {'width': 2000},
  }
  return {
    **fields,
    'name': 'demo',
    'seeds': CLOSED_SEEDS if closed else (0,),
    'dataset': 'clinc150',
    'data': {
      # 93 % of the sentences have at most 16 tokens; the others are cut.
      'length': 16,
      'examples_per_class': 3 if quick else 20,
      'test_per_task': 15 if quick else 75,
      'test_batch': 15 if quick else 75,
      # Every seed draws its own sentences, in training and for evaluation.
      'seed': None,
    },
    # A task is a domain, in an order that the seed draws.
    'by': 'domain',
    'tasks': None,
    'order': 'seed',
    'epochs': 1 if closed or quick else 2,
    'batch': 30,
    'ends_batch': 30,
    # The mean of the hidden states as it is; MiniLM's own files scale it to length 1.
    'model': {'name': 'bert', 'pretrained': MODEL, 'init': 'zeros', 'normalise': False},
    'freeze': ('backbone/.*',) if closed or lora else ('backbone/embed/.*',),
    'cache_features': closed,
    'optimizer': {
      'name': 'adam',
      'lr': rate,
      'schedule': 'cosine',
      # As a device that comes back to learn a domain would: moments of the last one are not kept.
      'reset': not closed,
      # The new output layer learns faster than the pretrained network.
      'groups': () if closed else (('head/.*', head / rate), ('.*', 1.0)),
    },
    # Closed-form methods rule out unseen classes by themselves.
    'head': 'all' if closed else 'seen',
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
