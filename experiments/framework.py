"""Hyperparameters chosen task by task: `python -m experiments.framework --config=FILE[:ARG] --workdir=DIR`.

The framework of De Lange et al. (TPAMI 2022), on validation data of the current task alone: see
`cl_jax.framework`. `config.tuning` holds the grid of learning rates and the decay; `config.validation`
(0.2 unless set) is the fraction of the training data that is held out. Test data are looked at after
every choice, for the results only.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cl_jax import checkpoint, masks
from cl_jax.errors import Fault, UserError
from cl_jax.framework import Choice, Patience, Search, best_rate, decayed, until_no_better
from cl_jax.loop import Record, begin, evaluate, learn, strong
from cl_jax.streams.take import take
from cl_jax.sweep import MAPPED, SHARED, map_runs
from cl_jax.types import Learner, State, Stream, Tree
from configs.common import SEPARATE
from experiments import (
  build,
  capacity,
  cli,
  config,
  engine,
  results,
  scalars,
  show,
  tables,
  workdir,
)
from experiments.build import hyper
from experiments.job import all_finite
from experiments.options import Options, parse
from experiments.run import job
from experiments.watch import Clock, Interrupted, Stop

PROGRAM = 'experiments.framework'
ABOUT = "Chooses each task's learning rate and stability from its own validation data, resumes when repeated."
VALIDATION = 0.2

# The survey's first values (its section 5, "hyperparameters"); a method that is not here has none. In its
# code, Mattdl/CLsurvey, EWC's penalty is without our factor 1/2, so 400 there is 800 here, and distillation
# without our T^2 = 4: 10 there is 2.5 here. None: as configured. DER and DER++ are younger than the survey,
# and at the rates that plain fine-tuning chooses their squared differences can diverge.
START: dict[str, float | None] = {
  'ewc.coef': 800.0,
  'si.coef': 400.0,
  'mas.coef': 3.0,
  'lwf.coef': 2.5,
  'ebll.coef': 2.5,
  'ebll.beta': 1.0,
  'gem.margin': 1.0,
  'icarl.coef': 10.0,
  'packnet.prune': 0.9,
  'packnet.first': 0.9,
  'hat.smax': 800.0,
  'hat.coef': 2.5,
  'der.alpha': None,
  'derpp.alpha': None,
}
# What plasticity is searched with where a method replaces the loss, and fine-tuning's rate would not be its
# own: the method without what keeps it stable, as in the survey's code.
PLASTIC = {'icarl': {'icarl.coef': 0.0}}
# What predicts otherwise after a boundary than in training, so that no epoch of a task is its best one.
AT_BOUNDARIES = (
  'icarl',
  'gdumb',
  'imm',
  'packnet',
  'ease',
  'sprompts',
  'ncm',
  'slda',
  'ranpac',
  'fecam',
  'first_session',
)
# One of these counts in a task; the survey has one share for all tasks.
TOGETHER = (('packnet.prune', 'packnet.first'),)


def main(argv: Sequence[str] | None = None) -> int:
  return cli.guarded(PROGRAM, command, argv)


def command(argv: list[str]) -> int:
  options = parse(argv, PROGRAM, ABOUT)
  if options.sweep:
    raise UserError('config.sweep holds a grid: the framework chooses by itself; leave it out')
  build.resident(options.config, 'the framework')
  if not options.config['validation']:
    raw = config.override(options.raw, 'validation', VALIDATION)
    options = options._replace(raw=raw, config=config.resolve(raw))
  if options.config['scenario'] not in SEPARATE or options.config['evaluate'] != 'test':
    raise UserError(
      f'the framework goes from task to task (config.scenario one of {", ".join(SEPARATE)}) and '
      "validates by itself (config.evaluate='test')"
    )
  if options.config['tuning']['patience'] and options.config['iterations'] is not None:
    raise UserError('config.tuning.patience counts epochs: leave config.iterations out')
  late = [m for m in options.config['methods'] if m in AT_BOUNDARIES]
  if options.config['tuning']['patience'] and late:
    raise UserError(
      f'config.tuning.patience stops where validation data are answered best, and {late[0]} answers '
      'otherwise after the boundary: leave it at ()'
    )
  if options.config['optimizer']['schedule'] != 'constant':
    raise UserError(
      'config.optimizer.schedule counts the steps of one training, and the framework trains a task many '
      "times: leave it at 'constant'"
    )
  shown = show.make()
  with (
    cli.network(options.offline),
    workdir.claimed(options.workdir) as place,
    scalars.opened(options.writers, place) as out,
  ):
    try:
      workdir.remember(place, options.config)
      lines = run(options, place, shown)
      out.lines(lines)
    finally:
      shown.close()
    print(tables.table(lines), flush=True)
    print(choices_table(lines), flush=True)
    workdir.report(place, shown)
  return 0


def run(options: Options, place: Path, shown: show.Show) -> list[dict[str, Any]]:
  own = options.config
  sha = config.sha256(own)
  cli.devices(len(own['tuning']['rates']))
  held_out = {**own, 'evaluate': 'valid'}
  for seed in own['seeds']:
    if (sha, seed) in results.done(place):
      continue
    one = {'seeds': (seed,)}
    (setup,) = build.prepare({**own, **one}, options.data_dir, shown.say)
    (plain,) = build.prepare({**plain_of(held_out, setup), **one}, options.data_dir)
    (valid,) = build.prepare({**held_out, **one}, options.data_dir)
    tuned = Tuned(valid, plain.build, setup.streams[0], own)
    work = job(setup, place, sha)._replace(configs=[own])
    with Stop().listening() as stop:
      outcome, choices, steps = tuned.learn(seed, work, stop, shown)
    (line,) = results.lines(work, outcome, options.command)
    tuning = [c._asdict() for c in choices]
    results.append(place, [line | {'tuning': tuning, 'tuning_steps': steps}])
  return [line for line in results.read(place) if line['config_sha256'] == sha]


class Tuned:
  """The framework over one stream: what is compiled once, and the loop over tasks.

  Args:
    setup: of the method, with the validation data of each task as the stream's test data.
    plain: (hp, weights) -> Learner of the same network and optimiser without a method.
    test: the same stream with its test data, for the results.
    own: the configuration.
  """

  def __init__(self, setup: build.Setup, plain: Any, test: Stream, own: Mapping[str, Any]):
    self.setup, self.plain, self.own = setup, plain, own
    self.stream, self.test = jax.device_put(setup.streams[0]), jax.device_put(test.test)
    self.weights = jax.device_put(setup.weights)
    self.hp = hyper(setup.config, setup.streams[0])
    tuning = own['tuning']
    self.search = Search(
      tuning['rates'],
      tuning['first_rates'],
      tuning['drop'],
      tuning['decay'],
      tuning['attempts'],
      TOGETHER,
    )
    self.start = stability_of(own)
    self.plastic = {k: v for m in own['methods'] for k, v in PLASTIC.get(m, {}).items()}
    self.epochs, self.patience = own['epochs'], None
    if tuning['patience']:
      self.patience = Patience(*tuning['patience'])
    self.attempt = jax.jit(partial(attempt, setup.build, self.epochs, self.patience))
    self.programs: dict[int, Any] = {}
    self.report = jax.jit(lambda hp, s, test, w: evaluate(setup.build(hp, w), s, test))

  def learn(self, seed: int, work: Any, stop: Any, shown: show.Show):
    """(outcome, choices, steps of all trainings), from the latest checkpoint on."""
    key = jax.random.key(seed)
    first = take(self.stream, self.stream.index[0, 0], 0)
    state, _ = jax.jit(lambda hp, key, w: begin(self.setup.build(hp, w), key, self.stream, first))(
      self.chosen(()), key, self.weights
    )
    T = self.stream.tasks
    R, loss = (
      np.full((T, T), np.nan, np.float32),
      np.full(self.stream.index.shape[:2], np.nan, np.float32),
    )
    start = np.asarray(self.report(self.chosen(()), state, self.test, self.weights))
    clock, choices, steps = Clock(), [], 0
    found = checkpoint.restore(work.folder, (state, R, loss), work.sha256, shown.warn)
    if found is not None:
      state, R, loss = found.tree
      R, loss = np.array(R), np.array(loss)
      clock = Clock(found.extra['wall_s'], found.extra['compile_s'], found.extra['started'])
      choices = [Choice(**c) for c in found.extra['choices']]
      steps = found.extra['steps']
      shown.say(f'{work.name}, seed {seed}: going on from task {len(choices) + 1} of {T}')
    with clock.running():
      for t in range(len(choices), T):
        base = choices[-1].base if choices else self.start
        choice, (state, loss[t]), taken = self.task(
          state, t, base, partial(check, stop, work, seed, t)
        )
        choices.append(choice)
        steps += taken
        if not np.isfinite(choice.accuracy):
          raise Fault(
            f'{work.name}, seed {seed}: task {t} ends in NaN after {choice.attempts} attempts, the last with '
            f'{said(choice, t, T)}; the tasks before are saved'
          )
        R[t] = np.asarray(self.report(self.chosen(choices), state, self.test, self.weights))
        extra = {'choices': [c._asdict() for c in choices], 'steps': steps, **clock.stand()}
        checkpoint.save(work.folder, t + 1, (state, R, loss), work.sha256, extra)
        shown.say(f'{work.name}, seed {seed}: {said(choice, t, T)}')
    host = jax.tree.map(lambda a: a if checkpoint.is_key(a) else np.asarray(a), state)
    arrays: tuple[Any, ...] = (start, R, loss, np.zeros((T, 0, T), np.float32))
    record = Record(*arrays)
    return engine.Outcome([host], [record], clock, {}), choices, steps

  def chosen(self, choices: Sequence[Choice]) -> Tree:
    """The hyperparameters that the model predicts with: those of the last choice, at first the start."""
    stability = choices[-1].stability if choices else self.start
    return with_values(self.hp, self.hp['optimizer']['lr'], stability)

  def task(self, state: Tree, t: int, base: Mapping[str, float], look) -> tuple[Choice, Any, int]:
    """(the choice, (state, loss), steps of all trainings) of task t."""
    rates = self.search.rates_of(t)
    look()
    accuracies, searched = self.plasticity(state, t, rates)
    rate, reference = best_rate(rates, accuracies)
    steps = [int(np.sum(searched))]

    def trial(stability):
      look()
      hp = with_values(self.hp, rate, stability)
      state_, loss, taken, accuracy = self.attempt(hp, state, self.stream, t, self.weights)
      steps.append(int(taken))
      return float(accuracy), (state_, np.asarray(loss))

    choice, model = decayed(trial, base, rate, reference, self.search)
    return choice, model, sum(steps)

  def plasticity(self, state: Tree, t: int, rates: Sequence[float]) -> tuple[list, list]:
    """(validation accuracies, steps) of fine-tuning on task t at each rate, one mapped program."""
    if len(rates) not in self.programs:
      axes = (MAPPED, SHARED, SHARED, SHARED, SHARED)
      self.programs[len(rates)] = jax.jit(map_runs(self.fine_tuned, axes, len(rates)))
    program = self.programs[len(rates)]
    out = program(jnp.asarray(rates), state, self.stream, jnp.int32(t), self.weights)
    return tuple(a.tolist() for a in out)

  def fine_tuned(self, rate, state: Tree, stream: Stream, t, weights):
    """(validation accuracy on task t, steps) of the network alone, trained at `rate` from where it stands.

    With the method where `PLASTIC` has it.
    """
    hp = with_values(self.hp, rate, self.plastic)
    if self.plastic:
      *_, steps, accuracy = attempt(
        self.setup.build, self.epochs, self.patience, hp, state, stream, t, weights
      )
      return accuracy, steps
    hp = {**hp, 'methods': {}}
    made = self.plain(hp, weights)
    new = made.init(state.key, take(stream, stream.index[t, 0], t))
    params, method = shared_part(new.params, state.params), new.method
    if isinstance(method, dict):  # the head's, which knows the classes seen so far
      method = {name: state.method[name] for name in method}
    new = new._replace(params=params, stats=state.stats, method=method, step=state.step)
    new, _, steps = trained(self.plain, self.epochs, self.patience, hp, new, stream, t, weights)
    return validated(made, new, stream, t), steps


def plain_of(own: Mapping[str, Any], setup: build.Setup) -> dict[str, Any]:
  """The configuration without its methods, and without what only their state and parameters need."""
  begin, first = setup.model(setup.weights).init, build.example(setup.streams[0])
  whole = jax.eval_shape(begin, jax.random.key(0), first)[0]
  trained = masks.paths(masks.subtract(whole, setup.frozen))
  groups = own['optimizer']['groups']
  of = {next((g for g in groups if masks.matches(g[0], path)), None) for path in trained}
  reached = tuple(g for g in groups if g in of)
  return capacity.without_methods(own) | {'optimizer': {**own['optimizer'], 'groups': reached}}


def attempt(make, epochs: int, patience: Patience | None, hp, state, stream: Stream, t, weights):
  """(state, loss, steps, validation accuracy) after learning task t and its boundary."""
  made = make(hp, weights)
  state, loss, steps = trained(make, epochs, patience, hp, state, stream, t, weights)
  if 'boundary' in stream.told:
    state = strong(
      made.boundary(state, jax.vmap(lambda rows: take(stream, rows, t))(stream.ends[t]))
    )
  return state, loss, steps, validated(made, state, stream, t)


def trained(make, epochs, patience, hp, state, stream: Stream, t, weights):
  """(state, loss f32[S], steps taken) after learning task t without its boundary."""
  S = stream.index.shape[1]
  whole = jnp.int32(S) if stream.steps is None else stream.steps[t]
  if patience is None:
    state, loss, _ = learn(make(hp, weights), state, stream, t, 0)
    return state, loss, whole
  an_epoch = whole // epochs

  def train(model, epoch, scale):
    optimizer = {**hp['optimizer'], 'lr': scale * hp['optimizer']['lr']}
    made = make({**hp, 'optimizer': optimizer}, weights)

    def step(i, model):
      state, loss = model
      state, value = made.step(state, take(stream, stream.index[t, i], t))
      return strong(state), loss.at[i].set(value)

    return jax.lax.fori_loop(epoch * an_epoch, (epoch + 1) * an_epoch, step, model)

  measure = lambda model: validated(make(hp, weights), model[0], stream, t)  # noqa: E731
  start = (strong(state), jnp.full(S, jnp.nan, jnp.float32))
  (state, loss), done = until_no_better(train, measure, start, epochs, patience)
  return state, loss, done * an_epoch


def validated(made: Learner, state: State, stream: Stream, t) -> jax.Array:
  """The accuracy on the validation data of task t; NaN where a parameter is not finite."""
  own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, t, 1), stream.test)
  return jnp.where(all_finite(state.params, 1, False), evaluate(made, state, own)[0], jnp.nan)


def shared_part(like: Tree, params: Tree) -> Tree:
  """The leaves of `params` that a learner without the method has too."""
  return {
    k: shared_part(v, params[k]) if isinstance(v, dict) else params[k] for k, v in like.items()
  }


def stability_of(own: Mapping[str, Any]) -> dict[str, float]:
  """The stability hyperparameters to start from: `config.tuning.start`, or the survey's."""
  given = own['tuning']['start']
  if not given:
    given = {name: v for name, v in START.items() if name.split('.')[0] in own['methods']}
  start = {}
  for dotted, value in dict(given).items():
    method, _, name = dotted.partition('.')
    if method not in own['methods'] or not isinstance(own[method].get(name), float):
      raise UserError(
        f'config.tuning.start: {dotted!r} is no float of a method of this run ({", ".join(own["methods"])})'
      )
    start[dotted] = own[method][name] if value is None else value
  return start


