"""Does a language model forget? SmolLM2-135M reads Shakespeare, medical abstracts and French law in turn.

  python -m experiments.study --config=configs/study_lm.py --workdir=runs/study_lm --data_dir=DATA
  python -m experiments.run --config=configs/study_lm.py:lora,er --workdir=runs/lm/lora_er --data_dir=DATA
  python -m experiments.study --config=configs/study_lm.py:large --workdir=runs/study_lm_large --data_dir=DATA

R holds the mean log-likelihood of a token in nats on the test text of every domain after every stage
(perplexity is e to the minus that). General ability is what happens to text that is never learnt from:
`HELD_OUT`. The order of the domains is the seed's. The small setting (short blocks, 100 steps a stage) is for
two cores; `large` is 1,000 steps of 32 x 512 tokens for an accelerator. What a cell needs is printed before a
study starts, and by `--plan` alone.

What is adapted is the first word:

  full    all weights but the token embeddings (which give the logits too)
  half    the upper half of the layers
  lora    low-rank updates of queries and values, rank 8
  stages  the same, new in every stage, above the earlier ones merged (olora without its penalty)
  bitfit  the scales of the norms (Llama has no biases)
  prompt  20 vectors before the text
  random  full, from random weights in the place of the pretrained ones: the control

then a method: naive, er, ewc, lwf, agem, joint. Steps and rate are the same within an adaptation. What came
out stands in docs/study.md; in nats a token: lora,naive -4.456, lora,er -3.972, full,naive -4.086, full,er
-3.792.
"""

from configs import common

MODEL = 'SmolLM2-135M-Instruct'
DOMAINS = ('shakespeare', 'medical', 'french_law')
HELD_OUT = ('wiki', 'math')
# In the order in which they are started.
CELLS = (
  'lora,naive', 'lora,er', 'full,naive', 'full,er', 'lora,lwf', 'lora,ewc', 'prompt,naive', 'bitfit,naive',
  'half,naive', 'full,ewc', 'full,lwf', 'lora,joint', 'full,joint', 'random,naive', 'random,er',
  'stages,naive',
)  # fmt: skip
NAMES = {
  'full': 'full fine-tuning',
  'half': 'upper half of the layers',
  'lora': 'LoRA',
  'stages': 'LoRA per stage, merged',
  'bitfit': 'norm scales',
  'prompt': 'prompt tuning',
  'random': 'full, from random weights',
}
RATES = {
  'full': 5e-5, 'half': 1e-4, 'lora': 1e-3, 'stages': 1e-3, 'bitfit': 3e-3, 'prompt': 0.03, 'random': 1e-3,
}  # fmt: skip
EMBEDDINGS = 'backbone/embed/.*'


def get_config(arg: str = 'lora,naive') -> dict:
  words = [w for w in arg.split(',') if w]
  large = 'large' in words
  words = [w for w in words if w != 'large']
  adapt, words = (words[0], words[1:]) if words and words[0] in NAMES else ('lora', words)
  fields, methods = common.words(','.join(words), 'domain')
  own = {
    'lora': ('lora',),
    'stages': ('olora',),
    'prompt': ('prompt_tuning',),
    'half': ('partial',),
  }.get(adapt, ())
  length, batch, steps = (512, 32, 1000) if large else (32, 4, 100)
  arguments = {
    'lora': {'rank': 8, 'alpha': 16.0, 'targets': 'backbone/layers/(q|v)/w'},
    'olora': {'rank': 8, 'alpha': 16.0, 'coef': 0.0, 'targets': 'backbone/layers/(q|v)/w'},
    'prompt_tuning': {'length': 20, 'start': 'vocabulary'},
    'partial': {'lowest': 15},
    # A fifth as many old blocks as new ones would fit the memory of a phone; here half.
    'er': {'capacity': 200 if not large else 2000, 'draw': batch // 2, 'classes': 1},
    'agem': {'capacity': 200 if not large else 2000, 'draw': batch, 'classes': 1},
    'ewc': {'coef': 1e3, 'labels': 'empirical'},
    'lwf': {'coef': 1.0, 'temperature': 1.0},
  }
  freeze = {
    'full': (EMBEDDINGS,),
    'random': (),  # the embeddings are drawn as well, and give the logits
    'half': (EMBEDDINGS,),
    'lora': ('backbone/.*',),
    'stages': ('backbone/.*',),
    'prompt': ('backbone/.*',),
    'bitfit': (EMBEDDINGS, 'backbone/layers/.*/w'),
  }[adapt]
  methods = (*own, *methods)
  return {
    **fields,
    'name': 'study_lm',
    'seeds': (0,),
    'dataset': 'corpora:' + '+'.join(DOMAINS),
    'data': {
      'length': length,
      'test_per_task': 256 if large else 24,
      'test_batch': 8,
      **({'tokenizer': MODEL} if adapt == 'random' else {}),
    },
    'by': 'domain',
    'tasks': None,
    'order': 'seed',
    'iterations': steps,
    'batch': batch,
    'ends_batch': batch,
    'model': {
      'name': 'decoder',
      'output': 'tokens',
      **({'init': 0.02} if adapt == 'random' else {'pretrained': MODEL}),
      **({'remat': True, 'dtype': 'bfloat16'} if large else {}),
    },
    'freeze': freeze,
    'optimizer': {'name': 'adam', 'lr': RATES[adapt], 'schedule': 'cosine', 'reset': True},
    'head': 'all',
    'methods': methods,
    'chunk': 10,
    **{m: arguments[m] for m in methods if m in arguments},
  }
