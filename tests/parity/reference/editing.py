"""Reference for knowledge editing and causal tracing: golden/editing_<net>.npz, edits_<net>.npz.

The two networks and the requests are those of `editing_model.py`, the methods those of `edit_target.py`,
`edit_weights.py` and `edit_trace.py`, with their equations and what differs in the authors' code. <net>
is gpt2 or llama, with the same keys (but 'embed/positions' and biases: gpt2 alone; 'gate': llama alone).
N = 3 requests, P = 4 contexts, d = 16, ffn = 24, V = 40, 4 layers counted from 0. Padding of token arrays
is 0 on the right: cut by the lengths. Numbers of tokens, indices and layers are integers.

editing_<net>.npz, network:
  params/embed/tokens [V,d], params/embed/positions [32,d]
  params/layers/<q|k|v|o|up|gate|down>/w [4,in,out], .../b [4,out]; k and v of llama have 8 outputs
  params/layers/<norm1|norm2>/scale [4,d], .../bias; params/norm/scale [d], .../bias
  config/heads, kv_heads, eps, theta
Requests:
  tokens [N,P,9]           context and whole target; feed all but the last of `length`
  length, subject, begin [N,P]   tokens in all; index of the subject's last token; of the first target token
  essence [N,5], essence_length, essence_subject [N]   "{subject} is a"; index of the subject's last token
  request/shape [N,4]      tokens before the subject, of it, behind it, of the target
  logits [N,P,9,V]         undisturbed, of the tokens fed; 0 behind them
  essence_logits [N,5,V]   likewise
  key [4,N,P,ffn], attention, feedforward, block [4,N,P,d]   undisturbed, at the subject's last token
  answers [N,V]            logits behind the plain prompts (they predict the first target token)
Target loss, case in {block, feedforward, both}; s sites: 1, and for both 2, attention then feedforward:
  target/layers [3] = 1, 2, 3
  target/<case>/deltas [N,3,s,d]       given, the same for every layer
  target/<case>/z0 [3,N,s,d]           by layer
  target/<case>/nll, decay [3,N,3]     decay with its weight 0.5
  target/<case>/<form>/loss, kl [3,N,3], grad [3,N,3,s,d]   form of the KL (kl without its weight 0.0625):
                                       reverse (the definition), forward, code: see `edit_target.py`
  Behind the last layer a block delta reaches only predictions made at its own position.
Minimisation, layer optimise/layer = 2, 5 iterations, so 4 steps; form reverse:
  optimise/<case>/losses [N,5], deltas [N,5,s,d]   before each step; the last are the result
  optimise/<case>/clamped [N,4,s]      1 where a delta was scaled down
  optimise/<case>/z0, z [N,s,d]
  optimise/<case>/stop                 another threshold in place of 0.05, at which request 2 stops early
  optimise/<case>/stop_steps [N], stop_z [N,s,d]   steps taken with it, and the result
  code/<case>/losses, deltas, z        the same (threshold 0.05) with form code

edits_<net>.npz, statistics:
  c [4,ffn,ffn]            second moments by layer, 60 random rows X: X^T X / 60 + 0.01 I
  lam                      15, weight of c in memit and pmet
ROME, layer rome/layer = 2, requests 0, 1, 2 in a row, each on the network that the others have edited:
  rome/targets [N,d]       given: optimise/feedforward/z, from the network before all edits
  rome/k, u [N,ffn], rome/m [N,d], rome/w [N,ffn,d] after each request
  rome/answers [N,V]       logits behind the plain prompts after all three
MEMIT, M in {memit/given: layers 1, 2, 3, z of layer 3 drawn; memit/optimised: layers 1, 2, z of layer 2
from optimise/block; memit/single: layer 2, request 0 alone}:
  M/layers [n], M/z [N,d]
  M/keys [n,ffn,N], current [n,d,N] (h of the last layer), residual [n,d,N], a [n,ffn,N], w [n,ffn,d]
                           layer by layer in order, w after the write
  M/answers [N,V]          behind the plain prompts after all writes (of all three requests, single too)
  memit/single/closed_w [ffn,d]   W + C^-1 k r^T / (lam + k . C^-1 k), which must be w
PMET, M in {pmet/given, pmet/optimised}: the same keys, z and current of the feedforward output
  (pmet/optimised: row 1 of optimise/both/z).
AlphaEdit, layers 1, 2, 3, batches of requests (0, 1) and (2,), M in {alphaedit/published: l2 = 10,
alphaedit/light: l2 = 0.1}:
  alphaedit/c [4,ffn,ffn] of rank 14 but for noise, alphaedit/threshold, alphaedit/p [4,ffn,ffn]
  M/l2, M/layers [3], M/z [N,d] (given, of layer 3)
  M/<0|1>/keys, current, residual, a, w   as of MEMIT, with the batch's requests for N
  M/<0|1>/past [3,ffn,ffn] Kp of each layer AFTER the batch, M/<0|1>/answers [N,V]
Causal tracing, of request 0's plain prompt:
  trace/tokens [5], trace/begin, trace/end (the subject is tokens[begin:end]), trace/noise [4,2,d]
  trace/answer (the most probable token), trace/clean, trace/corrupted   p(answer)
  trace/<block|feedforward|attention>/1, trace/<feedforward|attention>/3   [layers,tokens]

The generator checks that deltas are clamped in some steps and not in others, that no loss is near a
threshold, that eigenvalues split clearly, and that edits move the network.
"""

