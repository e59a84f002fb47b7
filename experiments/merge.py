"""The network at the end of a run as a pretrained model: what `experiments.weights merge` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax

from cl_jax import checkpoint
from cl_jax.errors import UserError
from cl_jax.lowrank import merged
from cl_jax.models import decoder, pretrained
from cl_jax.types import overlay
from experiments import build, config, run, streams
from experiments.chain import chain_of
from experiments.job import blank, spread


def merge(place: Path, out: Path, data_dir: str | None, tell: Callable[[str], None]) -> None:
  """Writes the language model that a finished run has left, low-rank terms folded in, to `out`.

  Args:
    place: the --workdir of a run of one seed, its checkpoints in it.
    out: see `decoder.save`.

  Raises:
    UserError: no such run, several seeds, no checkpoint, another kind of model, or a method that a single
      network cannot stand for.
  """
  try:
    resolved = config.tuples(json.loads((place / 'config.json').read_text()))
  except (OSError, ValueError) as error:
    raise UserError(f'{place} is not the --workdir of a run ({error})') from error
  if len(resolved['seeds']) != 1:
    raise UserError(f'{place} has {len(resolved["seeds"])} seeds: a model is made of one')
  about = resolved['model']
  if about['name'] != 'decoder' or about['output'] != 'tokens' or not about['pretrained']:
    raise UserError(
      f'{place}: only runs of a pretrained language model (decoder, tokens) can be merged'
    )
  setup = build.prepare(resolved, data_dir, tell)[0]
  job = run.job(setup, place, config.sha256(resolved))
  restored = checkpoint.restore(job.folder, blank(job, spread(job), 0), job.sha256, tell)
  if restored is None:
    raise UserError(f'{place} has no checkpoint: run the experiment again to its end')
  state = restored.tree.state
  stream = setup.streams[0]
  hp = build.hyper(resolved, stream)
  method = chain_of(resolved, stream, hp, setup.model(setup.weights).wires)
  variables = overlay(setup.weights['frozen'], state.params)
  variables = merged(method, state.method, variables)
  extra = sorted(variables.keys() - {'backbone'})
  if extra:
    raise UserError(f'{place}: {", ".join(extra)} cannot be folded into the weights of the network')
  shape, _ = decoder.load(pretrained.find(about['pretrained']).path)
  backbone = jax.tree.map(jax.numpy.asarray, variables['backbone'])
  decoder.save(out, shape, backbone, streams.tokenizer(resolved))
