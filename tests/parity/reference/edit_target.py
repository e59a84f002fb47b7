"""The loss whose minimum is the target of an edit, and its minimisation (shared; see `editing.py`).

Meng et al. 2022 (ROME) eq. 4, Meng et al. 2023 (MEMIT) eq. 16, Li et al. 2024 (PMET), with the
constants and the order of operations of kmeng01/memit, memit/compute_z.py. With delta added at the
subject's last token in every context and in the essence:
  loss = mean over contexts of the mean over target tokens of -log p
         + 0.0625 KL + 0.5 |delta| / |z0|^2       (the norm of delta is not squared; PMET: summed)
  z0 is the site in the plain prompt, undisturbed; p_0 the undisturbed distribution behind the essence.
KL, three forms:
  forward   KL(p_0 || p_delta) behind the LAST token of the essence
  reverse   KL(p_delta || p_0) there: what the papers write, and the definition of these references
  code      KL(p_delta || p_0) at the SUBJECT'S last token: what kmeng01/rome, kmeng01/memit and
            xpq-tech/PMET compute (kl_div of torch has its second argument in front; index `lookup_idxs`)
At delta = 0 the norm has the subgradient 0.

Minimisation: Adam (lr 0.5, 0.9, 0.999, 1e-8) from 0; the loss; stop below 0.05; no step in the last of 5
iterations; step; |delta| <= 0.75 |z0|, by scaling, each delta by itself. PMET's code also weakens the
likelihood once the target is the most probable token; not here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from editing_model import Net, Request, Tensor, at_subject, forward

LR, BETAS, ADAM_EPS = 0.5, (0.9, 0.999), 1e-8
KL_WEIGHT, DECAY, CLAMP, ITERATIONS, ENOUGH = 0.0625, 0.5, 0.75, 5, 0.05
CASES = {
  'block': ('block',),
  'feedforward': ('feedforward',),
  'both': ('attention', 'feedforward'),
}
KLS = ('forward', 'reverse', 'code')


class Loss(NamedTuple):
  loss: Tensor
  nll: Tensor
  kl: Tensor  # without its weight
  decay: Tensor  # with its weight


class Path(NamedTuple):
  """The loss of every iteration and the deltas it was taken at; the last ones are the result."""

  losses: list[float]
  deltas: list[Tensor]
  clamped: list[list[bool]]


def shifted(net: Net, tokens: list[int], at: int, sites: dict[tuple[str, int], Tensor]) -> Tensor:
  """log p [positions, vocabulary] with a vector added to each of some sites at one position."""

  def tap(site: str, layer: int, x: Tensor) -> Tensor:
    if (site, layer) not in sites:
      return x
    here = torch.nn.functional.one_hot(torch.tensor(at), len(x)).double()
    return x + torch.outer(here, sites[site, layer])

  return forward(net, tokens, tap).log_softmax(-1)


def undisturbed(net: Net, request: Request, case: str, layer: int) -> Tensor:
  """z0 [sites, d]."""
  return torch.stack([at_subject(net, request, site, layer)[0] for site in CASES[case]])


def target_loss(
  net: Net, request: Request, case: str, layer: int, deltas: Tensor, form: str = 'reverse'
) -> Loss:
  """`deltas` [sites, d]."""
  sites = {(site, layer): delta for site, delta in zip(CASES[case], deltas, strict=True)}
  means = []
  for tokens, at, begin in zip(request.sequences, request.subject, request.begin, strict=True):
    logp = shifted(net, tokens[:-1], at, sites)
    means.append(-torch.stack([logp[i - 1, tokens[i]] for i in range(begin, len(tokens))]).mean())
  nll = torch.stack(means).mean()
  where = request.essence_subject if form == 'code' else -1
  before = shifted(net, request.essence, 0, {})[where].detach()
  after = shifted(net, request.essence, request.essence_subject, sites)[where]
  first, second = (before, after) if form == 'forward' else (after, before)
  kl = (first.exp() * (first - second)).sum()
  z0 = undisturbed(net, request, case, layer).detach()
  decay = DECAY * (deltas.norm(dim=-1) / (z0**2).sum(-1)).sum()
  return Loss(nll + KL_WEIGHT * kl + decay, nll, kl, decay)


def optimise(
  net: Net, request: Request, case: str, layer: int, enough: float = ENOUGH, form: str = 'reverse'
) -> Path:
  z0 = undisturbed(net, request, case, layer).detach()
  deltas = [torch.zeros_like(z, requires_grad=True) for z in z0]
  adam = torch.optim.Adam(deltas, lr=LR, betas=BETAS, eps=ADAM_EPS, weight_decay=0.0)
  path = Path([], [], [])
  for i in range(ITERATIONS):
    loss = target_loss(net, request, case, layer, torch.stack(deltas), form).loss
    path.losses.append(loss.item())
    path.deltas.append(torch.stack(deltas).detach().clone())
    if loss.item() < enough or i == ITERATIONS - 1:
      break
    adam.zero_grad()
    loss.backward()
    adam.step()
    path.clamped.append([])
    with torch.no_grad():
      for delta, z in zip(deltas, z0, strict=True):
        bound = CLAMP * z.norm()
        path.clamped[-1].append(bool(delta.norm() > bound))
        if delta.norm() > bound:
          delta *= bound / delta.norm()
  return path
