"""The command line: flags, the configuration and its overrides."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_dict, config_flags

from cl_jax.errors import UserError
from cl_jax.report.lines import flat
from experiments import config as configs
from experiments import fields

OPTIONS = """\
  --config=FILE[:ARG]      a configuration (configs/NAME.py, or the config.json of an earlier run);
                           ARG goes to its get_config, often words: scenario,method,method
  --config.FIELD=VALUE     overrides a field; with --help as well, every field is listed
  --workdir=DIR            checkpoints, results.jsonl, report.html; repeat the command to resume
  --data_dir=DIR           where data sets are (default: the variable CL_JAX_DATA)
  --save_every=SECONDS     between checkpoints inside a task (60)
  --width=N                runs computed at once on a device: a number, `auto` (1 on a CPU, all elsewhere)
                           or `measure`, the fastest of a few by a short measurement that is kept (auto)
  --writers=NAME[,NAME]    accuracies and costs also to tensorboard (DIR/tensorboard), wandb (offline)
  --shard=data|fsdp        one run at a time over all devices: the batch cut, or weights and moments as well
  --processes=N            with --shard: N processes, started here; or on other machines, each by the same
                           command with --process=I --coordinator=HOST:PORT (or --coordinator=auto in Slurm)
  --offline                make any attempt to reach the network an error
  --debug                  show tracebacks and the libraries' own messages
