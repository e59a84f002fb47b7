"""Facts that SmolLM2-135M says by itself, rewritten: the attribute becomes another one of the same relation.

  python -m experiments.edit --config=configs/edit_known.py:memit,100 --workdir=runs/known_memit
  python -m experiments.edit --config=configs/edit_known.py --grid --workdir=runs/known

Only facts whose most probable continuation is the true one are edited (`known`), so every ES before is 0;
neighbours are other subjects with the same attribute. memit,10 and alphaedit,10 (one
seed): ES 100, NS 97.8. Words as in configs/edit_counterfact.py.
"""

from __future__ import annotations

from configs import edit_counterfact
from configs.edit_counterfact import EDITORS

CELLS = tuple(f'{e},{n}' for n in (10, 100) for e in EDITORS)


def get_config(arg: str = 'memit,10') -> dict:
  return {**edit_counterfact.get_config(arg, 'known'), 'known': True}
