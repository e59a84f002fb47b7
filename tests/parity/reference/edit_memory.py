"""GRACE and WISE: a codebook and a side memory beside a network (shared; see `edit_trained.py`).

log p of a row is the mean over its target tokens of log p(token | everything before).

grace  Hartvigsen et al. 2023, Thartvigsen/GRACE. The query is the stream between attention and
       feedforward of the layer at the prompt's LAST token; a value replaces the stream behind the
       layer, there alone. The label is the first target token. On the undisturbed network, one
       request after the other: the nearest key at Euclidean distance D (infinite without keys), its
       radius R. D > eps + R: a new entry with radius eps. Else, same label: R <- max(R, D). Else a
       new entry with radius D / 2, and R <- D / 2 - 1e-5. If a new entry finds no room, nothing
       changes. Then `steps` steps of a fresh Adam on -log p by the entry's value, from what the
       layer hands on there or from the value so far. (The code compares the labels' means.)
       After a batch its requests are looked up: D <= R gives the nearest key's value, else none.
wise   Wang et al. 2024, zjunlp/EasyEdit. Side memory S [ffn,d] beside down/w of the layer;
       distance(row) is the mean over the tokens of its prompt, without the target, of |a S|, a what
       down reads; slope 0 where a norm is 0. Loss of a request:
         mean over its 4 contexts c of -log p with down/w + S at ALL tokens + mean over c of
         [max(0, far - alpha) + max(0, beta - near) + max(0, gamma - (near - far))],
       near the distance of c, far that of its unrelated prompt. `steps` times: S <- S - rate * mask
       * gradient, then its entries to [-bound, bound]. Shards take ceil(n / shards) consecutive
       requests each, one after the other, from S = 0, with their own mask. TIES then merges the
       shards, of weight (1 - keep) / shards, and the earlier memory, of weight keep: of each the
       int(density * size) largest magnitudes stay, and what equals the last of them, the rest is 0;
       sign 1 where the weighted sum is >= 0, else -1; the weighted mean of the values of that sign,
       0 without one. epsilon <- min(epsilon, distances of the batch), infinite at first. A row is
       answered with down/w + S at all tokens if distance(row) > reach * epsilon. (The code: means
       over the positive hinge terms, distances behind an activation and over targets too, weight
       decay 1e-5; what equals the last of the largest falls to topk's order.)
"""

from __future__ import annotations

from typing import NamedTuple

import editing_model as model
import numpy as np
import problem as pb
import torch
from editing import padded
from editing_model import FFN, VOCABULARY, D, Net, Request, Tensor

Row = tuple[list[int], int]  # context and target; index of the first target token

LAYER = 2
CAPACITY, GRACE_RATE, GRACE_STEPS, EPS = 5, 0.2, 12, {'gpt2': 2.5, 'llama': 4.0}
ADDED, SAME, GROWN, SPLIT, REFUSED = range(5)
# Batch 1 of grace, drawn until the distances were such that every case occurs. In order: request 0;
# its prompt and request 2's, each with another token and the same label; request 1's with another
# first token and label; one nearer to the third row than that row's key; two that find no room.
PROMPTS: dict[str, tuple[Row, ...]] = {
  'gpt2': (
    ([1, 29, 38, 28, 18, 3], 5),
    ([1, 29, 9, 28, 18, 3, 39], 5),
    ([26, 33, 17, 2, 26], 3),
    ([16, 35, 29, 14, 38, 16], 4),
    ([26, 10, 17, 20], 3),
    ([21, 23, 4, 36, 20, 30], 4),
    ([1, 29, 11, 28, 18, 23], 5),
  ),
  'llama': (
    ([2, 3, 13, 31, 29, 4], 5),
    ([2, 5, 13, 31, 29, 4, 9], 5),
    ([26, 26, 21, 9, 20], 3),
    ([0, 29, 26, 20, 0, 31], 4),
    ([26, 18, 21, 27], 3),
    ([29, 31, 20, 23, 6, 7], 4),
    ([2, 21, 13, 31, 29, 19], 5),
  ),
}
STEPS, SLOPE, BOUND, MARGINS = 6, 0.1, 0.1, {'alpha': 0.3, 'beta': 0.6, 'gamma': 0.3}
DENSITY, KEEP, REACH = 0.53, 0.6, 0.88


def rows(request: Request) -> list[Row]:
  return list(zip(request.sequences, request.begin, strict=True))


def described(batch: list[Row]) -> dict:
  tokens, begin = zip(*batch, strict=True)
  length = [len(row) for row in tokens]
  return {'tokens': padded(tokens, max(length)), 'length': length, 'begin': begin}


def log_p(net: Net, row: Row, tap: model.Tap = model.keep) -> Tensor:
  tokens, begin = row
  logp = model.forward(net, tokens[:-1], tap).log_softmax(-1)
  return torch.stack([logp[i - 1, tokens[i]] for i in range(begin, len(tokens))]).mean()


