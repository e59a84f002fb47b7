"""What files beside weights say of their use, as transformers, timm and sentence-transformers write it."""

from __future__ import annotations

import json

import pytest

from cl_jax.errors import UserError
from cl_jax.models import sidecar

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
HALF = {'mean': 0.5, 'std': 0.5}
THEIRS = {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}
FLAGS = {f'pooling_mode_{k}': False for k in ('cls_token', 'mean_tokens', 'max_tokens')}


def put(folder, files: dict) -> None:
  for name, content in files.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
  ('files', 'said'),
  [
    ({}, {}),
    ({'config.json': {'model_type': 'dinov2'}}, {}),
    ({sidecar.PIXELS: {'do_rescale': True, 'rescale_factor': 1 / 255, **THEIRS}}, IMAGENET),
    ({sidecar.PIXELS: {'image_mean': [0.5] * 3, 'image_std': 0.5}}, HALF),
    ({sidecar.PIXELS: {'do_normalize': False, **THEIRS}}, {'mean': 0.0, 'std': 1.0}),
    ({sidecar.PIXELS: {'size': 224}}, {}),
    ({'config.json': {'architecture': 'vit', 'pretrained_cfg': {**HALF}}}, HALF),
    ({'config.json': {'architecture': 'vit', 'mean': [0.485, 0.456, 0.406]}}, {'mean': IMAGENET['mean']}),
    ({sidecar.PIXELS: THEIRS, 'config.json': {'architecture': 'vit', **HALF}}, IMAGENET),
  ],
)  # fmt: skip
def test_pixels(tmp_path, files, said):
  put(tmp_path, files)
  assert sidecar.pixels(tmp_path) == said


@pytest.mark.parametrize(
  ('known', 'match'),
  [
    ('[]', 'is not a JSON object'),
    ('{', 'cannot be read'),
    ({'rescale_factor': 1 / 127.5}, r'pixels are multiplied by 0\.0078.*set config\.model\.mean'),
    ({'do_rescale': False}, 'pixels are multiplied by 1,'),
    ({'image_mean': ['a']}, r"image_mean must be numbers, not \['a'\]: set config.model.mean"),
    ({'image_std': [0.2, 0, 0.2]}, 'image_std holds values that are not positive'),
  ],
)
def test_pixels_on_another_scale_are_refused(tmp_path, known, match):
  put(tmp_path, {sidecar.PIXELS: known})
  with pytest.raises(UserError, match=match):
    sidecar.pixels(tmp_path)


def modules(*kinds: str) -> list[dict]:
  """As version 5.4 writes them where a name begins with a dot, else as those before."""
  old, new = 'sentence_transformers.models.', 'sentence_transformers.sentence_transformer.modules'
  return [{'idx': i, 'type': new + k if k[0] == '.' else old + k} for i, k in enumerate(kinds)]


@pytest.mark.parametrize(
  ('kinds', 'pooling', 'said'),
  [
    (None, None, {}),
    (('Transformer', 'Pooling', 'Normalize'), {**FLAGS, 'pooling_mode_cls_token': True},
     {'pool': 'cls', 'normalise': True}),
    (('Transformer', 'Pooling'), {**FLAGS, 'pooling_mode_mean_tokens': True, 'include_prompt': True},
     {'pool': 'mean', 'normalise': False}),
    (('.transformer.Transformer', '.pooling.Pooling'), {'pooling_mode': 'cls'},
     {'pool': 'cls', 'normalise': False}),
    (None, {'pooling_mode': ['mean']}, {'pool': 'mean'}),
  ],
)  # fmt: skip
def test_pooling(tmp_path, kinds, pooling, said):
  files = {sidecar.MODULES: kinds and modules(*kinds), sidecar.POOLING: pooling}
  put(tmp_path, {name: content for name, content in files.items() if content})
  assert sidecar.pooling(tmp_path) == said


@pytest.mark.parametrize(
  ('files', 'match'),
  [
    ({sidecar.MODULES: modules('Transformer', 'Pooling')}, 'has no 1_Pooling/config.json'),
    ({sidecar.MODULES: modules('Transformer', 'Dense')}, 'Dense is not supported here: set config'),
    ({sidecar.MODULES: {'0': 'Pooling'}}, 'is not a list of modules'),
    ({sidecar.POOLING: {**FLAGS, 'pooling_mode_max_tokens': True}}, 'the pooling is max_tokens,'),
    ({sidecar.POOLING: dict.fromkeys(FLAGS, True)}, 'is cls_token and mean_tokens and max_tokens'),
    ({sidecar.POOLING: FLAGS}, 'the pooling is none'),
  ],
)
def test_what_an_encoder_does_not_compute_is_refused(tmp_path, files, match):
  put(tmp_path, files)
  with pytest.raises(UserError, match=match):
    sidecar.pooling(tmp_path)
