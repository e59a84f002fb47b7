"""Facts written into SmolLM2-135M: CounterFact, one editor at a time, by ones, tens, hundreds.

  python -m experiments.edit --config=configs/edit_counterfact.py:memit,100 --workdir=runs/memit_100
  python -m experiments.edit --config=configs/edit_counterfact.py --grid --workdir=runs/counterfact

Words: an editor (rome, memit, pmet, pmet_mlp, which looks for the MLP's part alone, alphaedit, finetune,
finetune_l, lora, grace, wise, or none, which only asks), a number of edits, and how they come: all at once,
or `sequential` in batches of a number that may follow (1), or `single`, each into the first model. Layers
and the weight of what was known before were compared on 20 edits of seed 1 (docs/editing.md). What comes
out, S of three seeds of 10 edits: rome 87.2, alphaedit 84.8, memit 83.7, pmet 74.6, finetune 68.1, grace
41.1, lora 33.6, wise 31.9, finetune_l 26.5. Of 100, one seed: memit 84.5, alphaedit 83.6, rome 81.4, pmet
79.1, wise 47.2, grace 45.7, finetune 43.4, lora 42.6, finetune_l 30.8. Of 1,000: alphaedit 80.5, memit 75.9,
pmet 70.5, finetune 61.9, rome 60.0 and lora 53.3 (and the model is broken), grace 46.1, wise 35.3, finetune_l
31.0; in sequence, alphaedit,300,sequential,10 85.4, memit 81.0; alphaedit,1000,sequential,100 79.1, memit
67.3; alphaedit,2000,sequential,200 73.5, memit 62.1.
"""

from __future__ import annotations

from cl_jax.errors import UserError

EDITORS = ('rome', 'memit', 'pmet', 'alphaedit', 'finetune', 'finetune_l', 'lora', 'grace', 'wise')
VARIANTS = ('pmet_mlp',)
CELLS = (
  *(f'{e},10' for e in (*EDITORS, *VARIANTS)),
  *(f'{e},100' for e in EDITORS),
  *(f'{e},300,sequential,10' for e in ('memit', 'alphaedit')),
  'rome,100,sequential,10',
  *(f'{e},10,single' for e in EDITORS),
  *(f'{e},1000' for e in EDITORS),
  *(f'{e},1000,sequential,100' for e in ('memit', 'alphaedit', 'rome', 'grace', 'wise')),
  *(f'{e},2000,sequential,200' for e in ('memit', 'alphaedit')),
)
LAYERS = (0, 1, 2, 3, 4)
STEPS = 15
COEF = 1000.0


def get_config(arg: str = 'memit,10', data: str = 'counterfact') -> dict:
  words = [w for w in arg.split(',') if w]
  known = (*EDITORS, *VARIANTS, 'none', 'sequential', 'single')
  if odd := [w for w in words if w not in known and not w.isdigit()]:
    raise UserError(f'{odd[0]!r} is no word of this configuration: numbers, {", ".join(known)} are')
  editor = next((w for w in words if w in (*EDITORS, *VARIANTS, 'none')), 'memit')
  numbers = [int(w) for w in words if w.isdigit()]
  edits = numbers[0] if numbers else 10
  batch = edits
  if 'sequential' in words:
    batch = numbers[1] if numbers[1:] else 1
  if 'single' in words:
    batch = 1
  recipe = {'steps': STEPS}
  # PMET searches as MEMIT does: as published for GPT-J it writes less here (docs/editing.md).
  memits = {**recipe, 'rate': 0.5, 'kl': 0.0625, 'eased': 1.0}
  own = {
    'rome': {'layer': LAYERS[2], 'recipe': {**recipe, 'clamp': 4.0}},
    'memit': {'layers': LAYERS, 'coef': COEF, 'recipe': recipe},
    'pmet': {'layers': LAYERS, 'coef': COEF, 'recipe': memits},
    'pmet_mlp': {'layers': LAYERS, 'coef': COEF, 'recipe': memits, 'joint': False},
    'alphaedit': {'layers': LAYERS, 'recipe': recipe},
    'finetune': {'layers': (LAYERS[2],), 'batch': 32},
    'finetune_l': {'layers': (LAYERS[2],), 'batch': 32, 'norm': 5e-4},
    'lora': {'batch': 32, 'rate': 5e-4},
    'grace': {'layer': 22, 'capacity': max(1000, edits)},
    'wise': {'layer': 24},
  }[editor if editor != 'none' else 'memit']
  module = {'finetune_l': 'finetune', 'pmet_mlp': 'pmet'}.get(editor, editor)
  return {
    'name': f'edit_{data}',
    'data': data,
    'edits': edits,
    'batch': batch,
    'apart': 'single' in words,
    'prefixes': 2,
    'evaluate': {
      'edits': 50,
      'blocks': 8,
      **({'points': 6, 'written': 5} if 'sequential' in words else {}),
    },
    'editor': module,
    'label': editor,
    **({module: own} if editor != 'none' else {}),
  }
