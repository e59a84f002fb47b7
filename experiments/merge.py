"""The network at the end of a run as a pretrained model: what `experiments.weights merge` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax

from cl_jax.errors import UserError
from cl_jax.lowrank import merged
from cl_jax.models import decoder, pretrained
from cl_jax.types import overlay
from experiments import config, run, streams


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
  end = run.end_of(resolved, place, data_dir, tell)
  if end is None:
    raise UserError(f'{place} has no checkpoint: run the experiment again to its end')
  variables = overlay(end.setup.weights['frozen'], end.state.params)
  variables = merged(end.method, end.state.method, variables)
  extra = sorted(variables.keys() - {'backbone'})
  if extra:
    raise UserError(f'{place}: {", ".join(extra)} cannot be folded into the weights of the network')
  shape = decoder.load(pretrained.find(about['pretrained']).path)[0]  # its weights can go
  backbone = jax.tree.map(jax.numpy.asarray, variables['backbone'])
  decoder.save(out, shape, backbone, streams.tokenizer(resolved))
