"""Product-quantised rows: what k-means learns on the way, what a code costs, and what is refused."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax import budget, codecs, product, quantise
from cl_jax.errors import UserError
from tests.compiling import quick

learn = quick(product.learn)


def shown(f: product.Form, books: product.Books, x) -> tuple[codecs.Rows, np.ndarray]:
  """The rows as codes, and what these mean."""

  def both(books, x):
    made = product.encode(f, product.used(books), x)
    return made, product.decode(product.used(books), made)

  made, back = quick(both)(books, jnp.asarray(x))
  return made, np.asarray(back)


def test_names():
  assert product.form('pq7x12') == (7, 12, 'pq7x12') and product.form('int4') is None
  for wrong in ('pq0x4', 'pq4x1', 'pq4x257'):
    with pytest.raises(UserError, match=f"'{wrong}': pqMxK has M >= 1 .* K = 2 to 256"):
      product.form(wrong)
  with pytest.raises(UserError, match='pq3x4: rows of 8 numbers cannot be cut into 3 equal parts'):
    product.blank(product.Form(3, 4, 'pq3x4'), (4, 2))


def macqueen(rows: np.ndarray, words: int) -> list[np.ndarray]:
  """Of one part, written out: the members of each codeword."""
  members: list[list[np.ndarray]] = []
  for row in rows:
    far = [np.square(np.mean(m, 0) - row).sum() for m in members]
    if len(members) < words and (not far or min(far) > 0):
      members.append([row])
    else:
      members[int(np.argmin(far))].append(row)
  return [np.mean(m, 0) for m in members]


def test_codewords_are_the_means_of_what_they_were_given():
  """Against the definition, in batches; padding is no example, and a repeated one takes no codeword."""
  x = np.random.default_rng(0).normal(size=(40, 3, 2)).astype(np.float32)
  x[1] = x[0]
  w = np.ones(40, np.float32)
  w[[3, 20]] = 0
  f = product.Form(2, 4, 'pq2x4')
  books = product.begun(f, jnp.asarray(x))
  for i in range(0, 40, 8):
    books = learn(books, x[i : i + 8], w[i : i + 8])
  assert books.count.sum(1).tolist() == [38, 38] and (np.asarray(books.count) > 0).all()
  for part in range(2):
    rows = x.reshape(40, 2, 3)[w > 0, part].astype(np.float64)
    np.testing.assert_allclose(books.words[part], macqueen(rows, 4), atol=1e-5)


def test_the_first_examples_are_kept_as_they_are_and_unused_codewords_are_not_drawn():
  x = np.random.default_rng(1).integers(0, 256, (3, 4, 2)).astype(np.uint8)
  f = product.Form(4, 8, 'pq4x8')
  books = learn(product.begun(f, jnp.asarray(x)), x, np.ones(3))
  dark = np.zeros((1, 4, 2), np.uint8)  # nearest to a codeword that nothing was given to
  _, back = shown(f, books, np.concatenate([x, dark]))
  assert back.dtype == np.uint8
  np.testing.assert_array_equal(back[:3], x)
  assert all(back[3, p].tolist() in x[:, p].tolist() for p in range(4))


def test_the_error_falls_with_codewords_and_parts_and_the_bytes_are_those():
  x = np.random.default_rng(2).normal(size=(120, 12)).astype(np.float32)

  def error(parts, words):
    f = product.Form(parts, words, f'pq{parts}x{words}')
    books = learn(product.begun(f, jnp.asarray(x)), x, np.ones(120))
    made, back = shown(f, books, x)
    code = -(-parts // 2) if words <= 16 else parts
    assert budget.tree_bytes(made) == 120 * code == 120 * product.code_bytes(f)
    assert budget.tree_bytes(books) == 4 * 12 * words + 4 * parts * words
    return float(np.square(back - x).mean())

  by_words = [error(3, k) for k in (2, 17)]
  by_parts = [error(m, 16) for m in (1, 12)]
  assert by_words == sorted(by_words, reverse=True) and by_words[0] > 1.5 * by_words[-1]
  assert by_parts == sorted(by_parts, reverse=True) and by_parts[0] > 5 * by_parts[-1]


def test_leaves_that_are_no_numbers_stay():
  x = {'h': jnp.arange(12.0).reshape(3, 4), 'token': jnp.arange(3)}
  f = product.Form(2, 4, 'pq2x4')

  def both(x):
    books = product.learn_tree(product.begin_tree(f, x), x, jnp.ones(3))
    held = product.encode_tree(f, books, x)
    return books, held, product.decode_tree(books, held)

  books, held, back = quick(both)(x)
  assert isinstance(held['h'], codecs.Rows) and held['token'].dtype == x['token'].dtype
  jax.tree.map(partial(np.testing.assert_array_equal), back, x)
  np.testing.assert_array_equal(product.decode_tree(books, x)['h'], x['h'])


def test_codewords_begin_at_valid_rows_alone():
  """Where there are fewer than codewords some begin at the same row, and none at padding."""
  w = jnp.asarray([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
  at = np.asarray(quantise.starts(jax.random.key(0), w, 3, 5))
  assert [set(row) for row in at.tolist()] == [{1, 3, 4}] * 3
  whole = np.asarray(quantise.starts(jax.random.key(0), jnp.ones(6), 3, 5))
  assert all(len(set(row)) == 5 for row in whole.tolist())