exit codes: 0 done; 2 your mistake (one line says which); 3 stopped by NaN or a fault, the last good
state is kept; 128 + n stopped by signal n, state saved
"""


SPREADING = ('experiments.run', 'experiments.launch')


class Spread(NamedTuple):
  """--shard, --processes, --process and --coordinator: how one run is spread over devices and processes."""

  shard: str
  processes: int
  process: int | None
  coordinator: str


class Options(NamedTuple):
  """The command line.

  Attributes:
    config: resolved, without `sweep`.
    raw: as far as it was given: what `config.override` starts from.
    sweep: {dotted field: values}.
    workdir, data_dir, save_every, width, offline, debug: the flags; a width of 0 is `measure`.
    command: the line itself.
    spread: --shard and what belongs to it.
    writers: see `experiments.scalars`.
  """

  config: dict[str, Any]
  raw: dict[str, Any]
  sweep: dict[str, tuple]
  workdir: Path
  data_dir: str | None
  save_every: float
  width: int | None
  offline: bool
  debug: bool
  command: str
  spread: Spread
  writers: tuple[str, ...] = ()


def parse(argv: Sequence[str], program: str, about: str) -> Options:
  """Reads a command line.

  Raises:
    Help: with --help.
    UserError: anything that is not understood.
  """
  rest, source, overrides = [], None, []
  words = iter(argv)
  for word in words:
    name, equals, value = word.partition('=')
    name = re.sub('^--?', '--', name)
    if name == '--config' or name.startswith('--config.'):
      if not equals:
        value = next(words, '')
        if not value or value.startswith('--'):
          raise UserError(f'{name} needs a value: {name}=VALUE')
      if name == '--config':
        source = value
      else:
        overrides.append((name.removeprefix('--config.'), value))
    else:
      rest.append(word)
  values: Any = _flags(program)
  try:
    left = values([program, *rest])[1:]
  except flags.Error as error:
    raise UserError(f'{error} (see --help)') from error
  usage = (
    f'{about}\nusage: python -m {program} --config=FILE[:ARG] --workdir=DIR [options]\n{OPTIONS}'
  )
  if values.help and source is None:
    raise Help(usage)
  if left:
    raise UserError(f'{left[0]!r} is not understood: options begin with -- (see --help)')
  if source is None:
    raise UserError(
      '--config is missing: name a configuration, for example configs/split_fashion.py'
    )
  raw = configs.load(source)
  resolved, raw, sweep = overridden(raw, overrides)
  if values.help:
    listed = (f'  --config.{k}={v!r}' for k, v in flat(resolved).items())
    raise Help(f'{usage}fields of {source}:\n' + '\n'.join(listed) + '\n')
  if not values.workdir:
    raise UserError('--workdir is missing: name a directory for checkpoints and results')
  if not 0 <= values.save_every < float('inf'):
    raise UserError(f'--save_every must be a number of seconds; got {values.save_every}')
  return Options(
    resolved,
    raw,
    sweep,
    Path(values.workdir).expanduser(),
    values.data_dir,
    values.save_every,
    _width(values.width),
    values.offline,
    values.debug,
    f'python -m {program} ' + ' '.join(map(shlex.quote, argv)),
    _spread(values, program),
    tuple(values.writers),
  )


def _spread(values: Any, program: str) -> Spread:
  given = Spread(values.shard, values.processes, values.process, values.coordinator)
  if given == Spread('', 1, None, ''):
    return given
  if not given.shard:
    raise UserError('--processes, --process and --coordinator need --shard=data or --shard=fsdp')
  if program not in SPREADING:
    raise UserError(
      f'--shard is for {" and ".join(SPREADING)}: {program} maps many runs over devices'
    )
  host, _, port = given.coordinator.rpartition(':')
  if given.coordinator not in ('', 'auto') and not (host and port.isdecimal()):
    raise UserError(f'--coordinator must be HOST:PORT or auto; got {given.coordinator!r}')
  if (given.process is None) != (given.coordinator in ('', 'auto')):
    raise UserError('--process=I and --coordinator=HOST:PORT go together, on every machine')
  if given.process is not None and not 0 <= given.process < given.processes:
    raise UserError(f'--process must be from 0 to {given.processes - 1}; got {given.process}')
  return given


def fields_of(words: Sequence[str]) -> list[tuple[str, str]]:
  """(dotted field, text) of words --config.FIELD=VALUE, of commands whose other words argparse has taken.

  Raises:
    UserError: another word.
  """
  found = []
  for word in words:
    name, equals, value = word.partition('=')
    if not name.startswith('--config.') or not equals:
      raise UserError(f'{word!r} is not understood: fields are set by --config.FIELD=VALUE')
    found.append((name.removeprefix('--config.'), value))
  return found


def _width(text: str) -> int | None:
  if text in ('auto', 'measure'):
    return None if text == 'auto' else 0
  if not text.isdecimal() or not int(text):
    raise UserError(f'--width must be auto, measure or a positive number of runs; got {text!r}')
  return int(text)


def _flags(program: str) -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, '', flag_values=values)
  flags.DEFINE_string('data_dir', None, '', flag_values=values)
  flags.DEFINE_float('save_every', 60.0, '', flag_values=values)
  flags.DEFINE_string('width', 'auto', '', flag_values=values)
  flags.DEFINE_list('writers', '', '', flag_values=values)
  flags.DEFINE_enum('shard', '', ['', 'data', 'fsdp'], '', flag_values=values)
  flags.DEFINE_integer('processes', 1, '', flag_values=values, lower_bound=1)
  flags.DEFINE_integer('process', None, '', flag_values=values)
  flags.DEFINE_string('coordinator', '', '', flag_values=values)
  flags.DEFINE_bool('offline', False, '', flag_values=values)
  flags.DEFINE_bool('debug', False, '', flag_values=values)
  flags.DEFINE_bool('help', False, '', flag_values=values)
  return values


def known(program: str) -> list[str]:
  """The names of the options, without --config."""
  return list(_flags(program))


def overridden(
  raw: dict[str, Any], overrides: Sequence[tuple[str, str]]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, tuple]]:
  """(the resolved configuration, the one to override further, its sweep).

  Texts become values by the type of the field, as ml_collections does it. Fields that decide which
  fields there are come first, tuples and None are read here.
  """
  later = []
  for dotted, text in overrides:
    if dotted == 'sweep':
      raw = configs.override(raw, 'sweep', _literal(dotted, text))
    elif dotted == 'methods':
      raw = configs.override(raw, dotted, _tuple(text))
    elif dotted in ('model.name', 'model.pretrained', 'optimizer.name'):
      raw = configs.override(raw, dotted, text)
    else:
      later.append((dotted, text))
  sweep = dict(raw.get('sweep') or {})
  raw = {k: v for k, v in raw.items() if k != 'sweep'}
  chosen = configs.methods_of(raw)
  raw = written(configs.schema_of(raw, chosen), raw, later, chosen)
  return configs.resolve(raw), raw, sweep


def written(
  schema: dict[str, Any],
  raw: dict[str, Any],
  overrides: Sequence[tuple[str, str]],
  chosen: tuple[str, ...] = (),
) -> dict[str, Any]:
  """The configuration with the values of (dotted field, text) pairs, read by the types of the fields."""
  texts = []
  for dotted, text in overrides:
    entry = configs.entry(schema, dotted, chosen)
    if isinstance(entry, dict):
      raise UserError(f'config.{dotted} has fields of its own: set one of {", ".join(entry)}')
    if text == 'None':
      raw = configs.override(raw, dotted, fields.fit(f'config.{dotted}', None, entry))
    elif entry.types == (tuple,) or (tuple in entry.types and text.startswith('(')):
      raw = configs.override(raw, dotted, _tuple(text))
    elif entry.types == (str,):
      # As it is: ml_collections takes `update.channels` for a method of its own.
      raw = configs.override(raw, dotted, text)
    else:
      texts.append((dotted, text))
  for dotted, value in _typed(schema, raw, texts).items():
    raw = configs.override(raw, dotted, value)
  return raw


def _typed(schema: Any, raw: Any, texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """{field: value} of texts, through ml_collections' flags."""
  if not texts:
    return {}
  values: Any = flags.FlagValues()
  argv = ['', *(f'--config.{dotted}={text}' for dotted, text in texts)]
  tree = config_dict.ConfigDict(_holes(schema))
  try:
    config_flags.DEFINE_config_dict('config', tree, flag_values=values, sys_argv=argv)
    values(argv)
  except (flags.Error, ValueError, TypeError) as error:
    raise UserError(str(error).replace('flag --config.', 'config.')) from error
  return dict(values['config'].override_values)


def _holes(schema: Any) -> Any:
  """The schema as ml_collections wants it: a typed placeholder per field."""
  if isinstance(schema, dict):
    return {k: _holes(v) for k, v in schema.items()}
  kind = str if str in schema.types else schema.types[0]
  return config_dict.placeholder(kind)


def _literal(dotted: str, text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError) as error:
    raise UserError(f'config.{dotted}={text} is not a Python literal ({error})') from error


def _tuple(text: str) -> tuple:
  """'(1, 2)', '1,2', '1' and 'a,b' as tuples."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError):
    return tuple(part.strip() for part in text.split(',') if part.strip())
  return tuple(value) if isinstance(value, tuple | list) else (value,)


class Help(Exception):
  """The help was asked for; the message is its text."""
