"""The table of methods in docs/methods.md, from the code: `python -m tools.method_table [--write]`.

Hooks and needs are read off the `Method` that each factory returns, passes and bytes are measured on a
small network, state formulas are the "State:" sentences of the docstrings, tolerances come from
tests/parity, what keeps a method from a device from tests/edge, reproduced figures from
results/published.csv. Without --write the command only says whether the committed table is current.
"""

from __future__ import annotations

import argparse
import ast
import csv
import inspect
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from cl_jax import methods
from cl_jax.budget import passes, state_bytes
from cl_jax.learner import learner
from cl_jax.models.mlp import mlp
from cl_jax.models.vit import TINY, vit
from cl_jax.types import Batch, Method, Model
from tools.pages import fill, update

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs/methods.md'
MAKER = 'tools/method_table.py'
COLUMNS = (
  'method', 'family', 'hooks', 'needs', 'state', 'bytes', 'passes: forward, backward, predict', 'parity',
  'C99', 'reproduced',
)  # fmt: skip

# What the measured learner is: an MLP 784-100-10 on 5 tasks in batches of 10; for prompts and
# adapters, which no MLP takes, a ViT of 6 layers and width 192 with patches of 4 pixels.
CLASSES, TASKS, BATCH = 10, 5, 10
TASK_CLASSES = tuple((2 * t, 2 * t + 1) for t in range(TASKS))
REQUIRED = {
  'classes': CLASSES,
  'tasks': TASKS,
  'task_classes': TASK_CLASSES,
  'steps_per_epoch': 10,
}
# Rows of published tables that are named after the memory of experience replay.
WRITERS = {'ring': 'er', 'reservoir': 'er', 'mof': 'er', 'kmeans': 'er'}
# Where the defaults do not fit that network: arguments by method.
ARGUMENTS = {
  'lora': {'targets': 'l0/w'},
  'olora': {'targets': 'l0/w'},
  'sdlora': {'targets': 'l0/w'},
  'inflora': {'targets': 'l0/w'},
  'latent': {'tap': 'l0'},
  'remind': {'tap': 'l0', 'codebooks': 25},
}


def network(name: str) -> Model:
  if '.prompts.' in methods.names()[name] or name in ('adapter', 'ease', 'partial'):
    return vit(TINY._replace(image=28, channels=1), CLASSES)
  return mlp((100,), CLASSES)


def make(name: str) -> Method:
  """The method with its default arguments, and those of `REQUIRED` that it has no default for."""
  factory = methods.find(name)
  arguments = dict(ARGUMENTS.get(name, {}))
  for parameter in inspect.signature(factory).parameters.values():
    if parameter.default is parameter.empty and parameter.name not in arguments:
      if parameter.name not in REQUIRED:
        raise SystemExit(
          f'{name}: no value for its argument {parameter.name!r}; add one to tools/method_table.py'
        )
      arguments[parameter.name] = REQUIRED[parameter.name]
    if parameter.name == 'wires':
      arguments['wires'] = network(name).wires
  return factory(**arguments)


def hooks(method: Method) -> list[str]:
  """The names of the hooks that are not the identity."""
  defaults = Method._field_defaults
  return [n for n in Method._fields if n != 'needs' and getattr(method, n) is not defaults[n]]


def state_sentence(name: str) -> str:
  """The docstring's account of what is kept between steps."""
  text = re.sub(r'\s+', ' ', methods.find(name).__doc__ or '')
  found = re.search(r'State: (.+?)\.(?: |$)', text)
  if found is None:
    raise SystemExit(f'{name}: its docstring has no sentence "State: ..."')
  return found[1]


