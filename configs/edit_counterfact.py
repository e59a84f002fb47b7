"""Facts written into SmolLM2-135M: CounterFact, one editor at a time, by ones, tens, hundreds.

  python -m experiments.edit --config=configs/edit_counterfact.py:memit,100 --workdir=runs/memit_100
  python -m experiments.edit --config=configs/edit_counterfact.py --grid --workdir=runs/counterfact

Words: an editor (rome, memit, pmet, alphaedit, finetune, finetune_l, lora, grace, wise, or none, which only
asks), a number of edits, and how they come: all at once, or `sequential` in batches of a number that may
follow (1), or `single`, each into the first model. Layers by causal tracing (docs/editing.md).
"""

from __future__ import annotations

EDITORS = ('rome', 'memit', 'pmet', 'alphaedit', 'finetune', 'finetune_l', 'lora', 'grace', 'wise')
CELLS = (
  *(f'{e},10,single' for e in EDITORS),
  *(f'{e},10' for e in EDITORS),
  *(f'{e},100' for e in EDITORS),
  *(f'{e},100,sequential' for e in ('rome', 'memit', 'alphaedit')),
)
LAYERS = (5, 6, 7, 8, 9)


def get_config(arg: str = 'memit,10', data: str = 'counterfact') -> dict:
  words = [w for w in arg.split(',') if w]
  editor = next((w for w in words if w in (*EDITORS, 'none')), 'memit')
  numbers = [int(w) for w in words if w.isdigit()]
  edits = numbers[0] if numbers else 10
  batch = edits
  if 'sequential' in words:
    batch = numbers[1] if numbers[1:] else 1
  if 'single' in words:
    batch = 1
  own = {
    'rome': {'layer': LAYERS[2]},
    'memit': {'layers': LAYERS},
    'pmet': {'layers': LAYERS},
    'alphaedit': {'layers': LAYERS},
  }
  return {
    'name': f'edit_{data}',
    'data': data,
    'edits': edits,
    'batch': batch,
    'apart': 'single' in words,
    'editor': editor,
    **({editor: own[editor]} if editor in own else {}),
  }
