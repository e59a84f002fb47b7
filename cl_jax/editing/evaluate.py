"""What edits did: to the fact, other ways to ask for it, its neighbours, and to what the model writes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.editing import encoding, inside
from cl_jax.editing.rows import Edit, Rows, layout
from cl_jax.errors import UserError
from cl_jax.models import causal
from cl_jax.models.causal import Config
from cl_jax.types import Array, Tree

KINDS = ('rewrite', 'paraphrase', 'neighbour', 'portability')


class Questions(NamedTuple):
  """Prompts with the answer that is wanted and, where it is known, the one that must not win.

  Attributes:
    rows: Q prompts with the wanted answer, then as many with the other; see `rows.Rows`. The column that is
      common to all is the prompt's last token.
    kind: i[Q], index of `KINDS`.
    edit: i[Q], which edit it belongs to.
    compared: bool[Q], whether there is another answer.
  """

  rows: Rows
  kind: np.ndarray
  edit: np.ndarray
  compared: np.ndarray


def questions(
  tokenizer: Any, edits: Sequence[Edit], neighbours: int = 5, length: int = 64
) -> tuple[Questions, list[tuple[str, str]]]:
  """All that is asked about some edits, and (case, prompt) of what is too long to be.

  Of a neighbour the truth is wanted, and the edit's target must not win.
  """
  found: list[tuple[int, int, str, str, str]] = []
  for i, e in enumerate(edits):
    found.append((0, i, e.text, e.target, e.truth))
    found += [(1, i, prompt, e.target, e.truth) for prompt in e.paraphrases]
    answers = e.answers or (e.truth,) * len(e.neighbours)
    other = '' if e.answers else e.target
    near = list(zip(e.neighbours, answers, strict=True))[:neighbours]
    found += [(2, i, prompt, answer, other) for prompt, answer in near if answer]
    found += [(3, i, prompt, answer, '') for prompt, answer in e.portability]
  ones, others, kept, left = [], [], [], []
  for kind, i, prompt, wanted, other in found:
    ids, _ = encoding.prompt(tokenizer, prompt)
    one, two = (encoding.after(tokenizer, prompt, text) for text in (wanted, other))
    if not ids or len(ids) + max(len(one), len(two)) > length:
      left.append((edits[i].case, prompt))
      continue
    ones.append((ids, len(ids) - 1, one))
    others.append((ids, len(ids) - 1, two))
    kept.append((kind, i, bool(other)))
  if not kept:
    raise UserError(f'no prompt of {len(edits)} edits is at most {length} tokens long')
  kind, edit, compared = (np.array(column) for column in zip(*kept, strict=True))
  return Questions(layout(ones + others), kind, edit, compared), left


Ask = Callable[[Tree, Any, Rows], tuple[np.ndarray, np.ndarray]]


def asker(config: Config, tap: Any = None, width: int = 64) -> Ask:
  """ask(backbone, editor's state, rows [R, ...]) -> (mean log p of the answer f[R], share of its tokens that
  are the most probable ones f[R]); `tap` is an `Editor.tap`, `width` the rows at a time."""

  @jax.jit
  def ask(backbone: Tree, state: Any, rows: Rows) -> tuple[Array, Array]:
    column = rows.head.shape[-1]

    def group(rows: Rows) -> tuple[Array, Array]:
      taps = {} if tap is None else {'tap': tap(state, jnp.full(len(rows.head), column))}
      log_p = inside.forward(config, backbone, rows, **taps)
      real = rows.target >= 0
      right = (log_p.argmax(-1) == rows.target) & real
      share = right.sum(-1) / jnp.maximum(real.sum(-1), 1)
      return inside.mean_log_p(log_p, rows.target), share

    n = len(rows.head)
    groups = -(-n // width)
    index = jnp.minimum(jnp.arange(groups * width), n - 1).reshape(groups, width)
    found = jax.lax.map(lambda i: group(jax.tree.map(lambda a: a[i], rows)), index)
    return jax.tree.map(lambda a: a.reshape(-1)[:n], found)

  def answered(backbone: Tree, state: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    log_p, share = ask(backbone, state, rows)
    return np.asarray(log_p, np.float64), np.asarray(share, np.float64)

  return answered


def score(ask: Ask, backbone: Tree, state: Any, asked: Questions) -> np.ndarray:
  """f[Q], how well each question is answered: 1 where the wanted answer is more probable than the other (mean
  log p of their tokens), 0 where it is not; without another answer, the share of the wanted one's tokens
  that are the most probable ones."""
  log_p, share = ask(backbone, state, asked.rows)
  wanted, other = np.split(log_p, 2)
  return np.where(asked.compared, wanted > other, share[: len(wanted)])


def some(asked: Questions, here: np.ndarray) -> Questions:
  """The questions where `here`, bool[Q], says so."""
  both = jnp.asarray(np.flatnonzero(np.concatenate([here, here])))
  rows = jax.tree.map(lambda a: a[both], asked.rows)
  return Questions(rows, asked.kind[here], asked.edit[here], asked.compared[here])


def measures(
  asked: Questions, scores: np.ndarray, of: np.ndarray | None = None
) -> dict[str, float | None]:
  """es, ps, ns, portability (means over edits) and s, the harmonic mean of those of the first three that are
  there; None where nothing was asked. `of` bool[Q] picks the questions that count."""
  return averages(by_edit(asked, scores, of))


def by_edit(
  asked: Questions, scores: np.ndarray, of: np.ndarray | None = None
) -> dict[str, list[float | None]]:
  """{measure: its value for every edit with questions}: a mean over them, None where none is of that kind."""
  counted = np.ones(len(scores), bool) if of is None else of
  edits = np.unique(asked.edit[counted])
  found = {}
  for k, name in enumerate(('es', 'ps', 'ns', 'portability')):
    here = [scores[(asked.kind == k) & counted & (asked.edit == i)] for i in edits]
    found[name] = [float(v.mean()) if len(v) else None for v in here]
  return found


def averages(each: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
  """What `measures` says of the values that `by_edit` gives, which are None where nothing was asked."""
  found: dict[str, float | None] = {}
  for name, values in each.items():
    answered = [v for v in values if v is not None]
    found[name] = float(np.mean(answered)) if answered else None
  three = [v for k in ('es', 'ps', 'ns') if (v := found[k]) is not None]
  return found | {'s': harmonic(three) if three else None}


def harmonic(values: Sequence[float]) -> float:
  return len(values) / sum(1 / v for v in values) if all(v > 0 for v in values) else 0.0


def written(
  config: Config, tap: Any, steps: int, backbone: Tree, state: Any, prompts: Rows, key: Array
) -> Array:
  """i32[B, steps], what `causal.generate` draws after prompts with the same key, under a tap.

  A tap decides by a whole row, so every token is a pass over all of them: `steps` times the work.

  Args:
    tap: an `Editor.tap`.
    prompts: rows that are cut before their last token, without targets.
  """
  head, last = prompts.head, prompts.tail[:, :1]
  causal.checked(config, head.shape[-1] + 1 + steps)
  tail = jnp.pad(last, ((0, 0), (0, steps)), constant_values=-1)
  here = tap(state, jnp.full(len(head), head.shape[-1]))
  column = jnp.zeros_like(last)

  def step(tail: Array, i: Array) -> tuple[Array, Array]:
    log_p = inside.forward(config, backbone, Rows(head, tail, column + i, column), here)[:, 0]
    drawn = jax.random.categorical(jax.random.fold_in(key, i), log_p).astype(jnp.int32)
    return tail.at[:, i + 1].set(drawn), drawn

  return jax.lax.scan(step, tail, jnp.arange(steps))[1].T


def fluency(tokens: Sequence[Sequence[int]]) -> float:
  """Mean over texts of the weighted mean entropy of their pairs and triples of tokens, in bits: H_2 / 3 +
  2/3 H_3 (Zhang et al., NeurIPS 2018; github.com/kmeng01/rome takes the mean of 2/3 H_2 and 4/3 H_3).
  Repetition makes it fall."""
  return float(np.mean([(_entropy(t, 2) + 2 * _entropy(t, 3)) / 3 for t in tokens]))


def _entropy(tokens: Sequence[int], n: int) -> float:
  counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
  total = sum(counts.values())
  return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def consistency(texts: Sequence[str], references: Sequence[str]) -> float | None:
  """Mean cosine of the TF-IDF vectors of texts and the references of each, both given text by text.

  Term counts times log((1 + n) / (1 + documents with the term)) + 1 over all that is given. None where no
  text has a reference.
  """
  pairs = [(a, b) for a, b in zip(texts, references, strict=True) if b]
  if not pairs:
    return None
  documents = [Counter(re.findall(r'\w+', text.lower())) for pair in pairs for text in pair]
  frequency = Counter(word for d in documents for word in d)
  n = len(documents)
  weight = {w: math.log((1 + n) / (1 + c)) + 1 for w, c in frequency.items()}

  def cosine(a: Counter, b: Counter) -> float:
    dot = sum(a[w] * b[w] * weight[w] ** 2 for w in a.keys() & b.keys())
    sizes = [math.sqrt(sum((c * weight[w]) ** 2 for w, c in d.items())) for d in (a, b)]
    return dot / (sizes[0] * sizes[1]) if all(sizes) else 0.0

  return float(
    np.mean([cosine(a, b) for a, b in zip(documents[::2], documents[1::2], strict=True)])
  )


def references(edits: Sequence[Edit], known: Sequence[Edit]) -> list[str]:
  """For each edit what is said of other subjects that really have its target: prompts, with it behind."""
  said: dict[str, list[str]] = {}
  for e in known:
    said.setdefault(e.truth, []).append(f'{e.text} {e.truth}.')
  return [' '.join(said.get(e.target, [])) for e in edits]


def perplexity(
  config: Config, backbone: Tree, blocks: Array | np.ndarray, state: Any = (), tap: Any = None
) -> float:
  """e to the mean -log p of all tokens but the first of blocks i32[n, L]."""
  return float(np.exp(-_log_likelihood(config, backbone, jnp.asarray(blocks), state, tap)))


def _log_likelihood(config, backbone, blocks: Array, state, tap) -> float:
  """Every block as a row without a head, all of whose tokens but the first are the target."""
  n, length = blocks.shape
  columns = jnp.broadcast_to(jnp.arange(length - 1), (n, length - 1))
  rows = Rows(jnp.zeros((n, 0), jnp.int32), blocks, columns, blocks[:, 1:])
  total = 0.0
  for lo in range(0, n, 8):
    part = Rows(*(a[lo : lo + 8] for a in rows))
    total += float(_sum(config, tap, backbone, state, part))
  return total / (n * (length - 1))


def _sum_fn(config, tap, backbone, state, rows: Rows) -> Array:
  taps = (
    {} if tap is None else {'tap': tap(state, jnp.full(len(rows.head), rows.tail.shape[1] - 1))}
  )
  log_p = inside.forward(config, backbone, rows, **taps)
  return inside.target_log_p(log_p, rows.target).sum()


_sum = jax.jit(_sum_fn, static_argnums=(0, 1))
