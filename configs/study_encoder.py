"""Does a sentence encoder forget, and what helps at which budget? MiniLM learns intents task by task.

  python -m experiments.study --config=configs/study_encoder.py:clinc150 --workdir=runs/clinc150 --seeds=3
  python -m experiments.study --config=configs/study_encoder.py:banking77 --workdir=runs/banking77 --seeds=3
  python -m experiments.run --config=configs/study_encoder.py:clinc150,lora,er --workdir=runs/lora_er
  python -m experiments.study --config=configs/study_encoder.py:clinc150,large --workdir=runs/clinc150_large

CLINC150: 10 domains of 15 intents, banking77: 11 groups of 7, class-incremental, 10 sentences an intent; the
order of the tasks (and the groups of banking77) is the seed's. all-MiniLM-L6-v2, mean of the last hidden
states, a linear layer that starts from zero.

The first word says what is adapted:

  closed   nothing: closed forms on the frozen features, one pass
  head     the linear layer alone, on the frozen features
  full     the network but its token embeddings; half: its upper three layers; bitfit: biases alone
  lora     low-rank updates of queries and values; adapter: bottlenecks after both blocks
  prompt   20 vectors before the sentence; prefix: 10 keys and values a layer
  peft     what the method adds itself: l2p, dualprompt, coda, sprompts, olora, sdlora, inflora, ease
  first    LoRA in the first task only, then a closed form on the adapted features (RanPAC with first-session
           adaptation; with ncm and --config.first_session.merge=True APER, which has not been run)
  slow     full with a slow network and an aligned head (SLCA)
  random   full, from random weights: the control

then a method (naive, er, ewc, lwf, derpp, agem, joint, or `local`: naive with the loss over a task's own
classes; `lwf,local` is LwF with it) and, for another rate, a number; joint takes as many steps as all tasks
together, `joint,long` ten passes, after which a linear layer gains less than half a point. `peft,l2p,vote` is
L2P as its published figures are made: one choice of prompts for a whole batch, which tells the task where a
batch is of one, so that tables have it apart.

Recipe: three passes in batches of 30, Adam that starts afresh in every task, a cosine to 0 there. `large` is
for an accelerator: all sentences at their length, batches of 128, a memory of 20 sentences an intent in the
place of 5, activations in bfloat16, of which the backward pass keeps one a layer; it has not been run. What a
cell needs is printed before a study starts.

What came out stands in docs/study.md: CLINC150 full,naive 13.9 %, head,ewc 79.3 %, closed,ncm 87.7 % of three
orders; banking77 head,naive 10.4 %, closed,ncm 79.6 %.
"""

from configs import common

MODEL = 'all-MiniLM-L6-v2'
FROZEN = ('closed', 'head', 'lora', 'adapter', 'prompt', 'prefix', 'peft', 'first')
# In the order in which they are started.
CELLS = (
  'closed,ncm', 'closed,slda', 'closed,fecam', 'closed,ranpac',
  'head,naive', 'head,local', 'head,er', 'head,ewc', 'head,lwf', 'head,derpp', 'head,joint',
  'lora,naive', 'lora,local', 'lora,er', 'lora,lwf', 'lora,ewc', 'lora,derpp', 'lora,agem', 'lora,joint',
  'peft,l2p', 'peft,dualprompt', 'peft,coda', 'peft,sprompts', 'peft,olora', 'peft,sdlora', 'peft,inflora',
  'peft,ease', 'first,ncm', 'first,ranpac', 'slow,slca', 'adapter,local', 'adapter,er', 'prompt,local',
  'prefix,local', 'bitfit,local', 'half,local', 'full,naive', 'full,local', 'full,er', 'full,lwf', 'full,ewc',
  'full,derpp', 'full,joint', 'full,naive,5e-05', 'full,naive,2e-05', 'full,er,2e-05', 'random,naive',
  'random,er', 'random,joint', 'head,naive,0.001', 'head,local,0.001', 'head,er,0.001', 'head,ewc,0.001',
  'head,lwf,0.001', 'head,derpp,0.001', 'head,joint,0.001', 'head,joint,long', 'lora,joint,long',
  'full,joint,long', 'head,lwf,local', 'lora,lwf,local', 'full,lwf,local', 'peft,l2p,vote',
)  # fmt: skip
NAMES = {
  'closed': 'closed form',
  'head': 'linear head',
  'full': 'full fine-tuning',
  'half': 'upper half',
  'bitfit': 'biases (BitFit)',
  'lora': 'LoRA',
  'adapter': 'adapters',
  'prompt': 'prompt tuning',
  'prefix': 'prefix tuning',
  'peft': 'prompts, adapters per task',
  'first': 'first session, closed form',
  'slow': 'slow network, aligned head',
  'random': 'full, random weights',
}
RATES = {
  'closed': 1e-3, 'head': 5e-3, 'full': 1e-4, 'half': 1e-4, 'bitfit': 1e-3, 'lora': 5e-4, 'adapter': 1e-3,
  'prompt': 1e-2, 'prefix': 1e-2, 'peft': 1e-2, 'first': 5e-4, 'slow': 2e-5, 'random': 5e-4,
}  # fmt: skip
# Of methods that bring their own parameters.
OWN_RATES = {'olora': 5e-4, 'sdlora': 5e-4, 'inflora': 5e-4, 'ease': 1e-3}
HEAD_RATE = 5e-3
HEADS = '(head|sprompts)/(w|b)'
SIZES = {
  'clinc150': {'length': 16, 'examples_per_class': 10, 'test_per_task': 45, 'test_batch': 45},
  'banking77': {'length': 24, 'examples_per_class': 10, 'test_per_task': 42, 'test_batch': 42},
}
LENGTHS = {
  'clinc150': 40,
  'banking77': 104,
}  # of `large`: the longest sentences have 33 and 98 tokens


