"""Answers of zsRE written into SmolLM2-135M, in the form of MEND: questions, their rephrasings, and others.

  python -m experiments.edit --config=configs/edit_zsre.py:memit,100 --workdir=runs/zsre_memit
  python -m experiments.edit --config=configs/edit_zsre.py --grid --workdir=runs/zsre

There is no truth to compare with: what counts is the share of an answer's tokens that are the most probable
ones: memit,10 (one seed) ES 90.7 (22.3 before), PS 65.3 (16.0), NS 15.3 as before; ES of lora 100, grace
96.7, alphaedit 90.7, rome 86.7, wise 82.7, finetune 76.3, pmet 40.3, finetune_l 27.7. Words as in
configs/edit_counterfact.py.
"""

from __future__ import annotations

from configs import edit_counterfact
from configs.edit_counterfact import EDITORS, VARIANTS

CELLS = (
  *(f'{e},{n}' for n in (10, 100) for e in EDITORS),
  *(f'{e},10' for e in VARIANTS),
)


def get_config(arg: str = 'memit,10') -> dict:
  return edit_counterfact.get_config(arg, 'zsre')
