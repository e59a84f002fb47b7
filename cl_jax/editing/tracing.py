"""Causal tracing: which states, put back into a run whose subject was blurred, bring the answer back.

Meng et al., NeurIPS 2022 (ROME), sec. 2; github.com/kmeng01/rome, experiments/causal_trace.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.editing import encoding
from cl_jax.editing.restore import KINDS, Trace, maps
from cl_jax.errors import UserError
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

ROLES = (
  'first subject token',
  'middle subject tokens',
  'last subject token',
  'first subsequent token',
  'further tokens',
  'last token',
)


class Prompt(NamedTuple):
  """One prompt.

  Attributes:
    tokens: i32[L], -1 is padding on the right.
    lo, hi: the subject is tokens[lo:hi].
    answer: the token whose probability is traced; -1 takes the one that the model finds most probable.
  """

  tokens: np.ndarray
  lo: int
  hi: int
  answer: int = -1


class Average(NamedTuple):
  """Means over prompts.

  Attributes:
    clean, corrupted: probabilities; `clean - corrupted` is the total effect.
    effect: f64[3, layers, 6], average indirect effects by `KINDS` and `ROLES`; NaN where there is no token.
    tokens: i64[6], that each role was averaged over.
  """

  clean: float
  corrupted: float
  effect: np.ndarray
  tokens: np.ndarray


def prompt(tokenizer: Any, text: str, subject: str, answer: str = '') -> Prompt:
  """The prompt `text`, in which the subject stands; the answer is the first token of ' {answer}'.

  Raises:
    UserError: the subject is empty or not in the text.
  """
  start = text.find(subject)
  if not subject.strip() or start < 0:
    raise UserError(f'the prompt {text!r} does not name its subject {subject!r}')
  ids, spans = encoding.prompt(tokenizer, text)
  end = start + len(subject.rstrip())
  touched = [i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]
  if not touched:
    raise UserError(f'the tokenizer has no token for {subject!r}')
  first = [*encoding.after(tokenizer, text, answer), -1][0]
  return Prompt(np.asarray(ids, np.int32), touched[0], touched[-1] + 1, first)


def noise(backbone: Tree, prompts: Sequence[Prompt], factor: float = 3.0) -> float:
  """The published noise: `factor` standard deviations of the embeddings of all subjects' tokens, one number.

  As the repository's `collect_embedding_std`, which leaves positions out as well.
  """
  tokens = np.concatenate([p.tokens[p.lo : p.hi] for p in prompts])
  return factor * float(np.std(np.asarray(backbone['embed']['tokens'])[tokens].astype(np.float64)))


def trace(
  config: Config,
  backbone: Tree,
  prompt: Prompt,
  key: Array,
  sigma: float,
  samples: int = 10,
  window: int = 10,
  width: int = 16,
) -> Trace:
  """Every state of a prompt, put back one at a time, by one compiled program for all prompts of a length.

  Three runs: clean; corrupted, with Gaussian noise added to the embeddings of the subject's tokens; and
  corrupted with what the clean run had at one token put back, at one layer for 'block' and at layers
  max(0, l - window // 2) to min(depth, l + ceil(window / 2)) - 1 for 'feedforward' and 'attention'.

  Args:
    key: of the noise, of which all layers and tokens see the same samples.
    sigma: its standard deviation, see `noise`.
    samples: of noise; published 10.
    window: layers; published 10, of the 48 of GPT2-XL.
    width: tokens whose restored runs go through a layer together, `samples` rows each.

  Deviation: a restored run begins at its first restored layer, from the corrupted state there, which is the
  same thing for half of the work. Layers come one after the other, tokens and samples together.

  Raises:
    UserError: a subject that is not in the prompt, tokens that are not the model's, or numbers below 1.
  """
  tokens = np.asarray(prompt.tokens)
  length = int((tokens >= 0).sum())
  if (tokens[:length] < 0).any() or not 0 <= prompt.lo < prompt.hi <= length:
    raise UserError(
      f'the subject is tokens {prompt.lo} to {prompt.hi - 1} of a prompt of {length}, '
      'with -1 on the right alone'
    )
  if tokens.max() >= config.vocabulary or not -1 <= prompt.answer < config.vocabulary:
    raise UserError(f'the prompt or answer has tokens above the {config.vocabulary} of this model')
  if min(samples, window, width) < 1:
    raise UserError(f'samples, window and width must be positive: {samples}, {window}, {width}')
  subject, answer = jnp.asarray((prompt.lo, prompt.hi)), jnp.asarray(prompt.answer)
  args = jnp.asarray(tokens, jnp.int32), subject, answer, key, jnp.asarray(sigma, jnp.float32)
  return maps(config, samples, window, width, backbone, *args)


def traces(
  config: Config,
  backbone: Tree,
  prompts: Sequence[Prompt],
  key: Array,
  sigma: float,
  tell: Callable[[str], None] = lambda line: None,
  **options: int,
) -> list[Trace]:
  """`trace` of every prompt, with noise of its own; `tell` gets a line about each."""
  found = []
  for i, one in enumerate(prompts):
    t = trace(config, backbone, one, jax.random.fold_in(key, i), sigma, **options)
    found.append(jax.tree.map(np.asarray, t))
    tell(
      f'prompt {i + 1} of {len(prompts)}: p {float(t.clean):.3f}, corrupted {float(t.corrupted):.3f}, '
      + ', '.join(f'{k} {m:.3f}' for k, m in zip(KINDS, t.maps.max((1, 2)), strict=True))
    )
  return found


def average(prompts: Sequence[Prompt], found: Sequence[Trace]) -> Average:
  """Indirect effects by the role of the token, as in the paper's figure 2.

  All tokens of a role count alike, whatever their prompt. A subject of one token is its first and its last;
  the last token of the prompt may also be the first after the subject, or the last of the subject.

  Raises:
    UserError: there is no trace.
  """
  if not found or len(found) != len(prompts):
    raise UserError(f'averages need as many traces as prompts: {len(found)} of {len(prompts)}')
  parts: list[list[np.ndarray]] = [[] for _ in ROLES]
  for p, t in zip(prompts, found, strict=True):
    effect = np.asarray(t.maps, np.float64) - float(t.corrupted)
    last = int((np.asarray(p.tokens) >= 0).sum()) - 1
    columns = ([p.lo], range(p.lo + 1, p.hi - 1), [p.hi - 1])
    columns += ([p.hi] if p.hi <= last else [], range(p.hi + 1, last), [last])
    for part, role in zip(parts, columns, strict=True):
      part.extend(effect[..., i] for i in role)
  empty = np.full(np.shape(found[0].maps)[:2], np.nan)
  means = [np.mean(part, 0) if part else empty for part in parts]
  clean = float(np.mean([t.clean for t in found]))
  corrupted = float(np.mean([t.corrupted for t in found]))
  return Average(clean, corrupted, np.stack(means, -1), np.array([len(part) for part in parts]))


def layers_of(found: Average, count: int = 5, lowest: int = 0) -> tuple[int, ...]:
  """The layers for MEMIT to write to, of a model for which none are published.

  They are the `count` consecutive layers whose summed average indirect effect is largest with 'feedforward'
  put back at the subject's last token, the lower ones of equals: where MLPs look a fact up. MEMIT (sec. 4.1)
  takes the layers that its fig. 3 shows to matter; this makes a rule of it. Published are 5 layers of GPT2-XL
  and 6 of GPT-J.

  Args:
    lowest: the first layer that can be chosen. Below window / 2 every restored window has the first MLP in
      it, which in many models does little but say which token this is: an effect there is no memory.
  """
  effect = found.effect[KINDS.index('feedforward'), :, ROLES.index('last subject token')]
  if not 1 <= count <= len(effect) - lowest:
    raise UserError(f'{count} layers cannot be chosen among {len(effect) - lowest}')
  sums = np.convolve(effect[lowest:], np.ones(count), 'valid')
  # Rounding must not decide between equals.
  first = lowest + int(np.flatnonzero(sums >= sums.max() - 1e-12)[0])
  return tuple(range(first, first + count))
