"""Rows of tables of our own: a configuration's scenario and methods, seed by seed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from experiments import build as builds
from experiments import config
from experiments.chain import chain_of
from experiments.published.table import Figure, Row
from experiments.streams import streams

SHIPPED = 'fashion_mnist_small'  # ten classes, as all datasets of these tables


def row(
  get_config: Callable[[str], dict[str, Any]],
  scenario: str,
  words: str,
  note: str,
  dataset: str = '',
  slow: bool = False,
) -> Row:
  """The row of `words`, methods of the configuration; 'rehearsal:partial' is one with that `share`.

  Args:
    get_config: of a module of configs/.
    scenario: 'task', 'domain' or 'class'.
    words: methods, with commas between.
    note: what differs from a published protocol.
    dataset: how the table calls it; '' is the configuration's name for it.
    slow: see `Row`.
  """

  @lru_cache(maxsize=8)
  def resolved(seed: int):
    names, _, share = words.partition(':')
    raw = get_config(f'{scenario},{names}')
    if share:
      raw = config.override(raw, f'{names}.share', share)
    return config.resolve({**raw, 'seeds': (seed,)})

  def stream(seed, data_dir):
    return streams(resolved(seed), data_dir)[0]

  @lru_cache(maxsize=1)
  def setup():
    return builds.prepare(resolved(0))[0]

  def build(hp, weights):
    del hp, weights
    one = setup()
    return one.build(builds.hyper(one.config, one.streams[0]), one.weights)

  def method():
    any_examples = {'dataset': SHIPPED, 'data': {**resolved(0)['data'], 'examples_per_class': 1}}
    own = {**resolved(0), **any_examples}
    one = streams(own)[0]
    return chain_of(own, one, builds.hyper(own, one))

  figures = (Figure('acc', None),)
  if words != 'joint':  # all at once: there is nothing to forget
    figures += (Figure('forgetting', None),)
  name = words.replace(',', '+').replace(':', ' ')
  table = get_config('')['name']
  return Row(
    table,
    dataset or get_config('')['dataset'],
    scenario,
    name,
    'own',
    stream,
    build,
    figures,
    note,
    slow,
    method,
  )
