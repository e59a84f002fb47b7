"""The reduced ResNet-18 against torch: outputs, gradients and running statistics of one step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cl_jax.models.resnet import resnet
from cl_jax.types import Batch, no_tap, overlay

torch = pytest.importorskip('torch', reason='parity with torch needs torch')
nn, relu = torch.nn, torch.nn.functional.relu


class Block(nn.Module):
  def __init__(self, d_in: int, d_out: int, stride: int):
    super().__init__()
    self.conv1 = unit(d_in, d_out, 3, stride)
    self.conv2 = unit(d_out, d_out, 3, 1)
    if d_in != d_out:
      self.skip = unit(d_in, d_out, 1, stride)

  def forward(self, x):
    left = x if not hasattr(self, 'skip') else self.skip(x)
    return relu(self.conv2(relu(self.conv1(x))) + left)


def unit(d_in: int, d_out: int, k: int, stride: int):
  filters = nn.Conv2d(d_in, d_out, k, stride, k // 2, bias=False)
  return nn.Sequential(filters, nn.BatchNorm2d(d_out))


class Net(nn.Module):
  def __init__(self, channels: int, width: int, classes: int):
    super().__init__()
    self.stem, d_in = unit(channels, width, 3, 1), width
    for stage in range(4):
      for i in range(2):
        d = width * 2**stage
        setattr(self, f's{stage}b{i}', Block(d_in, d, 2 if stage and not i else 1))
        d_in = d
    self.head = nn.Linear(d_in, classes)

  def forward(self, x):
    h = relu(self.stem(x))
    for stage in range(4):
      for i in range(2):
        h = getattr(self, f's{stage}b{i}')(h)
    return self.head(h.mean((2, 3)))


def tree(net, of) -> dict:
  """What `of` takes from each tensor of the net, under our names and in our layout."""
  out: dict = {}
  names = {'0.weight': 'w', '1.weight': 'scale', '1.bias': 'bias', 'weight': 'w', 'bias': 'b'}
  names |= {'1.running_mean': 'mean', '1.running_var': 'var'}
  for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
    *path, kind, last = name.split('.')
    path, last = ([*path, kind], last) if kind == 'head' else (path, f'{kind}.{last}')
    if last not in names or (value := of(tensor)) is None:
      continue
    level = out
    for part in path:
      level = level.setdefault(part, {})
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
    level[names[last]] = value.detach().clone().numpy().transpose(order)
  return out


def build(shape: tuple[int, ...]):
  torch.manual_seed(0)
  net = Net(shape[2], 4, 7)
  with torch.no_grad():
    for p in net.parameters():  # norms begin at 1 and 0, which would hide an exchange of them
      p.add_(0.1 * torch.randn_like(p))
  x = np.random.default_rng(0).random((6, *shape), np.float32)
  batch = Batch(jnp.asarray(x), jnp.arange(6), jnp.ones(6), jnp.zeros(6, jnp.int32))
  variables = jax.tree.map(jnp.asarray, tree(net, lambda t: t))
  return net, torch.tensor(x.transpose(0, 3, 1, 2)), variables, batch


def test_a_training_step_equals_that_of_torch():
  net, images, variables, batch = build((32, 32, 3))
  model = resnet(7, 4)
  params, stats = jax.eval_shape(model.init, jax.random.key(0), batch)
  assert jax.tree.map(jnp.shape, overlay(params, stats)) == jax.tree.map(jnp.shape, variables)

  def loss(p):
    out = model.apply(overlay(variables, p), batch, no_tap, True)
    return model.loss(out, batch).mean(), out

  grads, out = jax.jit(jax.grad(loss, has_aux=True))(variables)
  logits = net(images)
  torch.nn.functional.cross_entropy(logits, torch.arange(6)).backward()
  np.testing.assert_allclose(out.logits, logits.detach().numpy(), atol=1e-5)
  want = tree(net, lambda t: t.grad)
  assert jax.tree.structure(want) == jax.tree.structure(params)
  for path, w in jax.tree_util.tree_leaves_with_path(want):
    got = grads
    for part in path:
      got = got[part.key]
    np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-5, err_msg=str(path))
  running = tree(net, lambda t: None if t.requires_grad else t)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
  jax.tree.map(close, out.stats, running)


def test_evaluation_of_small_grey_images_equals_that_of_torch():
  net, images, variables, batch = build((28, 28, 1))
  with torch.no_grad():
    net(images)  # moves the running statistics
    want = net.eval()(images).numpy()
  variables = jax.tree.map(jnp.asarray, tree(net, lambda t: t))
  got = jax.jit(lambda v: resnet(7, 4).apply(v, batch).logits)(variables)
  np.testing.assert_allclose(got, want, atol=1e-5)
