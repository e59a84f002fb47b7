"""The rounds of an edit with an eye on the time and on signals: long ones are saved and go on there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax.editing import kept
from experiments.watch import Clock, Interrupted, Stop

FILE = 'rounds.npz'
T = TypeVar('T')


class Watched:
  """`cl_jax.editing.rounds.Rounds` that saves its carry every so often and when it is asked to stop."""

  def __init__(
    self, folder: Path, save_every: float, stop: Stop, tell: Callable[[str], None], whole: Clock
  ):
    self.path, self.save_every, self.stop, self.tell = folder / FILE, save_every, stop, tell
    # The clock of the run. While an edit lasts, what `save_rest` has said of it is behind.
    self.whole = whole

  def begin(self, edit: str, save_rest: Callable[[], None]) -> Clock:
    """What comes is one edit; returns the clock of it, which counts what earlier processes have spent.

    Args:
      edit: what distinguishes it from all others of this folder.
      save_rest: saves what was there before the edit, without which the carry is of no use.
    """
    self.edit, self.save_rest = edit, save_rest
    self.clock, self.last, self.rest_saved = Clock(), time.monotonic(), False
    return self.clock

  def __call__(self, name: str, n: int, carry: T, step: Callable[[int, T], T]) -> T:
    first, carry = self._restored(name, carry)
    for i in range(first, n):
      carry = jax.block_until_ready(step(i, carry))
      late = time.monotonic() - self.last > self.save_every
      if i + 1 < n and (self.stop() or late):
        self._save(name, i + 1, carry)
        self.tell(f'{i + 1}/{n} {name}, saved')
        if self.stop():
          said = f'stopped after {i + 1} of {n} {name}, saved in {self.path.parent}'
          raise Interrupted(self.stop(), said)
    return carry

  def _save(self, name: str, done: int, carry: object) -> None:
    if (
      not self.rest_saved
    ):  # it stays as it was while this edit lasts, and may be a hundred times the carry
      self.save_rest()
      self.rest_saved = True
    about = {'edit': self.edit, 'name': name, 'done': done, **self.clock.stand()}
    about['run_s'] = self.whole.wall()
    leaves = jax.tree.leaves(carry)
    kept.save(self.path, about, {f'carry{i}': np.asarray(a) for i, a in enumerate(leaves)})
    self.last = time.monotonic()

  def _restored(self, name: str, carry: T) -> tuple[int, T]:
    """(the round to go on with, its carry); (0, carry) where nothing of this loop was saved."""
    if not self.path.exists():
      return 0, carry
    about, arrays = kept.load(self.path)
    if (about['edit'], about['name']) != (self.edit, name):
      return 0, carry
    leaves, shape = jax.tree.flatten(carry)
    like = {f'carry{i}': (np.shape(a), a.dtype) for i, a in enumerate(leaves)}
    kept.fit(self.path, arrays, like)
    self.clock.add(about)
    self.whole.before = max(self.whole.before, about.get('run_s', 0.0))
    self.tell(f'goes on after {about["done"]} {name}')
    return about['done'], jax.tree.unflatten(shape, [jnp.asarray(arrays[a]) for a in like])