from __future__ import annotations

import edit_trace
import edit_weights as weights
import editing_model as model
import numpy as np
import problem as pb
import torch
from edit_target import CASES, ITERATIONS, KLS, Path, optimise, target_loss, undisturbed
from editing_model import DEPTH, FFN, VOCABULARY, D, Net, Request, Tensor

LAYERS, LAYER, LAM, THRESHOLD, RANK = (1, 2, 3), 2, 15.0, 2e-2, 14
EDITS = (
  'c',
  'lam',
  'rome',
  'memit',
  'pmet',
  'alphaedit',
  'trace',
)  # what goes into the second file
SITES = ('key', 'attention', 'feedforward', 'block')


def padded(rows: list, width: int) -> np.ndarray:
  out = np.zeros((len(rows), width, *np.shape(rows[0])[1:]), np.asarray(rows[0]).dtype)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out


def described(net: Net, asked: list[Request]) -> dict:
  width = max(len(s) for r in asked for s in r.sequences)
  longest = max(len(r.essence) for r in asked)
  fed = [[model.forward(net, s[:-1]).numpy() for s in r.sequences] for r in asked]
  out = {
    'tokens': np.stack([padded(r.sequences, width) for r in asked]),
    'length': [[len(s) for s in r.sequences] for r in asked],
    'subject': [r.subject for r in asked],
    'begin': [r.begin for r in asked],
    'essence': padded([r.essence for r in asked], longest),
    'essence_length': [len(r.essence) for r in asked],
    'essence_subject': [r.essence_subject for r in asked],
    'request/shape': model.SHAPES,
    'logits': np.stack([padded(rows, width) for rows in fed]),
    'essence_logits': padded([model.forward(net, r.essence).numpy() for r in asked], longest),
    'answers': model.answers(net, asked),
  }
  for site in SITES:
    rows = [[model.at_subject(net, r, site, i) for r in asked] for i in range(DEPTH)]
    out[site] = torch.stack([torch.stack(layer) for layer in rows])
  return out


def losses(net: Net, asked: list[Request], case: str, deltas: Tensor) -> dict:
  """Every layer, request and given delta, in every form of the KL."""
  z0 = np.stack([[undisturbed(net, r, case, i).numpy() for r in asked] for i in LAYERS])
  out = {'deltas': deltas.numpy(), 'z0': z0}
  for form in KLS:
    found: dict[str, list] = {k: [] for k in ('loss', 'nll', 'kl', 'decay', 'grad')}
    for layer in LAYERS:
      for request, rows in zip(asked, deltas, strict=True):
        for row in rows:
          delta = row.clone().requires_grad_()
          parts = target_loss(net, request, case, layer, delta, form)
          for name, value in parts._asdict().items():
            found[name].append(value.item())
          found['grad'].append(torch.autograd.grad(parts.loss, delta)[0].numpy())
    shaped = {k: np.reshape(v, (3, *deltas.shape[:2], *np.shape(v)[1:])) for k, v in found.items()}
    out |= {k: shaped[k] for k in ('nll', 'decay')}
    out |= {f'{form}/{k}': shaped[k] for k in ('loss', 'kl', 'grad')}
  return out


