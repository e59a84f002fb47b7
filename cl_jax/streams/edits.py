"""Streams of edit requests: CounterFact, zsRE and known facts as `editing.rows.Edit`s, from lines of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_jax.editing.rows import Edit
from cl_jax.errors import UserError

FILES = {'counterfact': 'counterfact_2000', 'zsre': 'zsre_1000', 'known': 'known_1000'}


def load(folder: str | Path, name: str, seed: int = 0) -> tuple[list[Edit], list[tuple[str, str]]]:
  """The edits of folder/NAME.jsonl in their order, and (case, reason) of records that are none.

  'counterfact' (Meng et al., NeurIPS 2022): the truth is compared with a false target. 'zsre' (Levy et al.,
  CoNLL 2017, in the form of Mitchell et al., ICLR 2022): the target is the first answer, there is no truth to
  compare with, and the neighbour is a question of another set. 'known' (Meng et al. 2022): facts; the target
  is the attribute of another fact of the same relation, drawn by `seed`, and neighbours are other subjects
  that have the same attribute. Or FILE.jsonl: objects with the fields of `Edit`, of which prompt, subject and
  target must be there.

  Of CounterFact the prepared file has one paraphrase and one neighbour a record; further neighbours are
  prompts of other records with the same relation and truth (as the file's README says).

  Raises:
    UserError: an unknown name, an absent file, or one that is not lines of JSON.
  """
  own = name.endswith('.jsonl')
  if name not in FILES and not own:
    raise UserError(f'there are no edits {name!r}: use {", ".join(FILES)}, or FILE.jsonl')
  file = Path(name) if own else Path(folder) / f'{FILES[name]}.jsonl'
  if not file.is_file():
    where = '' if own else '; --data_dir names the folder above edit/'
    raise UserError(f'there are no edits at {file}{where}')
  records = []
  try:
    for i, line in enumerate(file.read_text('utf-8').splitlines()):
      records.append(json.loads(line))
      if not isinstance(records[-1], dict):
        raise UserError(f'{file}: line {i + 1} is no JSON object')
  except (OSError, ValueError) as error:
    raise UserError(f'{file}: line {len(records) + 1} cannot be read ({error})') from error
  if name == 'known':
    return _known(records, seed)
  return _each(records, _own if own else _counterfact if name == 'counterfact' else _zsre)


def _each(
  records: Sequence[dict[str, Any]], read: Callable[[int, dict[str, Any]], Edit]
) -> tuple[list[Edit], list[tuple[str, str]]]:
  edits, refused = [], []
  for i, record in enumerate(records):
    try:
      edits.append(read(i, record))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
      refused.append((str(record.get('case_id', i)), f'the record lacks {error}'))
    except UserError as error:
      refused.append((str(record.get('case_id', i)), str(error)))
  return edits, refused


def _own(i: int, record: dict[str, Any]) -> Edit:
  given = {'case': str(i), **{k: v for k, v in record.items() if v is not None}}
  if odd := sorted(set(given) - {f.name for f in dataclasses.fields(Edit)}):
    raise UserError(f'{odd[0]!r} is no field of a fact')
  for field in dataclasses.fields(Edit):
    value = given.get(field.name)
    if value is None:
      continue
    if field.name == 'portability':
      if not isinstance(value, list) or not all(_texts(p) and len(p) == 2 for p in value):
        raise UserError('portability must be a list of [prompt, answer]')
      given['portability'] = tuple((prompt, answer) for prompt, answer in value)
    elif field.name in ('paraphrases', 'neighbours', 'answers'):
      if not _texts(value):
        raise UserError(f'{field.name} must be a list of texts')
      given[field.name] = tuple(value)
    elif not isinstance(value, str):
      raise UserError(f'{field.name} must be a text')
  missing = [name for name in ('prompt', 'subject', 'target') if name not in given]
  if missing:
    raise UserError(f'{missing[0]} is missing')
  edit = Edit(**given)
  if edit.answers and len(edit.answers) != len(edit.neighbours):
    raise UserError(f'{len(edit.answers)} answers for {len(edit.neighbours)} neighbours')
  if edit.neighbours and not edit.answers and not edit.truth:
    raise UserError('neighbours need answers, or the fact a truth, which is then theirs')
  return edit


def _texts(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _counterfact(i: int, record: dict[str, Any]) -> Edit:
  wanted = record['requested_rewrite']
  return Edit(
    wanted['prompt'],
    wanted['subject'],
    wanted['target_new']['str'],
    wanted['target_true']['str'],
    tuple(record['paraphrase_prompts']),
    tuple(record['neighborhood_prompts']),
    case=str(record['case_id']),
  )


def _zsre(i: int, record: dict[str, Any]) -> Edit:
  return Edit(
    _template(record['src'], record['subject']),
    record['subject'],
    record['answers'][0],
    '',
    (record['rephrase'],),
    (record['loc'] + '?',),
    (record['loc_ans'],),
    case=str(i),
  )


def _template(prompt: str, subject: str) -> str:
  if prompt.count(subject) != 1:
    raise UserError(f'the subject {subject!r} must occur once in {prompt!r}')
  return prompt.replace(subject, '{}')


def _known(
  records: Sequence[dict[str, Any]], seed: int
) -> tuple[list[Edit], list[tuple[str, str]]]:
  draw, keys = np.random.default_rng(seed), ('relation_id', 'subject', 'attribute', 'prompt')
  groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
  for record in records:
    # One that is refused below must not take others with it.
    if all(isinstance(record.get(k), str) for k in keys):
      groups[record['relation_id']].append(record)

  def read(i: int, record: dict[str, Any]) -> Edit:
    group = groups[record['relation_id']]
    others = sorted({r['attribute'] for r in group} - {record['attribute']})
    target = others[draw.integers(len(others))] if others else ''
    # What is true of the fact's own answer alone: the other subjects that have it.
    same = [r for r in group if r['attribute'] == record['attribute']]
    same = [r for r in same if r['subject'] != record['subject']]
    picked = [same[j] for j in draw.permutation(len(same))[:5]]
    if not others:
      raise UserError(f'no other attribute of the relation {record["relation_id"]}')
    return Edit(
      _template(record['prompt'], record['subject']),
      record['subject'],
      target,
      record['attribute'],
      (),
      tuple(r['prompt'] for r in picked),
      case=str(record['known_id']),
    )

  return _each(records, read)
