"""Edits among stages of learning: facts written into SmolLM2-135M, and domains that it reads before or after.

  python -m experiments.edit_stages --config=configs/edit_stages.py --workdir=runs/edit_stages
  python -m experiments.edit_stages --config=configs/edit_stages.py:alphaedit,10 --only='edit-*' --workdir=DIR

A chain is words joined by '-', from left to right: `edit` writes the facts, `lora`, `full`, `half` and
`bitfit` read every domain of `learn.domains`, a stage each, in the way of configs/study_lm.py (`naive`, its
rates; low-rank terms are merged into the weights at the end of a stage). Words after the colon are those of
configs/edit_counterfact.py. Steps are few, for one core; `full` needs 7 GB of memory.
"""

from __future__ import annotations

from configs import edit_counterfact
from configs.study_lm import DOMAINS, HELD_OUT

CHAINS = ('edit-lora', 'lora-edit', 'edit-full', 'full-edit')


def get_config(arg: str = 'memit,10') -> dict:
  base = edit_counterfact.get_config(arg)
  return {
    **base,
    'name': 'edit_stages',
    'chains': CHAINS,
    'learn': {'domains': DOMAINS, 'steps': 30, 'batch': 4, 'length': 32},
    'evaluate': {**base['evaluate'], 'texts': (*HELD_OUT, *DOMAINS), 'blocks': 4, 'written': 0},
  }
