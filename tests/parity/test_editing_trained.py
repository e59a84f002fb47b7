"""FT, LoRA, GRACE and WISE against float64 (see tests/parity/reference/edit_trained.py).

Activations of the model are f32 whatever the weights are, and Adam divides by small gradients: hence 1e-5 for
what is said, 1e-4 of the largest entry for what was trained.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.editing import finetune, grace, inside, lora, wise, write
from cl_jax.editing.rows import Requests, Rows, layout
from tests.compiling import quick
from tests.parity.edited import close, log_softmax
from tests.parity.shared import Golden

pytestmark = pytest.mark.usefixtures('quickly', 'x64')

TRAINED: dict[str, Any] = dict(atol=1e-4)


@pytest.fixture
def t(case):
  return Golden(f'trained_{"gpt2" if case.config.norm == "layer" else "llama"}')


class Recorded:
  """`Rounds` that keep the carry after each round."""

  def __init__(self) -> None:
    self.carries: list[Any] = []

  def __call__(self, name, n, carry, step):
    for i in range(n):
      carry = step(i, carry)
      self.carries.append(carry)
    return carry


def contexts(t: Golden, prefix: str) -> Rows:
  """Rows [n, P, ...] cut before the last token of their prompts, of tokens [n, W] or [n, P, W]."""
  length, begin = t[f'{prefix}/length'], t[f'{prefix}/begin']
  tokens = t[f'{prefix}/tokens'].reshape(*length.shape, -1)
  found = []
  for at in np.ndindex(length.shape):
    row, b = tokens[at][: length[at]].tolist(), int(begin[at])
    found.append((row[:b], b - 1, row[b:]))
  return Rows(*(jnp.asarray(a).reshape(len(length), -1, a.shape[-1]) for a in layout(found)))


def requests(rewrite: Rows) -> Requests:
  return Requests(rewrite, layout([([1, 2], 1, [])] * len(rewrite.head)))


def prompts(rows: Rows) -> Rows:
  """Without the targets; what follows is asked for."""
  first = jnp.zeros_like(rows.before[:, :1])
  return rows._replace(tail=rows.tail[:, :1], before=first, target=first)


@partial(quick, static_argnums=(0, 1))
def said(config, tap, p, state, rows: Rows):
  """log p [B, M, V] in a whole pass through the tap; the tail's first column is the prompt's last token."""
  return inside.forward(config, p, rows, tap(state, jnp.full(len(rows.head), rows.head.shape[-1])))


@pytest.mark.parametrize('name', ['ft', 'ft_l', 'ft_stop'])
def test_finetune(case, t, name):
  """Every pass: steps in groups, the bound, groups that rest below `stop`, and the end of the whole."""
  get = lambda key: t[f'{name}/{key}']  # noqa: E731
  norm = float(get('norm'))
  passes = Recorded()
  editor = finetune.finetune(
    case.config, get('layers').tolist(), int(get('passes')), float(get('rate')),
    norm if norm < 1e30 else None, int(get('batch')), float(get('stop')), passes,
  )  # fmt: skip
  writes, _, report = editor.edit(case.p, (), case.requests, jax.random.key(0))
  ran, lost = int(get('ran')), get('losses') @ np.array([2, 1]) / 3
  assert len(passes.carries) == len(get('losses'))
  for i, (terms, _, loss) in enumerate(passes.carries):
    close(terms[inside.KEY][0], get('terms')[min(i, ran - 1)], **TRAINED)
    np.testing.assert_allclose(loss, lost[min(i, ran - 1)], rtol=1e-4)
  assert (ran < len(lost)) == (name == 'ft_stop')
  close(report['log_p'], get('log_p'))
  close(case.answers(write.apply(case.p, writes)), log_softmax(get('answers')))


@pytest.mark.parametrize('case', ['llama'], indirect=True)
def test_lora(case, t, monkeypatch):
  get = lambda key: t[f'lora/{key}']  # noqa: E731
  drawn = iter([get('a/q'), get('a/v')])
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape, *_: jnp.asarray(next(drawn)))
  editor = lora.lora_edit(
    case.config, rank=int(get('rank')), alpha=float(get('alpha')), steps=int(get('passes')),
    rate=float(get('rate')), batch=int(get('batch')), stop=float(get('stop')),
  )  # fmt: skip
  writes, _, report = editor.edit(case.p, (), case.requests, jax.random.key(0))
  scale = float(get('alpha')) / int(get('rank'))
  for path in ('q', 'v'):
    ours = [w for w in writes if w.path == f'layers/{path}/w']
    close(np.stack([w.left for w in ours]), get(f'{path}/a'), **TRAINED)
    close(np.stack([w.right for w in ours]) / scale, get(f'{path}/b'), **TRAINED)
  close(report['log_p'], get('log_p'))
  close(case.answers(write.apply(case.p, writes)), log_softmax(get('answers')))


@pytest.mark.parametrize('case', ['llama'], indirect=True)
def test_grace(case, t):
  """Two batches: new entries, the same prompt again, grown and split radii, and no room."""
  get = lambda key: t[f'grace/{key}']  # noqa: E731
  editor = grace.grace(
    case.config, int(get('layer')), int(get('capacity')), float(get('eps')), int(get('steps')),
    float(get('rate')), warm=True, width=2,
  )  # fmt: skip
  state = editor.init(case.p)
  assert set(get('1/case').tolist()) == {0, 1, 2, 3, 4}
  for b in '01':
    some = requests(contexts(t, f'grace/{b}'))
    _, state, report = editor.edit(case.p, state, some, jax.random.key(0))
    count = int(get(f'{b}/count'))
    assert int(state['count']) == count
    for name in ('keys', 'values', 'radii'):
      close(state[name][:count], get(f'{b}/{name}')[:count], **TRAINED)
    np.testing.assert_array_equal(state['labels'][:count], get(f'{b}/labels')[:count])
    np.testing.assert_array_equal(report['entry'], get(f'{b}/entry'))
    close(report['log_p'], get(f'{b}/log_p'))
    # Looked up in a whole pass, through the tap.
    rows = Rows(*(a[:, 0] for a in some.rewrite))
    log_p = said(case.config, editor.tap, case.p, state, rows)
    close(inside.mean_log_p(log_p, rows.target), get(f'{b}/log_p'))


@pytest.mark.parametrize('case', ['gpt2'], indirect=True)
def test_wise(case, t, monkeypatch):
  """Two batches of two shards and one: descent on hinges and masks, merging, the threshold, routing."""
  get = lambda key: t[f'wise/{key}']  # noqa: E731
  margins = tuple(float(get(name)) for name in ('alpha', 'beta', 'gamma'))
  training = wise.Training(
    int(get('steps')), float(get('rate')), margins, float(get('bound')),
    density=float(get('density')), reach=float(get('reach')),
  )  # fmt: skip
  away = [
    (row[:n].tolist(), int(n) - 1, [])
    for row, n in zip(get('unrelated'), get('unrelated_length'), strict=True)
  ]
  state = None
  merged = []
  real = wise.ties
  monkeypatch.setattr(wise, 'ties', lambda terms, *rest: merged.append(terms) or real(terms, *rest))
  for b, shards in (('0', 2), ('1', 1)):
    masks, others = jnp.asarray(get(f'{b}/masks')), get(f'{b}/others')
    size = -(-len(others) // shards)
    others = jnp.asarray(np.resize(others, shards * size).reshape(shards, size))
    monkeypatch.setattr(wise, 'draw', lambda *_, found=(masks, others): found)
    editor = wise.wise(case.config, int(get('layer')), layout(away), shards, training)
    state = editor.init(case.p) if state is None else state
    some = requests(contexts(t, f'wise/{b}'))
    _, state, report = editor.edit(case.p, state, some, jax.random.key(0))
    close(merged[-1][:-1], get(f'{b}/shards'), **TRAINED)
    close(state['side'], get(f'{b}/side'), **TRAINED)
    np.testing.assert_allclose(state['epsilon'], get(f'{b}/epsilon'), rtol=1e-5)
    for name in ('log_p', 'loss', 'distance'):
      close(report[name], get(f'{b}/{name}'))
  asked = {'plain': Rows(*(a[:, 0] for a in contexts(t, 'wise/0'))), 'other': layout(away)}
  for name, rows in asked.items():
    log_p = said(case.config, editor.tap, case.p, state, prompts(rows))
    close(log_p[:, 0], log_softmax(get(f'{name}/answers')))
