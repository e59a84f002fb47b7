"""Split Fashion-MNIST, every method in the three scenarios: a table of our own, at configs/split_fashion.py.

6,000 training and 2,000 test images ship with the package; five class orders, one a seed; 500 images of
memory for those that keep some. No paper has these figures.
"""

from __future__ import annotations

from configs import split_fashion
from experiments.published.configured import row
from experiments.published.table import Row

EVERYWHERE = (
  'naive', 'joint', 'cumulative', 'l2', 'ewc', 'ewcpp', 'si', 'mas', 'rwalk', 'lwf', 'l2,imm', 'er', 'agem',
  'gem', 'mir', 'der', 'derpp', 'er_ace', 'gdumb', 'rehearsal', 'rehearsal:partial', 'latent',
  'latent,si,cwr', 'remind', 'dgr', 'dreamnet', 'ebll', 'mer',
)  # fmt: skip
BESIDE = {'task': ('hat', 'packnet', 'pnn'), 'domain': (), 'class': ('icarl',)}
NOTE = 'not in a paper; five class orders'


def rows() -> list[Row]:
  return [
    row(split_fashion.get_config, scenario, words, NOTE)
    for scenario in ('task', 'domain', 'class')
    for words in (*EVERYWHERE, *BESIDE[scenario])
  ]