def adam(tensors: list[Tensor], rate: float) -> torch.optim.Adam:
  return torch.optim.Adam(tensors, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def added(net: Net, layers: tuple[int, ...], terms: Tensor) -> Net:
  down = net.params['layers/down/w'].index_add(0, torch.tensor(layers), terms)
  return net._replace(params=net.params | {'layers/down/w': down})


class Entry(NamedTuple):
  keys: Tensor
  values: Tensor
  radii: float
  labels: int


def passed(net: Net, row: Row) -> tuple[Tensor, Tensor]:
  """The query, and what the layer hands on there."""
  found = model.states(net, row[0][: row[1]])
  return (found['block', LAYER - 1] + found['attention', LAYER])[-1], found['block', LAYER][-1]


def replaced(net: Net, row: Row, value: Tensor) -> Tensor:
  """log p with the value in place."""
  at = row[1] - 1

  def tap(site: str, layer: int, x: Tensor) -> Tensor:
    here = (site, layer) == ('block', LAYER)
    return torch.cat([x[:at], value[None], x[at + 1 :]]) if here else x

  return log_p(net, row, tap)


def trained(net: Net, row: Row, start: Tensor) -> Tensor:
  value = start.clone().requires_grad_()
  optimiser = adam([value], GRACE_RATE)
  for _ in range(GRACE_STEPS):
    optimiser.zero_grad()
    (-replaced(net, row, value)).backward()
    optimiser.step()
  return value.detach()


def nearest(book: list[Entry], query: Tensor) -> tuple[float, int]:
  return min(((e.keys - query).norm().item(), i) for i, e in enumerate(book))


def grace_batch(net: Net, book: list[Entry], batch: tuple[Row, ...]) -> dict:
  """Changes `book`."""
  out: dict = {k: [] for k in ('entry', 'case', 'arrival', 'found', 'inside', 'log_p')}
  eps = EPS[net.name]
  for row in batch:
    query, warm = passed(net, row)
    entry, case = Entry(query, warm, eps, row[0][row[1]]), ADDED
    far, i = nearest(book, query) if book else (-1.0, 0)
    if book:
      old, radius = book[i], book[i].radii
      assert min(abs(far - eps - radius), abs(far - radius)) > 1e-3
      if far <= eps + radius:
        case = SPLIT if entry.labels != old.labels else GROWN if far > radius else SAME
    if case in (ADDED, SPLIT) and len(book) == CAPACITY:
      case, i = REFUSED, -1
    elif case in (ADDED, SPLIT):
      if case == SPLIT:
        entry, book[i] = entry._replace(radii=far / 2), old._replace(radii=far / 2 - 1e-5)
      i = len(book)
      book.append(entry)
    else:
      book[i] = old._replace(radii=max(radius, far))
    if case != REFUSED:
      book[i] = book[i]._replace(values=trained(net, row, book[i].values))
    for name, value in (('entry', i), ('case', case), ('arrival', far)):
      out[name].append(value)
  for row in batch:
    far, i = nearest(book, passed(net, row)[0])
    inside = far <= book[i].radii
    assert abs(far - book[i].radii) > 1e-3
    value = replaced(net, row, book[i].values) if inside else log_p(net, row)
    for name, x in (('found', far), ('inside', int(inside)), ('log_p', value.item())):
      out[name].append(x)
  for name in Entry._fields:
    out[name] = padded([np.stack([np.asarray(getattr(e, name)) for e in book])], CAPACITY)[0]
  return out | described(batch) | {'count': len(book)}


def grace(net: Net, asked: list[Request]) -> dict:
  out = {'layer': LAYER, 'eps': EPS[net.name], 'rate': GRACE_RATE, 'steps': GRACE_STEPS}
  out, book = out | {'capacity': CAPACITY}, []
  first = tuple(rows(r)[0] for r in asked)
  for b, batch in enumerate((first, PROMPTS[net.name])):
    out |= pb.prefixed(str(b), grace_batch(net, book, batch))
  value = torch.tensor(out['0/values'][0], requires_grad=True)
  return out | {'grad': torch.autograd.grad(-replaced(net, first[0], value), value)[0]}


def distance(net: Net, row: Row, side: Tensor) -> Tensor:
  return (model.states(net, row[0][: row[1]])['key', LAYER] @ side).norm(dim=-1).mean()


def score(net: Net, contexts: list[Row], other: Row, side: Tensor) -> tuple[Tensor, ...]:
  """Loss, log p [P], near [P], and the three terms [3,P] before they are cut at 0."""
  logp = torch.stack([log_p(added(net, (LAYER,), side[None]), row) for row in contexts])
  near = torch.stack([distance(net, row, side) for row in contexts])
  far = distance(net, other, side)
  alpha, beta, gamma = MARGINS.values()
  hinges = torch.stack([(far - alpha).expand(len(near)), beta - near, gamma - (near - far)])
  return -logp.mean() + hinges.clamp_min(0).sum(0).mean(), logp, near, hinges


def slope(net: Net, contexts: list[Row], other: Row, side: Tensor) -> Tensor:
  x = side.clone().requires_grad_()
  return torch.autograd.grad(score(net, contexts, other, x)[0], x)[0]


def ties(tensors: Tensor, weights: Tensor) -> Tensor:
  kept, k = [], max(1, int(DENSITY * tensors[0].numel()))
  for x in tensors:
    sizes = x.abs().flatten().sort(descending=True).values
    assert sizes[k - 1] == 0 or sizes[k - 1] - sizes[k] > 1e-4 * sizes[0]
    kept.append(torch.where(x.abs() >= sizes[k - 1], x, 0))
  left, weights = torch.stack(kept), weights[:, None, None]
  total = (weights * left).sum(0)
  split = (left > 0).any(0) & (left < 0).any(0)
  assert split.any() and total[split].abs().min() > 1e-4 * left.max()
  counted = weights * (left.sign() == torch.where(total >= 0, 1, -1))
  return torch.nan_to_num((counted * left).sum(0) / counted.sum(0))  # 0 / 0 where there is none


def wise_batch(
  net: Net, batch: list[list[Row]], others: list[Row], masks: Tensor, side: Tensor
) -> tuple[dict, list[Tensor]]:
  """The terms at every step too."""
  out: dict = {k: [] for k in ('log_p', 'loss', 'distance')}
  shards, each, hinges = torch.zeros_like(masks), -(-len(batch) // len(masks)), []
  for n, (contexts, other) in enumerate(zip(batch, others, strict=True)):
    s = n // each
    for _ in range(STEPS):
      hinges.append(score(net, contexts, other, shards[s])[-1])
      step = SLOPE * masks[s] * slope(net, contexts, other, shards[s])
      shards[s] = (shards[s] - step).clamp(-BOUND, BOUND)
    loss, logp, near, last = score(net, contexts, other, shards[s])
    hinges.append(last)
    for name, value in (('log_p', logp.mean()), ('loss', loss), ('distance', near.min())):
      out[name].append(value.item())
  weights = torch.tensor([(1 - KEEP) / len(shards)] * len(shards) + [KEEP])
  merged = ties(torch.cat([shards, side[None]]), weights)
  return out | {'shards': shards, 'masks': masks, 'side': merged}, hinges


def wise(net: Net, asked: list[Request], rng: np.random.Generator, shift: int) -> dict:
  draw = lambda n: rng.integers(0, VOCABULARY, size=n).tolist()  # noqa: E731
  other = [(draw(n), n) for n in (4, 3, 5)]
  unrelated = described(other)
  out = {'unrelated': unrelated['tokens'], 'unrelated_length': unrelated['length']}
  out |= MARGINS | {'layer': LAYER, 'steps': STEPS, 'rate': SLOPE, 'bound': BOUND}
  out |= {'density': DENSITY, 'keep': KEEP, 'reach': REACH}
  again = [(t[:-1] + [(t[-1] + shift) % VOCABULARY], begin) for t, begin in rows(asked[0])]
  side, epsilon, hinges = torch.zeros(FFN, D), np.inf, []
  batches = (([rows(r) for r in asked], (0, 1, 2), 2), ([again], (1,), 1))
  for b, (batch, used, shards) in enumerate(batches):
    masks = torch.tensor(rng.integers(0, 2, size=(shards, FFN, D)), dtype=torch.float64)
    found, terms = wise_batch(net, batch, [other[i] for i in used], masks, side)
    side, epsilon, hinges = found['side'], min(epsilon, *found['distance']), hinges + terms
    asks = [described(contexts) for contexts in batch]
    found |= {'tokens': np.stack([padded(x['tokens'], 9) for x in asks])}
    found |= {k: [x[k] for x in asks] for k in ('length', 'begin')}
    out |= pb.prefixed(str(b), found | {'others': used, 'epsilon': epsilon})
  edited, limit = added(net, (LAYER,), side[None]), REACH * epsilon
  for name, prompts in (('plain', [rows(r)[0] for r in asked]), ('other', other)):
    far = np.array([distance(net, row, side).item() for row in prompts])
    pairs = [[model.forward(n, t[:begin])[-1] for n in (net, edited)] for t, begin in prompts]
    routed = (far > limit).astype(int)
    assert abs(far / limit - 1).min() > 1e-3 and all((x - y).abs().max() > 1e-3 for x, y in pairs)
    heard = torch.stack([pair[i] for pair, i in zip(pairs, routed, strict=True)])
    out |= {f'{name}/distance': far, f'{name}/routed': routed, f'{name}/answers': heard}
  out['grad'] = slope(net, rows(asked[1]), other[1], out['0/shards'][0])
  out['hinges'] = torch.stack(hinges)
  return out
