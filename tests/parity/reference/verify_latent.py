"""Second derivations for latent, cwr, renorm and remind: PyTorch autograd in float64.

Each run is made anew from its stored inputs alone, with torch's modules and optimiser, and the stored
arrays are compared to 1e-9. Memories are sets of positions in the stream: what a slot holds is computed
again from the rows. The statistics of batch renormalisation are those of torch's batch norm in NCHW.
Of the other files only the layout is shared. Run: ``python verify_latent.py``; it prints one line per
variant and ends with an AssertionError on the first mismatch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from verify import load, same

TOL = 1e-9


def equal(a, b, what: str) -> None:
  assert torch.as_tensor(a).shape == b.shape, (what, b.shape)
  same(a, b, what, TOL)


class Net(nn.Module):
  def __init__(self, z: dict) -> None:
    super().__init__()
    self.layers = nn.ModuleDict()
    for name in ('l0', 'l1', 'l2'):
      w = z[f'init/{name}/w']
      self.layers[name] = nn.Linear(*w.shape)
      self.layers[name].weight.data = w.T.clone()
      self.layers[name].bias.data = z[f'init/{name}/b'].clone()
    self.lr = float(z['lr'])
    self.thaw('l0', 'l1', 'l2')

  def thaw(self, *names: str) -> None:
    """Trains these layers and no others from now on."""
    for name, layer in self.layers.items():
      layer.requires_grad_(name in names)
    trained = [p for p in self.parameters() if p.requires_grad]
    self.optimiser = torch.optim.SGD(trained, lr=self.lr)

  def below(self, x: torch.Tensor) -> torch.Tensor:
    return self.layers['l0'](x).relu()

  def above(self, h0: torch.Tensor) -> torch.Tensor:
    return self.layers['l2'](self.layers['l1'](h0).relu())

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.above(self.below(x))

  def step(self, h0: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(self.above(h0), y)
    self.optimiser.zero_grad()
    loss.backward()
    self.optimiser.step()
    return loss.detach()

  def named(self) -> dict[str, torch.Tensor]:
    """The parameters by the names of the files, weights [in, out]."""
    out = {}
    for name, layer in self.layers.items():
      out |= {f'{name}/w': layer.weight.detach().T, f'{name}/b': layer.bias.detach()}
    return out

  def agrees(self, z: dict, key: str, at: tuple) -> None:
    for k, value in self.named().items():
      equal(value, z[f'{key}/{k}'][at], f'{key} {k} {at}')


def slots_agree(z: dict, v: str, at: tuple, held: dict[int, int]) -> list[int]:
  """Distinct filled slots, as many as there are, then -1; returns their positions in the stream."""
  slots, n = z[f'{v}/draw_slots'][at].tolist(), min(int(z['D']), len(held))
  assert len(slots) == int(z['D']) and slots[n:] == [-1] * (len(slots) - n)
  assert len(set(slots[:n])) == n and set(slots[:n]) <= set(held)
  rows = [held[s] for s in slots[:n]]
  assert z[f'{v}/draw_stream'][at].tolist() == rows + slots[n:]
  return rows


def latent() -> None:
  z = load('latent')
  x, y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
  tasks, steps, rows = z['ys'].shape
  for v in ('plain', 'few', 'short'):
    size, net = int(z[f'{v}/K']), Net(z)
    held: dict[int, int] = {}  # slot -> position
    for t in range(tasks):
      for s in range(steps):
        drawn = slots_agree(z, v, (t, s), held)
        weight = z[f'{v}/draw_weight'][t, s]
        assert weight.tolist() == [1.0] * len(drawn) + [0.0] * (len(weight) - len(drawn))
        # Padding with weight 0 and no padding are the same, and so are stored h0 and those of today.
        h0 = net.below(torch.cat([z['xs'][t, s], x[drawn]]))
        loss = net.step(h0, torch.cat([z['ys'][t, s], y[drawn]]))
        equal(loss, z[f'{v}/loss'][t, s], f'{v} loss')
        net.agrees(z, f'{v}/params', (t, s))
      if t == 0:
        net.thaw('l1', 'l2')
      orders = {k: z[f'{v}/{k}_perm'][t].tolist() for k in ('examples', 'slots')}
      assert sorted(orders['examples']) == list(range(steps * rows))
      assert sorted(orders['slots']) == list(range(size))
      h = min(size // (t + 1), steps * rows)
      assert h == int(z[f'{v}/h'][t])
      for slot in sorted(range(size), key=lambda q: (q in held, orders['slots'].index(q)))[:h]:
        held[slot] = t * steps * rows + orders['examples'].pop(0)
      there = torch.tensor([q in held for q in range(size)])
      content = torch.tensor([held.get(q, -1) for q in range(size)])
      assert torch.equal(z[f'{v}/memory_filled'][t], there.long())
      assert torch.equal(z[f'{v}/memory_stream'][t], content)
      assert torch.equal(z[f'{v}/memory_y'][t], torch.where(there, y[content], -1))
      h0 = net.below(x[content]).masked_fill(~there[:, None], 0.0)
      equal(h0, z[f'{v}/memory_h0'][t], f'{v} memory h0')
      equal(net(z['probe']), z[f'{v}/probe_logits'][t], f'{v} probe')
    print(f'latent {v} agrees')


def cwr() -> None:
  z = load('cwr')
  net, seen = Net(z), torch.zeros(0, dtype=torch.long)
  cw: dict[int, torch.Tensor] = {}
  head = net.layers['l2']
  for t in range(len(z['xs'])):
    for s in range(z['xs'].shape[1]):
      loss = net.step(net.below(z['xs'][t, s]), z['ys'][t, s])
      equal(loss, z['cwr/loss'][t, s], 'cwr loss')
      net.agrees(z, 'cwr/params', (t, s))
    now = z['ys'][t].flatten()
    columns = torch.cat([head.weight.detach(), head.bias.detach()[:, None]], 1)  # a row per class
    classes = sorted(set(now.tolist()))
    avg = sum(columns[c].sum() for c in classes) / (8 * len(classes))
    equal(avg, z['cwr/avg'][t], 'cwr avg')
    for c in classes:
      before, here = (seen == c).sum(), (now == c).sum()
      share = 1 / (1 + (before / here).sqrt())  # of the new column
      cw[c] = torch.lerp(cw.get(c, torch.zeros(8)), columns[c] - avg, share)
    seen = torch.cat([seen, now])
    equal(torch.bincount(now, minlength=4).double(), z['cwr/cur'][t], 'cwr cur')
    equal(torch.bincount(seen, minlength=4).double(), z['cwr/past'][t], 'cwr past')
    columns = torch.stack([cw.get(c, torch.zeros(8)) for c in range(4)])
    equal(columns.T, z['cwr/cw'][t], 'cwr cw')
    head.weight.data, head.bias.data = columns[:, :7].clone(), columns[:, 7].clone()
    net.agrees(z, 'cwr/after', (t,))
    equal(net(z['probe']), z['cwr/probe_logits'][t], 'cwr probe')
  print('cwr agrees')


def channels_first(x: torch.Tensor) -> torch.Tensor:
  return x.permute(0, 3, 1, 2)


def renorm() -> None:
  z = load('renorm')
  eps, m, constants = float(z['eps']), float(z['momentum']), (z['scale'], z['bias'])
  for v in ('plain', 'weighted'):
    mean, var = z['mean'].clone(), z['var'].clone()
    for call in range(len(z[f'{v}/x'])):
      x, scale, bias = (a.clone().requires_grad_() for a in (z[f'{v}/x'][call], *constants))
      counted = z[f'{v}/weight'][call] == 1
      assert v == 'weighted' or bool(counted.all())
      # Batch norm of the counted rows alone, which also moves the running statistics.
      sigma, mu = (var + eps).sqrt(), mean.clone()
      inside = channels_first(x[counted])
      normal = F.batch_norm(inside, mean, var, training=True, momentum=m, eps=eps)
      # That is an affine map of x: it is applied to the rows left out as well.
      flat = inside.transpose(0, 1).flatten(1)
      slope = (flat.var(1, unbiased=False) + eps).rsqrt()
      offset = -flat.mean(1) * slope
      same(x[counted] * slope + offset, normal.permute(0, 2, 3, 1), 'affine', TOL)
      with torch.no_grad():
        r = (1 / (slope * sigma)).clamp(1 / z['rmax'], z['rmax'])
        d = ((flat.mean(1) - mu) / sigma).clamp(-z['dmax'], z['dmax'])
      x_hat = torch.zeros_like(x).index_put((torch.where(counted)[0],), normal.permute(0, 2, 3, 1))
      x_hat = torch.where(counted[:, None, None, None], x_hat, x * slope + offset)
      y = torch.addcmul(bias, torch.addcmul(d, x_hat, r), scale)
      grads = torch.autograd.grad((y * z[f'{v}/g'][call]).sum(), (x, scale, bias))
      for k, g in zip(('x', 'scale', 'bias'), grads, strict=True):
        equal(g, z[f'{v}/grad_{k}'][call], f'{v} gradient of {k}')
      still = F.batch_norm(channels_first(z['probe']), mean, var, scale, bias, eps=eps)
      got = {'y': y, 'r': r, 'd': d, 'mean': mean, 'var': var}
      got['inference'] = still.permute(0, 2, 3, 1)
      for k, value in got.items():
        equal(value, z[f'{v}/{k}'][call], f'{v} {k}')
    print(f'renorm {v} agrees')


def closest(words: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
  distance = torch.cdist(points, words, compute_mode='donot_use_mm_for_euclid_dist')
  least = distance.min(1, keepdim=True).values
  return (distance == least).double().argmax(1)  # the first of equals


def encode(words: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
  return torch.stack([closest(w, p) for w, p in zip(words, h0.split(4, 1), strict=True)], 1)


def decode(words: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
  return torch.cat([F.embedding(c, w) for w, c in zip(words, codes.unbind(1), strict=True)], 1)


def lloyd(h0: torch.Tensor, picks: torch.Tensor, iterations: int) -> torch.Tensor:
  """[iterations, 2, 4, 4]; a mean minimises the squared distances, here by least squares."""
  books = []
  for points, start in zip(h0.split(4, 1), picks, strict=True):
    assert len(set(start.tolist())) == 4
    words, trace = points[start], []
    for _ in range(iterations):
      member = F.one_hot(closest(words, points), 4).double()
      fitted = torch.linalg.lstsq(member, points, driver='gelsd').solution
      words = torch.where(member.sum(0)[:, None] > 0, fitted, words)
      trace.append(words)
    books.append(torch.stack(trace))
  return torch.stack(books, 1)


class Held:
  """The memory: the position in the stream that every slot holds."""

  def __init__(self, z: dict, v: str) -> None:
    self.z, self.v, self.size = z, v, int(z[f'{v}/K'])
    self.x, self.y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
    self.u, self.written = z['u'].flatten().tolist(), z[f'{v}/written'].flatten().tolist()
    self.at: dict[int, int] = {}

  def write(self, n: int) -> None:
    slot = len(self.at)
    if slot == self.size:
      of: dict[int, list[int]] = {}
      for q in sorted(self.at):
        of.setdefault(int(self.y[self.at[q]]), []).append(q)
      largest = min(of, key=lambda c: (-len(of[c]), c))
      slot = of[largest][int(self.u[n] * len(of[largest]))]
    self.at[slot] = n
    assert slot == self.written[n]

  def agrees(self, name: str, at: tuple, net: Net, words: torch.Tensor) -> None:
    """Codes are made again from the rows held: l0 does not change, so they are those of any time."""
    z, v = self.z, self.v
    content = torch.tensor([self.at.get(q, -1) for q in range(self.size)])
    empty = content < 0
    assert torch.equal(z[f'{v}/{name}_stream'][at], content)
    assert torch.equal(z[f'{v}/{name}_y'][at], self.y[content].masked_fill(empty, -1))
    codes = encode(words, net.below(self.x[content])).masked_fill(empty[:, None], -1)
    assert torch.equal(z[f'{v}/{name}_codes'][at], codes)


def remind() -> None:
  z = load('remind')
  x, y = z['xs'].reshape(-1, 6), z['ys'].reshape(-1)
  tasks, steps, rows = z['ys'].shape
  iterations = int(z['iterations'])
  words = lloyd(z['quantiser/points'], z['quantiser/picks'], iterations)
  equal(words, z['quantiser/codewords'], 'quantiser codewords')
  assert torch.equal(encode(words[-1], z['quantiser/points']), z['quantiser/codes'])
  print('remind quantiser agrees')
  for v in ('full', 'room'):
    net, held, words = Net(z), Held(z, v), torch.zeros(2, 4, 4)
    for t in range(tasks):
      for s in range(steps):
        n = (t * steps + s) * rows
        drawn = slots_agree(z, v, (t, s), held.at)
        used = torch.tensor([*range(n, n + rows), *drawn])
        h0 = net.below(x[used])
        if t:
          codes = encode(words, h0)
          assert torch.equal(codes[:rows], z[f'{v}/codes'][t, s])
          h0 = decode(words, codes)
        equal(net.step(h0, y[used]), z[f'{v}/loss'][t, s], f'{v} loss')
        net.agrees(z, f'{v}/params', (t, s))
        for i in range(n, n + rows) if t else ():
          held.write(i)
        held.agrees('memory', (t, s), net, words)
      if t == 0:
        net.thaw('l1', 'l2')
        h0 = net.below(x[: steps * rows]).detach()
        equal(h0, z[f'{v}/h0'], f'{v} h0')
        words = lloyd(h0, z['picks'], iterations)[-1]
        equal(words, z[f'{v}/codewords'], f'{v} codewords')
        assert torch.equal(encode(words, h0), z[f'{v}/codes'][0].flatten(0, 1))
        for i in range(steps * rows):
          held.write(i)
        held.agrees('first', (), net, words)
      codes = encode(words, net.below(z['probe']))
      assert torch.equal(codes, z[f'{v}/probe_codes'])
      equal(net.above(decode(words, codes)), z[f'{v}/probe_logits'][t], f'{v} probe')
    print(f'remind {v} agrees')


def main() -> None:
  for check in (latent, cwr, renorm, remind):
    check()


if __name__ == '__main__':
  main()