def measure(name: str) -> tuple[int, dict[str, float]]:
  """(bytes that the method adds to the naive learner's state, passes per step)."""
  model, method = network(name), make(name)
  batch = Batch(
    jnp.zeros((BATCH, 28, 28, 1), jnp.uint8),
    jnp.arange(BATCH, dtype=jnp.int32) % CLASSES,
    jnp.ones(BATCH),
    jnp.zeros(BATCH, jnp.int32),
  )

  def build(model, own):
    return learner(model, optax.sgd(0.1), method if own is None else own)

  shape = lambda own: jax.eval_shape(build(model, own).init, jax.random.key(0), batch)  # noqa: E731
  state = shape(None)
  added = state_bytes(state)['total'] - state_bytes(shape(Method()))['total']
  return added, passes(lambda scoped: build(scoped, None), model, state, batch)


def tolerances() -> dict[str, float]:
  """{method: largest relative tolerance of the tests in tests/parity that carry its name}."""
  found: dict[str, float] = {}
  folder = ROOT / 'tests/parity'
  functions_of = lambda path: [  # noqa: E731
    n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)
  ]
  shared = functions_of(folder / 'shared.py')
  default = next((d for f in shared if f.name == 'close' for d in f.args.defaults), None)
  for path in sorted(folder.glob('test_*.py')):
    functions = functions_of(path)
    for function in functions:
      used = [
        k.value.value
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for k in call.keywords
        if k.arg == 'rtol' and isinstance(k.value, ast.Constant)
      ]
      if isinstance(default, ast.Constant):
        used.append(default.value)
      for name in methods.names():
        if used and re.match(rf'test_{name}(_|$)', function.name):
          found[name] = max(found.get(name, 0.0), *map(float, used))
  return found


def refused() -> dict[str, str]:
  """{method: the operation that keeps it from C99}; the tests of tests/edge run every other one."""
  path = ROOT / 'tests/edge/test_c99_learners.py'
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'REFUSED':
      return ast.literal_eval(node.value)
  raise SystemExit(f'{path}: no table REFUSED')


def reproduced() -> dict[str, list[str]]:
  """{method: its published accuracies that were run again}, the first of each table and scenario."""
  path = ROOT / 'results/published.csv'
  found: dict[str, dict[str, str]] = {}
  if path.exists():
    with path.open(newline='') as file:
      for row in csv.DictReader(file):
        if row['ours'] and row['published'] and row['metric'] == 'acc':
          name = re.split(r'[^a-z0-9]+', row['method'].lower())[0]
          place = f'{row["table"]} {row["scenario"]}'
          text = f'{place}: {row["ours"]} (paper {row["published"]})'
          found.setdefault(WRITERS.get(name, name), {}).setdefault(place, text)
  return {name: list(places.values()) for name, places in found.items()}


def table() -> str:
  """The table in Markdown."""
  tolerance, figures, without = tolerances(), reproduced(), refused()
  lines = ['| ' + ' | '.join(COLUMNS) + ' |', '|' + '---|' * len(COLUMNS)]
  for name, module in methods.names().items():
    method, (size, cost) = make(name), measure(name)
    family = module.split('.')[-2]
    link = f'../{module.replace(".", "/")}.py'
    cells = (
      f'[`{name}`]({link})',
      family,
      ', '.join(f'[{h}](hooks/{h}.md)' for h in hooks(method)),
      ', '.join(method.needs) or 'nothing',
      state_sentence(name),
      f'{size:,}',
      ', '.join(
        f'{cost[k]:.2f}'.rstrip('0').rstrip('.')
        for k in ('train_forward', 'train_backward', 'predict_forward')
      ),
      f'{tolerance[name]:.0e}'.replace('e-0', 'e-') if name in tolerance else '',
      f'no: {without[name]}' if name in without else 'yes',
      '; '.join(figures.get(name, ())),
    )
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(description='the table of methods in docs/methods.md')
  parser.add_argument('--write', action='store_true', help='write it instead of comparing')
  write = parser.parse_args().write
  return update({PAGE: fill(PAGE.read_text(), MAKER, table())}, write, 'docs')


if __name__ == '__main__':
  sys.exit(main())