def minimised(net: Net, asked: list[Request], case: str) -> dict:
  z0 = torch.stack([undisturbed(net, r, case, LAYER) for r in asked])
  full = [optimise(net, r, case, LAYER) for r in asked]
  assert all(len(p.losses) == ITERATIONS for p in full)
  stop = round((full[-1].losses[1] + full[-1].losses[2]) / 2, 3)
  assert min(abs(loss - stop) for p in full for loss in p.losses) > 1e-3
  early = [optimise(net, r, case, LAYER, enough=stop) for r in asked]
  last = lambda paths: z0 + torch.stack([p.deltas[-1] for p in paths])  # noqa: E731
  return stacked(full) | {
    'clamped': np.array([p.clamped for p in full], int),
    'z0': z0,
    'z': last(full),
    'stop': stop,
    'stop_steps': [len(p.losses) - 1 for p in early],
    'stop_z': last(early),
  }


def stacked(paths: list[Path]) -> dict:
  return {
    'losses': [p.losses for p in paths],
    'deltas': torch.stack([torch.stack(p.deltas) for p in paths]),
  }


def coded(net: Net, asked: list[Request], case: str) -> dict:
  paths = [optimise(net, r, case, LAYER, form='code') for r in asked]
  assert all(len(p.losses) == ITERATIONS for p in paths)
  out = stacked(paths)
  z0 = torch.stack([undisturbed(net, r, case, LAYER) for r in asked])
  return out | {'z': z0 + out['deltas'][:, -1]}


def romes(net: Net, asked: list[Request], targets: Tensor, c: Tensor) -> dict:
  edits = []
  edited = net
  for request, target in zip(asked, targets, strict=True):
    edited, edit = weights.rome(edited, request, LAYER, target, c[LAYER])
    edits.append(edit)
  out = {name: torch.stack([getattr(e, name) for e in edits]) for name in weights.Rome._fields}
  return out | {'layer': LAYER, 'targets': targets, 'answers': model.answers(edited, asked)}


def trail(steps: list[weights.Step]) -> dict:
  return {name: torch.stack([getattr(s, name) for s in steps]) for name in weights.Step._fields}


def batched(method, net: Net, asked: list[Request], layers, z: Tensor, c: Tensor, everyone) -> dict:
  edited, steps = method(net, asked, layers, z, c, LAM)
  return trail(steps) | {'layers': layers, 'z': z, 'answers': model.answers(edited, everyone)}


def alphaedits(net: Net, asked: list[Request], z: Tensor, p: Tensor, l2: float) -> dict:
  past = torch.zeros_like(p)
  out = {'l2': l2, 'layers': LAYERS, 'z': z}
  for i, batch in enumerate((slice(0, 2), slice(2, 3))):
    net, steps, past = weights.alphaedit(net, asked[batch], LAYERS, z[batch], p, past, l2)
    after = {'past': past[list(LAYERS)], 'answers': model.answers(net, asked)}
    out |= pb.prefixed(str(i), trail(steps) | after)
  return out


def traces(net: Net, request: Request, rng: np.random.Generator) -> dict:
  tokens = request.sequences[0][: request.begin[0]]
  before, length = model.SHAPES[0][:2]
  probabilities = model.forward(net, tokens)[-1].softmax(-1)
  answer = int(probabilities.argmax())
  noise = torch.tensor(rng.normal(size=(4, length, D)) * 0.9)
  low = edit_trace.corrupted(net, tokens, answer, before, noise)
  out = {
    'tokens': tokens,
    'begin': before,
    'end': before + length,
    'noise': noise,
    'answer': answer,
  }
  out |= {'clean': probabilities[answer], 'corrupted': low}
  for site, window in [(s, 1) for s in SITES[1:]] + [('feedforward', 3), ('attention', 3)]:
    out[f'{site}/{window}'] = edit_trace.trace(net, tokens, answer, before, noise, site, window)
    assert (out[f'{site}/{window}'] - low).abs().max() > 1e-3
  return out


def moments(rng: np.random.Generator, rank: int = 0) -> pb.Array:
  """[4, ffn, ffn]; with a rank, the rows lie in that many directions but for noise."""
  rows = rng.normal(size=(DEPTH, 60, FFN)) * rng.uniform(0.3, 1.2, size=(DEPTH, 1, FFN))
  if not rank:
    return rows.transpose(0, 2, 1) @ rows / 60 + 0.01 * np.eye(FFN)
  rows = rows[..., :rank] @ rng.normal(size=(DEPTH, rank, FFN)) + 1e-2 * rows
  c = rows.transpose(0, 2, 1) @ rows / 60
  values = np.linalg.eigvalsh(c)
  assert (values[:, : FFN - rank] < THRESHOLD / 20).all() and (
    values[:, -rank:] > 5 * THRESHOLD
  ).all()
  return c


