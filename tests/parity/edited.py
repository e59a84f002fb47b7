"""The networks and requests of the references of knowledge editing (reference/editing_model.py), as ours."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from cl_jax.editing import inside
from cl_jax.editing.rows import Requests, layout
from cl_jax.masks import nest
from cl_jax.models.causal import Config
from tests.compiling import quick
from tests.parity.shared import Golden

NETS = ('llama', 'gpt2')
FAR = dict(rtol=1e-5, atol=1e-5)
FORWARD = quick(inside.forward, static_argnums=0)


class Case:
  """A network, its requests, and what the references have found."""

  def __init__(self, net: str):
    self.g, self.e = Golden(f'editing_{net}'), Golden(f'edits_{net}')
    g = self.g
    self.config = Config(40, 16, 4, 4, int(g['config/kv_heads']), 24, 32, eps=float(g['config/eps']),
                         theta=float(g['config/theta']))  # fmt: skip
    if net == 'gpt2':
      self.config = self.config._replace(norm='layer', rope=False, gated=False)
    leaves = {
      k.removeprefix('params/'): jnp.asarray(g[k]) for k in g.data.files if k.startswith('params/')
    }
    self.p = nest(leaves)
    rows = []
    for n, p in np.ndindex(g['length'].shape):
      tokens = g['tokens'][n, p][: g['length'][n, p]].tolist()
      begin = int(g['begin'][n, p])
      rows.append((tokens[:begin], int(g['subject'][n, p]), tokens[begin:]))
    flat = layout(rows)
    rewrite = type(flat)(*(a.reshape(*g['length'].shape, -1) for a in flat))
    essences = [
      (row[:n].tolist(), int(at), [])
      for row, n, at in zip(g['essence'], g['essence_length'], g['essence_subject'], strict=True)
    ]
    self.requests = Requests(rewrite, layout(essences))

  def moments(self, name: str = 'c') -> dict[int, np.ndarray]:
    return dict(enumerate(self.e[name]))

  def answers(self, backbone) -> np.ndarray:
    """log p [N, V] of what follows the plain prompts."""
    plain = type(self.requests.rewrite)(*(a[:, 0] for a in self.requests.rewrite))
    return np.asarray(FORWARD(self.config, backbone, plain)[:, 0])


def close(ours, theirs, **kw):
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, **(FAR | kw))


def log_softmax(a):
  return (
    a
    - np.log(np.exp(a - a.max(-1, keepdims=True)).sum(-1, keepdims=True))
    - a.max(-1, keepdims=True)
  )
