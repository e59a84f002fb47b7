"""Reference for the editors that train: golden/trained_<net>.npz, for gpt2 and llama.

PyTorch float64, one sequence at a time. Networks and requests are those of `editing.py`: parameters
and `tokens`, `length`, `begin` are in editing_<net>.npz. N = 3, d = 16, ffn = 24, V = 40, 4 layers
from 0. Padding is 0, behind: cut by lengths and counts. log p of a request in a context is the mean
over target tokens of log p(token | everything before); context 0 is the plain prompt. Adam: 0.9,
0.999, eps 1e-8 outside the root, both moments corrected. `answers` are logits behind plain prompts.

ft, ft_l, ft_stop (Zhu et al. 2020; kmeng01/memit, baselines/ft). T [2,ffn,d], 0 at first, is added
to down/w of layers 1 and 2. A pass takes the groups (0, 1) and (2) in order. For each: the loss,
the mean of -log p of its requests; below `stop` no step, and Adam rests too; else a step of Adam on
T, then its entries to [-norm, norm]. No pass begins once the last one's mean loss (the sum of loss
* size over N) is below `stop`. (The code predicts all target tokens from the prompt's last one.)
  F/layers [2], rate, batch, stop    F is ft, ft_l or ft_stop
  F/passes, ran                      passes allowed, and run
  F/norm                             1e30 where there is no bound
  F/losses [passes,2]                before each step, or instead of it; -1 in passes not run
  F/terms [ran,2,ffn,d]              after each pass
  F/log_p [N], answers [N,V]         of the edited network
  F/grad [2,ffn,d]                   gradient of the loss of group (0, 1) at the last term
lora (Hu et al. 2022). W + (alpha / rank) A B in place of q/w and v/w of all layers, B = 0 at first;
A and B are trained together by the same loop without a bound.
  lora/rate, batch, stop, passes, ran, losses, log_p, answers    as above; lora/rank, alpha
  lora/a/q, a/v [4,d,r]              A at first
  lora/q/a, v/a [4,d,r], q/b, v/b [4,r,out]    after training; v has 8 outputs in llama
  lora/grad/<q|v>/<a|b>              gradients of the loss of group (0, 1) there
grace and wise: definitions in `edit_memory.py`, on the undisturbed network.
  grace/layer, eps, rate, steps, capacity (K)
  grace/<b>/tokens [n,W], length, begin [n]    batches b = 0, 1 on one codebook; with targets
  grace/<b>/entry [n]                -1: refused
  grace/<b>/case [n]                 0 new, 1 same label, 2 the same and R grows, 3 split, 4 refused
  grace/<b>/arrival [n], found [n]   D at the request's turn (-1: no key), and in the end
  grace/<b>/inside [n], log_p [n]    whether a value is put in place; with the final codebook
  grace/<b>/keys, values [K,d], radii, labels [K], count    after the batch
  grace/grad [d]                     of -log p of batch 0's request 0 by its value 0/values[0]
  wise/layer, steps, rate, alpha, beta, gamma, bound, density, keep, reach
  wise/unrelated [3,W], unrelated_length [3]
  wise/<b>/tokens [n,4,9], length, begin [n,4], others [n]    n = 3, 1; rows of `unrelated`
  wise/<b>/masks, shards [s,ffn,d]   s = 2, 1; shards before the merge
  wise/<b>/log_p, loss, distance [n] after the request's own steps; mean over c, minimum over c
  wise/<b>/side [ffn,d], epsilon     after the batch
  wise/<plain|other>/distance, routed [3], answers [3,V]    batch 0's plain prompts, the unrelated
                                     ones; with the memory of batch 1, logits behind the prompt
  wise/grad [ffn,d]                  of the loss of batch 0's request 1 at 0/shards[0]

The generator checks that every case occurs, that no comparison is close, and the sensitivity.
"""

from __future__ import annotations

from collections.abc import Callable

import edit_memory as memory
import editing_model as model
import numpy as np
import problem as pb
import torch
from edit_memory import adam, added, grace, log_p, rows, wise
from editing_model import DEPTH, FFN, D, Net, Request, Tensor

LAYERS, GROUPS, STOP, RANK, ALPHA = (1, 2), ((0, 1), (2,)), 1e-2, 2, 8.0
# Seeds of the networks and of what is drawn here; what batch 1 of wise adds to request 0's target.
DRAWS = {'gpt2': (2202, 389, 31), 'llama': (2210, 209, 5)}


def adapted(net: Net, factors: list[Tensor]) -> Net:
  out = dict(net.params)
  for name, a, b in zip('qv', factors[::2], factors[1::2], strict=True):
    out[f'layers/{name}/w'] = net.params[f'layers/{name}/w'] + ALPHA / RANK * (a @ b)
  return net._replace(params=out)


def passes(
  edit: Callable[[list[Tensor]], Net],
  asked: list[Request],
  start: list[Tensor],
  most: int = 8,
  stop: float = STOP,
  norm: float = 1e30,
  rate: float = 5e-3,
) -> tuple[dict, list[list[Tensor]], list[Tensor]]:
  """What is stored, the tensors after each pass, and gradients at the last of them."""
  now = [x.clone().requires_grad_() for x in start]
  optimiser, history, mean = adam(now, rate), [], np.inf
  losses = np.full((most, len(GROUPS)), -1.0)

  def loss(group: tuple[int, ...]) -> Tensor:
    return -torch.stack([log_p(edit(now), rows(asked[n])[0]) for n in group]).mean()

  while len(history) < most and mean >= stop:
    found = losses[len(history)]
    for g, group in enumerate(GROUPS):
      value = loss(group)
      found[g] = value.item()
      if found[g] >= stop:
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        for x in now:
          x.data.clamp_(-norm, norm)
    mean = (found * [len(group) for group in GROUPS]).sum() / len(asked)
    assert min(abs(found - stop)) > 1e-4 and abs(mean - stop) > 1e-4
    history.append([x.detach().clone() for x in now])
  net = edit(history[-1])
  out = {'log_p': torch.stack([log_p(net, rows(r)[0]) for r in asked])}
  out |= {'answers': model.answers(net, asked), 'losses': losses, 'ran': len(history)}
  out |= {'rate': rate, 'batch': len(GROUPS[0]), 'stop': stop, 'passes': most}
  return out, history, list(torch.autograd.grad(loss(GROUPS[0]), now))


