"""Split CIFAR-10 with the reduced ResNet-18, for methods with a memory, at configs/split_cifar10.py.

Five class orders, one a seed; 500 rows of memory; one pass. Where the prepared data is a part of CIFAR-10 the
figures are of that part: those in results/ are of 10,000 training and 1,000 test images ("10k/1k"), and
stand beside no published one.
"""

from __future__ import annotations

from configs import split_cifar10
from experiments.published.configured import row
from experiments.published.table import Row

METHODS = (
  'naive', 'er', 'agem', 'derpp', 'er_ace', 'rehearsal', 'latent', 'remind', 'hat', 'packnet', 'icarl',
)  # fmt: skip
ONLY = {'hat': 'task', 'packnet': 'task', 'icarl': 'class'}


def rows() -> list[Row]:
  note = 'not in a paper; 10k/1k images, one pass'
  return [
    row(split_cifar10.get_config, scenario, method, note, 'cifar10 10k/1k', slow=True)
    for scenario in ('task', 'class')
    for method in METHODS
    if ONLY.get(method, scenario) == scenario
  ]
