"""Edits as a file: every term that was written to a model, to undo some and to write the others again."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from cl_jax import checkpoint
from cl_jax.editing import kept, write
from cl_jax.editing.rows import Edit
from cl_jax.editing.write import Write
from cl_jax.errors import UserError
from cl_jax.models import decoder
from experiments import edit_state
from experiments.edit_subject import Subject, opened

STATEFUL = ('none', 'grace', 'wise')  # editors that leave the weights as they are

Batch = tuple[Sequence[Edit], Sequence[Write]]  # that were written together


def writable(
  chosen: Mapping[str, Any], subject: Subject, model: Path | None, edits: Path | None
) -> None:
  """Refuses to write an edited model, or edits, that there will not be.

  Raises:
    UserError: before anything was computed.
  """
  for option, wanted in (('--save_model', model), ('--save_edits', edits)):
    if wanted is None:
      continue
    if chosen['apart']:
      raise UserError(f'{option}: with config.apart every batch has a model of its own')
    if chosen['editor'] in STATEFUL:
      raise UserError(
        f'{option}: {chosen["editor"]} writes no weights, it changes the forward pass'
      )
    if len(chosen['seeds']) > 1:
      raise UserError(f'{option}: each of config.seeds={chosen["seeds"]} edits a model: take one')
    if option == '--save_model':
      decoder.writable(subject.config)
    elif not chosen['undo']:
      raise UserError(f'{option}: config.undo=False sums terms up, and none of them can be undone')


def save(path: Path, model: str, subject: Subject, editor: str, batches: Sequence[Batch]) -> None:
  """Replaces the file.

  Args:
    model: the name of the model that was edited, as `opened` takes it.
    batches: in the order in which they were written.
  """
  edits = [[i, e.case, e.text, e.target] for i, (facts, _) in enumerate(batches) for e in facts]
  terms, arrays = edit_state.packed([w for _, writes in batches for w in writes])
  counts = [len(writes) for _, writes in batches]
  about = {'what': 'edits', 'version': 1, 'model': model, 'editor': editor, 'counts': counts}
  about |= {'backbone': checkpoint.digest(subject.backbone), 'edits': edits, 'terms': terms}
  path.parent.mkdir(parents=True, exist_ok=True)
  kept.save(path, about, arrays)


def rebuild(path: Path, without: Collection[int], out: Path, model: str | None = None) -> str:
  """Writes the model with all batches but some; a line about it.

  Without the last ones it has the bits that it had before them, on the same kind of device. What was written
  after one that is taken out stays as it is, though it was found in a model that had it; so does what an
  editor keeps in its own state (AlphaEdit's keys), which the file does not have.

  Args:
    without: numbers of batches, from 0; of all of them the first model is left.
    model: where the file's own is now, if not where it was.

  Raises:
    UserError: no such batch, another model than was edited, or a damaged file.
  """
  if not path.is_file():
    raise UserError(f'there is no file {path}: experiments.edit --save_edits=FILE writes one')
  about, arrays = kept.load(path)
  kept.same(path, about, {'what': 'edits', 'version': 1})
  n = len(about['counts'])
  if odd := sorted(set(without) - set(range(n))):
    raise UserError(f'{path} has batches 0 to {n - 1}; there is no {odd[0]} to be left out')
  subject = opened(model or about['model'])
  kept.same(path, about, {'backbone': checkpoint.digest(subject.backbone)})
  terms = iter(edit_state.unpacked(about['terms'], arrays))
  batches = [list(itertools.islice(terms, count)) for count in about['counts']]
  edited = write.undone(subject.backbone, batches, without)
  decoder.save(out, subject.config, edited, subject.file)
  left = sum(e[0] not in without for e in about['edits'])
  return f'{out}: {left} of {len(about["edits"])} edits by {about["editor"]}'