def fine_tuned(net: Net, asked: list[Request], norm: float = 1e30, **options) -> dict:
  start = [torch.zeros(len(LAYERS), FFN, D)]
  edit = lambda x: added(net, LAYERS, x[0])  # noqa: E731
  out, history, (grad,) = passes(edit, asked, start, norm=norm, **options)
  terms = torch.stack([term for (term,) in history])
  return out | {'layers': LAYERS, 'norm': norm, 'terms': terms, 'grad': grad}


def lora(net: Net, asked: list[Request], rng: np.random.Generator) -> dict:
  start = []
  for name in 'qv':
    start.append(torch.tensor(rng.uniform(-1, 1, size=(DEPTH, D, RANK)) / np.sqrt(D)))
    start.append(torch.zeros(DEPTH, RANK, net.params[f'layers/{name}/w'].shape[-1]))
  out, history, grads = passes(lambda x: adapted(net, x), asked, start)
  for i, name in enumerate(('q/a', 'q/b', 'v/a', 'v/b')):
    out |= {name: history[-1][i], f'grad/{name}': grads[i]}
  return out | {'rank': RANK, 'alpha': ALPHA, 'a/q': start[0], 'a/v': start[2]}


def generate(name: str, nudge: float = 0.0) -> dict:
  """`nudge`: the parameters change by up to that, relatively."""
  seed, draws, shift = DRAWS[name]
  rng, new = np.random.default_rng(seed), np.random.default_rng(draws)
  params, asked = model.init(name, rng), model.requests(rng)
  factors = {k: 1 + nudge * rng.uniform(-1, 1, size=v.shape) for k, v in params.items()}
  net = Net(name, {k: torch.tensor(v * factors[k]) for k, v in params.items()})
  out = pb.prefixed('ft', fine_tuned(net, asked))
  out |= pb.prefixed('ft_l', fine_tuned(net, asked, norm=1.2e-2, rate=1e-3, most=7))
  # between two losses of the group that is ahead, so that it rests from some pass on
  ahead = fine_tuned(net, asked, rate=1e-2, most=4)['losses'][2:].min(1)
  stop = round(ahead.mean(), 3)
  out |= pb.prefixed('ft_stop', fine_tuned(net, asked, rate=1e-2, most=30, stop=stop))
  out |= pb.prefixed('lora', lora(net, asked, new)) | pb.prefixed('grace', grace(net, asked))
  out |= pb.prefixed('wise', wise(net, asked, new, shift)) | {'plain': model.answers(net, asked)}
  return {k: np.asarray(v) for k, v in out.items()}


def check(name: str, out: dict) -> None:
  """That the file tells mistakes apart, and that float32 can be compared with it."""
  plain, hinges, k = out.pop('plain'), out.pop('wise/hinges'), int(memory.DENSITY * FFN * D)
  for key in (f'{m}/answers' for m in ('ft', 'ft_l', 'ft_stop', 'lora', 'wise/plain')):
    assert abs(out[key] - plain).max() > 1e-3
  for key in ('ft', 'ft_l', 'lora'):
    assert out[f'{key}/ran'] == out[f'{key}/passes']
  stop, losses = out['ft_stop/stop'], out['ft_stop/losses'][: out['ft_stop/ran']]
  rests = (losses < stop).sum(1)
  assert rests[0] == 0 and (rests == 1).sum() > 1 and len(losses) < out['ft_stop/passes']
  bound = (abs(out['ft_l/terms'][-1]) == out['ft_l/norm']).mean()
  assert 0.1 < bound < 0.9
  assert out['grace/0/case'].tolist() == [0] * 3 and out['grace/0/inside'].all()
  assert out['grace/1/case'].tolist() == [1, 1, 2, 3, 0, 4, 4]
  assert set(out['grace/1/inside']) == {0, 1}
  active = (hinges > 0).mean((0, 2))
  assert abs(hinges).min() > 1e-3 and (active > 0).all() and (active < 1).all()
  shards = out['wise/0/shards']
  met, kept = (abs(shards) == memory.BOUND).mean(), (shards != 0).sum((1, 2))
  assert 0 < met < 0.5 and kept.min() < k < kept.max() and (out['wise/0/side'] != 0).sum() > k
  assert (shards[0] * shards[1] < 0).any() and out['wise/1/epsilon'] < out['wise/0/epsilon']
  assert set(out['wise/plain/routed']) | set(out['wise/other/routed']) == {0, 1}
  again = generate(name, 6e-8)
  moved = {k: abs(again[k] - v).max() / max(abs(v).max(), 1e-30) for k, v in out.items()}
  worst = max(moved, key=moved.get)
  print(
    f'{name}: {bound:.2f} and {met:.2f} of the entries at a bound, hinges active {active.round(2)}'
  )
  print(f'  a nudge of 6e-8 moves {worst} by {moved[worst]:.1e} of its largest entry')
  assert moved[worst] < 1e-5


def main() -> None:
  for name in DRAWS:
    out = generate(name)
    check(name, out)
    pb.save(f'trained_{name}', out)


if __name__ == '__main__':
  main()
