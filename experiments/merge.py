"""The network at the end of a run as a pretrained model: what `experiments.weights merge` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax

from cl_jax.errors import UserError
from cl_jax.lowrank import merged
from cl_jax.models import decoder, pretrained, vit
from cl_jax.types import overlay
from experiments import config, run, streams
from experiments.chain import chain_of


def merge(place: Path, out: Path, data_dir: str | None, tell: Callable[[str], None]) -> None:
  """Writes the network that a finished run has left, low-rank terms folded in, to `out`.

  A language model, or a ViT, whose head is of the run's classes and left out.

  Args:
    place: the --workdir of a run of one seed, its checkpoints in it.
    out: see `decoder.save` and `vit.save`.

  Raises:
    UserError: no such run, several seeds, no checkpoint, another kind of model, or a method that a single
      network cannot stand for.
  """
  try:
    resolved = config.tuples(json.loads((place / 'config.json').read_text()))
  except (OSError, ValueError) as error:
    raise UserError(f'{place} is not the --workdir of a run ({error})') from error
  if not isinstance(resolved, dict) or not isinstance(resolved.get('model'), dict):
    raise UserError(f'{place} is not the --workdir of a run of experiments.run')
  if len(resolved['seeds']) != 1:
    raise UserError(f'{place} has {len(resolved["seeds"])} seeds: a model is made of one')
  about = resolved['model']
  text = about['name'] == 'decoder' and about['output'] == 'tokens' and about['pretrained']
  if not text and about['name'] != 'vit':
    raise UserError(
      f'{place}: only runs of a pretrained language model (decoder, tokens) or of a ViT can be merged'
    )
  end = run.end_of(resolved, place, data_dir, tell)
  if end is None:
    raise UserError(f'{place} has no checkpoint: run the experiment again to its end')
  variables = overlay(end.setup.weights['frozen'], end.state.params)
  # Without the head's rule of which classes compete, which is no part of the weights.
  wires = end.setup.model(end.setup.weights).wires
  method = chain_of({**resolved, 'head': 'all'}, end.setup.streams[0], end.hp, wires)
  variables = merged(method, end.state.method, variables)
  extra = sorted(variables.keys() - {'backbone', *(() if text else ('head',))})
  if extra:
    raise UserError(f'{place}: {", ".join(extra)} cannot be folded into the weights of the network')
  backbone = jax.tree.map(jax.numpy.asarray, variables['backbone'])
  if text:
    shape = decoder.load(pretrained.find(about['pretrained']).path)[0]  # its weights can go
    decoder.save(out, shape, backbone, streams.tokenizer(resolved))
    return
  if about['pretrained']:
    shape = vit.load(pretrained.find(about['pretrained']).path)[0]
  else:
    shape = vit.Config(**about['config'])
  shape = shape._replace(image=about['image'] or shape.image, depth=about['layer'] or shape.depth)
  vit.save(out, shape, backbone, about['mean'], about['std'])