def generate(name: str, seed: int) -> dict:
  rng = np.random.default_rng(seed)
  params = model.init(name, rng)
  net = Net(name, {k: torch.tensor(v) for k, v in params.items()})
  asked = model.requests(rng)
  c, low_rank = torch.tensor(moments(rng)), torch.tensor(moments(rng, RANK))
  out = pb.prefixed('params', params) | described(net, asked)
  out |= {'config/heads': model.HEADS, 'config/kv_heads': model.KV_HEADS[name], 'c': c, 'lam': LAM}
  out |= {'config/eps': model.EPS, 'config/theta': model.THETA}
  out |= {'target/layers': LAYERS, 'optimise/layer': LAYER}
  for case, sites in CASES.items():
    deltas = torch.tensor(rng.normal(size=(len(asked), 3, len(sites), D)))
    out |= pb.prefixed(f'target/{case}', losses(net, asked, case, deltas))
    out |= pb.prefixed(f'optimise/{case}', minimised(net, asked, case))
    out |= pb.prefixed(f'code/{case}', coded(net, asked, case))
  best = {case: out[f'optimise/{case}/z'] for case in CASES}
  out |= pb.prefixed('rome', romes(net, asked, best['feedforward'][:, 0], c))
  draw = lambda site: out[site][3, :, 0] + torch.tensor(rng.normal(size=(len(asked), D)))  # noqa: E731
  given, block, feedforward = draw('block'), best['block'][:, 0], draw('feedforward')
  run = lambda *args: batched(*args, everyone=asked)  # noqa: E731
  out |= pb.prefixed('memit/given', run(weights.memit, net, asked, LAYERS, given, c))
  out |= pb.prefixed('memit/optimised', run(weights.memit, net, asked, LAYERS[:2], block, c))
  single = run(weights.memit, net, asked[:1], (LAYER,), block[:1], c)
  k, r = single['keys'][0, :, 0], single['residual'][0, :, 0]
  u = torch.linalg.solve(c[LAYER], k)
  single['closed_w'] = weights.down(net, LAYER) + torch.outer(u, r) / (LAM + k @ u)
  out |= pb.prefixed('memit/single', single)
  out |= pb.prefixed('pmet/given', run(weights.pmet, net, asked, LAYERS, feedforward, c))
  both = best['both'][:, 1]
  out |= pb.prefixed('pmet/optimised', run(weights.pmet, net, asked, LAYERS[:2], both, c))
  p = torch.stack([weights.null_space(x, THRESHOLD) for x in low_rank])
  out |= {'alphaedit/c': low_rank, 'alphaedit/threshold': THRESHOLD, 'alphaedit/p': p}
  for variant, l2 in (('published', 10.0), ('light', 0.1)):
    out |= pb.prefixed(f'alphaedit/{variant}', alphaedits(net, asked, given, p, l2))
  out |= pb.prefixed('trace', traces(net, asked[0], rng))
  return {k: np.asarray(v) for k, v in out.items()}


def check(name: str, out: dict) -> None:
  """That the file tells mistakes apart."""
  clamped = np.concatenate([out[f'optimise/{case}/clamped'].ravel() for case in CASES])
  steps = [out[f'optimise/{case}/stop_steps'].tolist() for case in CASES]
  print(
    f'{name}: {clamped.mean():.2f} of the steps clamped, steps with the other threshold {steps}'
  )
  assert 0 < clamped.mean() < 1
  assert all(s[-1] == 2 for s in steps)
  for key in out:
    if key.endswith('answers') and key != 'answers':
      moved = np.abs(out[key] - out['answers']).max()
      print(f'  {key}: logits moved by up to {moved:.3f}')
      assert moved > 1e-3
  assert out['logits'].shape[-1] == VOCABULARY


def main() -> None:
  for name, seed in (('gpt2', 2202), ('llama', 2210)):
    out = generate(name, seed)
    check(name, out)
    second = {k: v for k, v in out.items() if k.split('/')[0] in EDITS}
    pb.save(f'edits_{name}', second)
    pb.save(f'editing_{name}', {k: v for k, v in out.items() if k not in second})


if __name__ == '__main__':
  main()
