"""Split Fashion-MNIST, every method in the three scenarios: a table of our own, at configs/split_fashion.py.

6,000 training and 2,000 test images ship with the package; five class orders, one a seed; 500 images of
memory for those that keep some. No paper has these figures.
"""

from __future__ import annotations

from functools import lru_cache

from configs import split_fashion
from experiments import build as builds
from experiments import config
from experiments.published.table import Figure, Row
from experiments.streams import streams

EVERYWHERE = (
  'naive', 'joint', 'cumulative', 'l2', 'ewc', 'si', 'mas', 'rwalk', 'lwf', 'l2,imm', 'er', 'agem', 'gem',
  'mir', 'der', 'derpp', 'er_ace', 'gdumb', 'rehearsal', 'rehearsal:partial', 'latent', 'latent,si,cwr',
  'remind', 'dgr', 'dreamnet', 'ebll', 'mer',
)  # fmt: skip
BESIDE = {'task': ('hat', 'packnet', 'pnn'), 'domain': (), 'class': ('icarl',)}


@lru_cache(maxsize=64)
def resolved(scenario: str, words: str, seed: int):
  words, _, share = words.partition(':')  # of the memory
  raw = split_fashion.get_config(f'{scenario},{words}')
  if share:
    raw = config.override(raw, f'{words}.share', share)
  return config.resolve({**raw, 'seeds': (seed,)})


def row(scenario: str, words: str) -> Row:
  def stream(seed, data_dir):
    return streams(resolved(scenario, words, seed), data_dir)[0]

  @lru_cache(maxsize=1)
  def setup():
    return builds.prepare(resolved(scenario, words, 0))[0]

  def build(hp, weights):
    del hp, weights
    one = setup()
    return one.build(builds.hyper(one.config, one.streams[0]), one.weights)

  figures = (Figure('acc', None),)
  if words != 'joint':  # all at once: there is nothing to forget
    figures += (Figure('forgetting', None),)
  name = words.replace(',', '+').replace(':', ' ')
  note = 'not in a paper; five class orders'
  return Row(
    'split_fashion', 'fashion_mnist_small', scenario, name, 'own', stream, build, figures, note
  )


def rows() -> list[Row]:
  found = []
  for scenario in ('task', 'domain', 'class'):
    found += [row(scenario, words) for words in (*EVERYWHERE, *BESIDE[scenario])]
  return found
