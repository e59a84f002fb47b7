"""Facts that SmolLM2-135M says by itself, rewritten: the attribute becomes another one of the same relation.

  python -m experiments.edit --config=configs/edit_known.py:memit,100 --workdir=runs/known_memit
  python -m experiments.edit --config=configs/edit_known.py --grid --workdir=runs/known

Only facts whose most probable continuation is the true one are edited (`known`; 279 of 1,208 with this model,
so there are no thousand), and every ES before is 0;
neighbours are other subjects with the same attribute. S of 10 edits (one seed): rome 100, memit,
alphaedit and grace 98.9, finetune 97.7, pmet 94.7, lora 44.2, wise 25.2, finetune_l 0; of 100, grace 93.0,
alphaedit 89.3, memit 86.9, pmet 83.7, rome 80.4, finetune 71.1, wise 50.1, lora 44.3, finetune_l 0.
Words as in configs/edit_counterfact.py.
"""

from __future__ import annotations

from configs import edit_counterfact
from configs.edit_counterfact import EDITORS, VARIANTS

CELLS = (
  *(f'{e},{n}' for n in (10, 100) for e in EDITORS),
  *(f'{e},10' for e in VARIANTS),
  *(f'{e},10,single' for e in EDITORS),
)


def get_config(arg: str = 'memit,10') -> dict:
  return {**edit_counterfact.get_config(arg, 'known'), 'known': True}
