"""W1 in PyTorch, tuned: the gradient written by hand, or by autograd, eager or compiled.

`hand`: no autograd, updates folded into the products (addmm_), all random numbers drawn ahead, batches
gathered into one buffer, evaluation by permuting the rows of the first weight.
`foreach`: autograd and one fused update for all parameters. `compile`: the same step under torch.compile.
"""

from __future__ import annotations

from benchmarks.workers.serve import options, serve

GIVEN = options()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(1)
DRAW, CAPACITY, RATE = 10, 100, 0.1
relu_gradient = torch.ops.aten.threshold_backward


def init(units: int, seed: int) -> list[torch.Tensor]:
  generator = torch.Generator().manual_seed(seed)
  widths = (784, units, units, 10)
  params = []
  for m, n in zip(widths[:-1], widths[1:], strict=True):
    params += [torch.randn(m, n, generator=generator) * (2 / m) ** 0.5, torch.zeros(n)]
  return params


def forward(params, x):
  w0, b0, w1, b1, w2, b2 = params
  h = torch.addmm(b0, x, w0).relu_()
  h = torch.addmm(b1, h, w1).relu_()
  return torch.addmm(b2, h, w2)


class Replay:
  """A reservoir whose random numbers are drawn ahead for all steps."""

  def __init__(self, steps: int, size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    n = torch.arange(steps * size)
    j = (torch.rand(steps * size, generator=generator, dtype=torch.float64) * (n + 1)).long()
    slots = torch.where(n < CAPACITY, n, j.clamp(max=CAPACITY))
    self.slots = slots.view(steps, size)
    stored = (torch.arange(1, steps + 1) * size).clamp(max=CAPACITY)
    score = torch.rand(steps, CAPACITY, generator=generator)
    score[torch.arange(CAPACITY) >= stored[:, None]] = -1
    self.draws = score.topk(DRAW, dim=1).indices  # distinct, uniformly from what is stored
    self.x, self.y = torch.zeros(CAPACITY + 1, 784), torch.zeros(CAPACITY + 1, dtype=torch.int64)

  def write(self, step: int, x, y) -> None:
    self.x.index_copy_(0, self.slots[step], x)
    self.y.index_copy_(0, self.slots[step], y)

  def read(self, step: int, x, y) -> None:
    torch.index_select(self.x, 0, self.draws[step], out=x)
    torch.index_select(self.y, 0, self.draws[step], out=y)


def hand(params):
  """A step by hand on a batch x, y, in place."""
  w0, b0, w1, b1, w2, b2 = params
  minus = -torch.ones(64, 1)

  def step(x, y):
    h0 = torch.addmm(b0, x, w0).relu_()
    h1 = torch.addmm(b1, h0, w1).relu_()
    d2 = torch.addmm(b2, h1, w2).softmax(1)
    d2.scatter_add_(1, y[:, None], minus[: len(y)]).mul_(1 / len(y))
    d1 = relu_gradient(d2 @ w2.T, h1, 0)
    d0 = relu_gradient(d1 @ w1.T, h0, 0)
    for w, b, h, d in ((w2, b2, h1, d2), (w1, b1, h0, d1), (w0, b0, x, d0)):
      w.addmm_(h.T, d, alpha=-RATE)
      b.sub_(d.sum(0), alpha=RATE)

  return step


def automatic(params, compiled: bool):
  for p in params:
    p.requires_grad_()

  def loss(x, y):
    w0, b0, w1, b1, w2, b2 = params
    h = F.relu(torch.addmm(b0, x, w0))
    h = F.relu(torch.addmm(b1, h, w1))
    return F.cross_entropy(torch.addmm(b2, h, w2), y)

  loss = torch.compile(loss) if compiled else loss

  def step(x, y):
    with torch.enable_grad():
      grads = torch.autograd.grad(loss(x, y), params)
    torch._foreach_add_(params, grads, alpha=-RATE)

  return step


def prepare(data: str, units: int = 256, kind: str = 'hand', times: int = 1):
  with np.load(data) as stored:
    pixels = lambda name: torch.from_numpy(stored[name].reshape(-1, 784).astype('f')) / 255  # noqa: E731
    x, raw = pixels('x'), pixels('raw')
    y, test_y, index, views = (
      torch.from_numpy(stored[name].astype('i8')) for name in ('y', 'test_y', 'index', 'views')
    )
  tasks, steps, size = index.shape
  inverse = [torch.argsort(v) for v in views]
  params = init(units, 0)
  step = hand(params) if kind == 'hand' else automatic(params, kind == 'compile')
  batch_x, batch_y = torch.empty(size + DRAW, 784), torch.empty(size + DRAW, dtype=torch.int64)

  def evaluate():
    right = []
    for t in range(tasks):
      seen = [params[0].index_select(0, inverse[t]), *params[1:]]
      right.append((forward(seen, raw).argmax(1) == test_y[t]).float().mean())
    return torch.stack(right)

  @torch.no_grad()
  def one(i):
    for p, new in zip(params, init(units, i), strict=True):
      p.copy_(new)
    replay = Replay(tasks * steps, size, i)
    R, rows = [evaluate()], size  # the first step has nothing to replay
    for t in range(tasks):
      seen = x[:, views[t]]
      for s in range(steps):
        now = t * steps + s
        torch.index_select(seen, 0, index[t, s], out=batch_x[:size])
        torch.index_select(y, 0, index[t, s], out=batch_y[:size])
        step(batch_x[:rows], batch_y[:rows])
        replay.write(now, batch_x[:size], batch_y[:size])
        replay.read(now, batch_x[size:], batch_y[size:])
        rows = size + DRAW
      R.append(evaluate())
    return float(R[-1].mean())

  def repeat(i):
    return {'accuracy': sum(one(times * i + k) for k in range(times)) / times}

  if kind == 'compile':
    repeat(0)  # compiles both batch sizes
  return repeat, {'torch': torch.__version__}


serve(lambda: prepare(**GIVEN))