def with_values(hp: Tree, rate: float | jax.Array, stability: Mapping[str, float]) -> Tree:
  """The hyperparameters with another learning rate, which may be traced, and stability."""
  methods = {name: dict(values) for name, values in hp['methods'].items()}
  for dotted, value in stability.items():
    method, _, name = dotted.partition('.')
    methods[method][name] = np.float32(value)
  return {**hp, 'optimizer': {**hp['optimizer'], 'lr': jnp.float32(rate)}, 'methods': methods}


def check(stop, work, seed: int, t: int) -> None:
  if signum := stop():
    raise Interrupted(
      signum, f'{work.name}, seed {seed}: stopped in task {t}, the tasks before are saved'
    )


def said(choice: Choice, t: int, tasks: int) -> str:
  values = ', '.join(f'{name} {value:.4g}' for name, value in choice.stability.items())
  kept = f'validation {choice.accuracy:.3f} of {choice.reference:.3f}'
  return (
    f'task {t + 1}/{tasks}: rate {choice.rate:g}, {values or "nothing to decay"} after '
    f'{choice.attempts} attempts; {kept}{"" if choice.met else ", goal missed"}'
  )


def choices_table(lines: list[dict[str, Any]]) -> str:
  """What was chosen, task by task, and what it cost."""
  rows = ['seed  task  rate      reference  accuracy  attempts  stability']
  for line in lines:
    for t, c in enumerate(line['tuning']):
      values = ', '.join(f'{k} {v:.4g}' for k, v in c['stability'].items()) or '–'
      rows.append(
        f'{line["seed"]:4}  {t + 1:4}  {c["rate"]:<8g}  {c["reference"]:9.3f}  {c["accuracy"]:8.3f}  '
        f'{c["attempts"]:8}  {values}'
      )
  cost = sum(line['tuning_steps'] for line in lines) / max(sum(line['steps'] for line in lines), 1)
  return '\n'.join([*rows, f'the search took {cost:.1f} times the steps of the runs themselves'])


if __name__ == '__main__':
  sys.exit(main())
