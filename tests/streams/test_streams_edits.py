"""Edit requests from lines of JSON."""

import json

import pytest

from cl_jax.editing.rows import Edit
from cl_jax.errors import UserError
from cl_jax.streams import edits

ZSRE = {
  'subject': 'Bonn', 'src': 'Who runs Bonn?', 'rephrase': 'Who was the head of Bonn?',
  'answers': ['Anna', 'Bert'], 'loc': 'nq question: who sang', 'loc_ans': 'Carla',
}  # fmt: skip
NEW, TRUE = {'str': 'Lima'}, {'str': 'Rome'}
WANTED = {'prompt': '{} lives in', 'subject': 'Anna', 'target_new': NEW, 'target_true': TRUE}
COUNTERFACT = {'case_id': 7, 'requested_rewrite': WANTED, 'paraphrase_prompts': ['Anna is in'],
               'neighborhood_prompts': ['Bert lives in', 'Carla lives in']}  # fmt: skip


def loaded(folder, name, records, seed=0):
  text = '\n'.join(json.dumps(record) for record in records)
  (folder / f'{edits.FILES[name]}.jsonl').write_text(text)
  return edits.load(folder, name, seed)


def without(record, key):
  return {k: v for k, v in record.items() if k != key}


def fact(i, relation, subject, attribute):
  return {'known_id': i, 'relation_id': relation, 'subject': subject, 'attribute': attribute,
          'prompt': f'{subject} is of'}  # fmt: skip


# 7 subjects in Asia, whose other continents are two; a relation whose attributes are all the same; one with a
# prompt that does not name its subject.
KNOWN = [
  *(fact(i, 'in', f'A{i}', 'Asia') for i in range(7)),
  fact(7, 'in', 'B7', 'Europe'), fact(8, 'in', 'B8', 'Africa'), fact(9, 'in', 'B9', 'Europe'),
  fact(10, 'is', 'C10', 'red'), fact(11, 'is', 'C11', 'red'), fact(12, 'by', 'D12', 'Asia'),
  fact(13, 'by', 'E13', 'Rome') | {'prompt': 'Who?'},
]  # fmt: skip


def test_counterfact(tmp_path):
  found, refused = loaded(tmp_path, 'counterfact', [COUNTERFACT, without(COUNTERFACT, 'case_id')])
  assert found == [
    Edit('{} lives in', 'Anna', 'Lima', 'Rome', ('Anna is in',),
         ('Bert lives in', 'Carla lives in'), case='7')
  ]  # fmt: skip
  assert refused == [('1', "the record lacks 'case_id'")]


OWN = {
  'prompt': '{} lives in', 'subject': 'Anna', 'target': 'Lima', 'truth': 'Rome',
  'paraphrases': ['Anna is in'], 'neighbours': ['Bert lives in'], 'answers': ['Oslo'],
  'portability': [['the country of Anna is', 'Peru']], 'case': 'first',
}  # fmt: skip


def test_facts_of_ones_own(tmp_path):
  """All fields, or the three that are needed; what is wrong is said of its record alone."""
  wrong = [
    (without(OWN, 'target'), 'target is missing'),
    (OWN | {'targets': 'x'}, "'targets' is no field"),
    (OWN | {'subject': 7}, 'subject must be a text'),
    (OWN | {'paraphrases': 'Anna is in'}, 'paraphrases must be a list'),
    (OWN | {'portability': [['x']]}, 'list of [prompt, answer]'),
    (OWN | {'portability': ['xy']}, 'list of [prompt, answer]'),
    (OWN | {'answers': ['a', 'b']}, '2 answers for 1 neighbours'),
    (without(without(OWN, 'answers'), 'truth'), 'neighbours need answers'),
  ]
  least = {k: OWN[k] for k in ('prompt', 'subject', 'target')} | {'truth': None}
  file = tmp_path / 'facts.jsonl'
  records = [OWN, least, *(record for record, _ in wrong)]
  file.write_text('\n'.join(map(json.dumps, records)))
  found, refused = edits.load(tmp_path / 'not here', str(file))
  assert found == [
    Edit('{} lives in', 'Anna', 'Lima', 'Rome', ('Anna is in',), ('Bert lives in',), ('Oslo',),
         (('the country of Anna is', 'Peru'),), 'first'),
    Edit('{} lives in', 'Anna', 'Lima', case='1'),
  ]  # fmt: skip
  for (_, why), (_, said) in zip(refused, wrong, strict=True):
    assert said in why
  with pytest.raises(UserError, match='no edits at .*none.jsonl$'):
    edits.load(tmp_path, f'{tmp_path}/none.jsonl')


