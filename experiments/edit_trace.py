"""Causal tracing of facts that a model knows: what `experiments.edit --trace` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import checkpoint, durable
from cl_jax.editing import evaluate, tracing
from cl_jax.editing.restore import KINDS, Trace
from cl_jax.editing.rows import layout
from cl_jax.errors import UserError
from cl_jax.report import tracing as figures
from experiments import results
from experiments.edit_subject import Subject

FILE = 'trace.json'
COUNT = 5  # layers to be chosen
SAMPLES, WINDOW, LONGEST = 5, 6, 8  # of noise; layers; tokens of a prompt


def trace(
  subject: Subject,
  name: str,
  data: Path,
  n: int,
  folder: Path,
  command: str,
  tell: Callable[[str], None],
) -> int:
  """Traces n facts of known_1000.jsonl that the model knows and draws the average; goes on when repeated.

  Facts are taken in the order of the file, of prompts of at most `LONGEST` tokens. Where more have been
  traced before, they stay in the file, and the average is that of the first n.
  """
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / FILE
  sigma, facts, asked = known(subject, data, n, tell)
  about: dict[str, Any] = {
    'model': name,
    'backbone': checkpoint.digest(subject.backbone),
    'source': 'edit/known_1000.jsonl',
    'rule': f'prompts of at most {LONGEST} tokens whose most probable next token begins the attribute',
    'samples': SAMPLES,
    'window': WINDOW,
    'sigma': sigma,
    'kinds': list(KINDS),
  }
  found: list[dict[str, Any]] = []
  if file.exists():
    try:
      before = json.loads(file.read_text())
      found = before.pop('facts')
    except (ValueError, KeyError, AttributeError) as error:
      raise UserError(f'{file} is damaged ({error}): remove it to begin anew') from error
    if {k: before.get(k) for k in about} != about:
      raise UserError(f'{file} is of another model or other facts: name another --workdir')
  for record, prompt in facts[len(found) :]:
    key = jax.random.fold_in(jax.random.key(0), record['known_id'])
    (one,) = tracing.traces(
      subject.config, subject.backbone, [prompt], key, sigma, samples=SAMPLES, window=WINDOW
    )
    found.append(described(subject, record, prompt, one))
    made = {'asked': asked, 'device': results.device(), 'command': command}
    durable.write(file, json.dumps({**about, **made, 'facts': found}) + '\n')
    tell(
      f'{len(found)}/{len(facts)}  {record["prompt"]}  p {float(one.clean):.3f} -> {float(one.corrupted):.3f}'
    )
  prompts, traces = read(file)
  average = tracing.average(prompts[:n], traces[:n])
  durable.replace(folder / 'average.png', lambda f: f.write(figures.averages(average, WINDOW)))
  first = found[0]
  drawn = figures.traces(prompts[0], traces[0], first['words'], first['answer'], WINDOW)
  durable.replace(folder / 'first.png', lambda f: f.write(drawn))
  depth = average.effect.shape[1]
  count = min(COUNT, depth)
  picked = tracing.layers_of(average, count, min(WINDOW // 2, depth - count))
  print(f'layers for MEMIT, by the largest effect of {count} at the last subject token: {picked}')
  print(f'{file}, {folder / "average.png"}, {folder / "first.png"}')
  return 0


def known(subject: Subject, data: Path, n: int, tell):
  """(noise, the first n facts that the model knows with their prompts, how many were asked)."""
  file = data / 'edit/known_1000.jsonl'
  if not file.is_file():
    raise UserError(f'there are no facts at {file}; --data_dir names the folder above edit/')
  records = [json.loads(line) for line in file.read_text('utf-8').splitlines()]
  records = [r for r in records if r['subject'] in r['prompt']]
  put = lambda r, answer='': tracing.prompt(subject.tokenizer, r['prompt'], r['subject'], answer)  # noqa: E731
  prompts = [put(r) for r in records]
  sigma = tracing.noise(subject.backbone, prompts)
  pairs = [(r, p) for r, p in zip(records, prompts, strict=True) if len(p.tokens) <= LONGEST]
  ask, found, asked = evaluate.asker(subject.config), [], 0
  for lo in range(0, len(pairs), 32):
    part = pairs[lo : lo + 32]
    answers = [put(r, r['attribute']).answer for r, _ in part]
    rows = layout(
      [(p.tokens.tolist(), len(p.tokens) - 1, [a]) for (_, p), a in zip(part, answers, strict=True)]
    )
    _, right = ask(subject.backbone, (), rows)
    asked += len(part)
    found += [pair for pair, share in zip(part, right, strict=True) if share == 1]
    if len(found) >= n:
      break
  if len(found) < n:
    raise UserError(f'--trace={n}, and the model knows {len(found)} facts in so few tokens')
  tell(f'{len(found)} of {asked} facts are known')
  return sigma, found[:n], asked


def described(subject: Subject, record, prompt: tracing.Prompt, one: Trace) -> dict[str, Any]:
  """A fact and its maps as JSON."""
  decode = subject.tokenizer.decode
  return {
    **{k: record[k] for k in ('known_id', 'prompt', 'subject', 'attribute')},
    'words': [decode([int(i)]) for i in prompt.tokens],
    'tokens': [int(i) for i in prompt.tokens],
    'range': [prompt.lo, prompt.hi],
    'answer': decode([int(one.answer)]),
    'clean': float(one.clean),
    'corrupted': float(one.corrupted),
    'maps': np.asarray(one.maps, np.float64).round(6).tolist(),
  }


def read(file: Path) -> tuple[list[tracing.Prompt], list[Trace]]:
  """The prompts and traces of a file."""
  prompts, traces = [], []
  for fact in json.loads(file.read_text())['facts']:
    lo, hi = fact['range']
    prompts.append(tracing.Prompt(np.zeros(len(fact['words']), np.int32), lo, hi))
    numbers = {k: jnp.asarray(fact[k]) for k in ('clean', 'corrupted', 'maps')}
    traces.append(Trace(**{'answer': jnp.asarray(-1), **numbers}))
  return prompts, traces