def get_config(arg: str = 'clinc150,lora,naive') -> dict:
  words = [w for w in arg.split(',') if w]
  data = next((w for w in words if w in ('clinc150', 'banking77')), 'clinc150')
  large = 'large' in words
  words = [w for w in words if w not in ('clinc150', 'banking77', 'large')]
  adapt, words = (words[0], words[1:]) if words and words[0] in NAMES else ('lora', words)
  given = next((float(w) for w in words if w[0].isdigit()), None)
  local = 'local' in words
  vote = 'vote' in words
  long = 'long' in words
  words = [w for w in words if not w[0].isdigit() and w not in ('local', 'vote', 'long')]
  fields, methods = common.words(','.join(words), 'class')
  tasks = 10 if data == 'clinc150' else 11
  own = {
    'lora': ('lora',),
    'adapter': ('adapter',),
    'prompt': ('prompt_tuning',),
    'prefix': ('prefix_tuning',),
    'half': ('partial',),
    'first': ('lora', 'first_session'),
  }.get(adapt, ())
  rate = given or OWN_RATES.get(methods[0] if methods else '', RATES[adapt])
  classes = 150 if data == 'clinc150' else 77
  batch, capacity = (128, 20 * classes) if large else (30, 5 * classes)
  closed = adapt == 'closed'
  arguments = {
    # As many old sentences as new ones in a step; DER++ has two draws, half of them each.
    'er': {'capacity': capacity, 'draw': batch},
    'derpp': {'capacity': capacity, 'draw': batch // 2, 'alpha': 0.5, 'beta': 0.5},
    'agem': {'capacity': capacity, 'draw': batch},
    'ewc': {'coef': 1e5, 'labels': 'empirical'},
    'lwf': {'outputs': 'old', 'coef': 1.0} if local else {'outputs': 'seen', 'coef': 0.5},
    'lora': {'rank': 8, 'alpha': 16.0, 'targets': 'backbone/layers/(q|v)/w'},
    'adapter': {'rank': 32},
    'partial': {'lowest': 3},
    'prompt_tuning': {'length': 20, 'start': 'vocabulary'},
    # Published are 20 rows before 197 patches; before 16 tokens so many would drown them.
    'l2p': {'pool': tasks, 'top': 4, 'length': 1, **({'vote': True} if vote else {})},
    'dualprompt': {'expert': 10},
    'coda': {'pool': 10 * tasks, 'layers': (0, 1, 2, 3, 4)},
    'ncm': {'when': 'boundary' if adapt == 'first' else 'step'},
    'ranpac': {'width': 2000, 'when': 'boundary' if adapt == 'first' else 'step'},
  }
  freeze = {
    'bitfit': ('backbone/embed/.*', 'backbone/layers/.*/(w|scale)'),
    **dict.fromkeys(FROZEN, ('backbone/.*',)),
  }.get(adapt, ('backbone/embed/.*',))
  if adapt == 'random':
    freeze = ()
  scenes = {
    'clinc150': {'dataset': 'clinc150', 'by': 'domain', 'tasks': None},
    'banking77': {'dataset': 'text:banking77', 'by': 'label', 'tasks': 11},
  }
  # DER++ matches the logits of classes to come; closed forms, EASE and S-Prompts rule classes out themselves.
  matching, ruled = 'derpp' in methods, {'ease', 'sprompts'} & {*methods}
  apart = local or adapt in ('peft', 'slow')
  head = 'all' if closed or matching or ruled else 'current' if apart else 'seen'
  methods = (*own, *methods)
  return {
    **fields,
    **scenes[data],
    'name': f'study_{data}',
    'seeds': (0,),
    'data': {
      **({'length': LENGTHS[data], 'test_batch': 128} if large else SIZES[data]),
      'seed': None,
      **({'tokenizer': MODEL} if adapt == 'random' else {}),
    },
    'order': 'seed',
    # InfLoRA's first pass over a task only looks at it (and trains the head).
    'epochs': 1 if closed else 10 if long else 4 if 'inflora' in methods else 3,
    'batch': batch,
    'ends_batch': batch,
    'model': {
      'name': 'bert',
      'normalise': False,  # as the studies were run; MiniLM's own files scale features to length 1
      **({'remat': True, 'dtype': 'bfloat16'} if large else {}),
      **({'init': 'zeros', 'pretrained': MODEL} if adapt != 'random' else {'init': 0.02}),
    },
    'freeze': freeze,
    'cache_features': adapt in ('closed', 'head'),
    'optimizer': {
      'name': 'adam',
      'lr': rate,
      'schedule': 'cosine',
      'reset': not closed,
      'groups': () if adapt in ('closed', 'head') else ((HEADS, HEAD_RATE / rate), ('.*', 1.0)),
    },
    'head': head,
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