def test_zsre(tmp_path):
  """The first answer is the target, and there is no truth; what is no request is refused by its number."""
  keys = ('subject', 'src', 'rephrase', 'answers', 'loc', 'loc_ans')
  odd = [ZSRE | {'src': 'Who?'}, ZSRE | {'src': 'Is Bonn Bonn?'}, ZSRE | {'answers': []}]
  found, refused = loaded(tmp_path, 'zsre', [*odd, *(without(ZSRE, k) for k in keys), ZSRE])
  assert found == [
    Edit('Who runs {}?', 'Bonn', 'Anna', '', ('Who was the head of Bonn?',),
         ('nq question: who sang?',), ('Carla',), case='9')
  ]  # fmt: skip
  once = "the subject 'Bonn' must occur once in "
  why = [f"{once}'Who?'", f"{once}'Is Bonn Bonn?'", 'the record lacks list index out of range']
  why += [f"the record lacks '{key}'" for key in ('subject', *keys[1:])]
  assert sorted(refused) == [(str(i), reason) for i, reason in enumerate(why)]


def test_known_facts_get_another_attribute_of_their_relation(tmp_path):
  found, refused = loaded(tmp_path, 'known', KNOWN)
  assert [e.case for e in found] == [*map(str, range(10)), '12']
  same = 'no other attribute of the relation is'
  once = "the subject 'E13' must occur once in 'Who?'"
  assert refused == [('10', same), ('11', same), ('13', once)]
  for e in found:
    record = KNOWN[int(e.case)]
    assert (e.prompt, e.subject, e.truth) == ('{} is of', record['subject'], record['attribute'])
    others = {'Rome'} if e.case == '12' else {'Asia', 'Europe', 'Africa'} - {e.truth}
    assert e.target in others
  assert {e.target for e in found[:7]} == {'Europe', 'Africa'}
  again, other = edits.load(tmp_path, 'known'), edits.load(tmp_path, 'known', 1)
  assert again == (found, refused) and [e.target for e in other[0]] != [e.target for e in found]


def test_neighbours_of_known_facts_have_the_same_attribute_of_the_same_relation(tmp_path):
  """At most five, in an order that is drawn; nobody is a neighbour of himself, asked in other words."""
  again = [fact(14 + i, 'in', 'A0', 'Asia') | {'prompt': f'{i}: A0 is in'} for i in range(3)]
  found, _ = loaded(tmp_path, 'known', [*KNOWN, *again])
  near = [e.neighbours for e in found if e.subject == 'A0']
  assert [*map(len, near)] == [5] * 4 and not any(
    'A0' in prompt for some in near for prompt in some
  )
  found, _ = loaded(tmp_path, 'known', KNOWN)
  asia = {f'A{i} is of' for i in range(7)}
  for e in found[:7]:
    assert len(set(e.neighbours)) == 5 and set(e.neighbours) <= asia - {f'{e.subject} is of'}
  assert len({e.neighbours for e in found[:7]}) == 7
  assert [e.neighbours for e in found[7:]] == [('B9 is of',), (), ('B7 is of',), ()]


@pytest.mark.parametrize('key', ['known_id', 'relation_id', 'subject', 'attribute', 'prompt'])
def test_a_known_fact_that_lacks_something_is_refused_alone(tmp_path, key):
  """Whether as an attribute or as a neighbour, what it lacks is no matter for the others."""
  odd = without(KNOWN[6], key)
  found, refused = loaded(tmp_path, 'known', [odd, *KNOWN[:6], *KNOWN[7:10]])
  assert [e.case for e in found] == ['0', '1', '2', '3', '4', '5', '7', '8', '9']
  assert refused == [('0', f"the record lacks '{key}'")]


def test_files_that_are_none_are_named(tmp_path):
  for name, text, message in (
    ('facts', '', "no edits 'facts': use counterfact, zsre, known"),
    ('known', '{}\n[]', 'line 2 is no JSON object'),
    ('zsre', '{}\n{', 'line 2 cannot be read'),
  ):
    (tmp_path / f'{edits.FILES.get(name, name)}.jsonl').write_text(text)
    with pytest.raises(UserError, match=message):
      edits.load(tmp_path, name)
  with pytest.raises(UserError, match='no edits at .*counterfact_2000.jsonl; --data_dir'):
    edits.load(tmp_path, 'counterfact')


@pytest.mark.parametrize('name, count', [('counterfact', 2000), ('zsre', 1000), ('known', 1208)])
def test_the_published_edits(data_dir, name, count):
  found, refused = edits.load(data_dir / 'edit', name)
  assert len(found) == count
  one = [('893', 'no other attribute of the relation P190')]
  assert refused == (one if name == 'known' else [])
  for e in found:
    assert e.prompt.count('{}') == 1 and e.subject and e.target and e.target != e.truth
    assert bool(e.truth) == (name != 'zsre') and len(e.answers) in (0, len(e.neighbours))
