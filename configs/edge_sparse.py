"""Sparse update on a small device: the same learner, of which less and less is trained.

  python -m experiments.budget --config=configs/edge_sparse.py:channels,gradient
  python -m experiments.run --config=configs/edge_sparse.py:channels,gradient --workdir=runs/sparse/gradient

The stream of configs/edge.py and a network of two hidden layers: MLP 784-64-64-10, experience replay
with 100 images, Adam 1e-3. The words after the colon:

  full            everything is trained
  micro           the same, the gradient in 4 parts
  upper           the first layer is not
  in              of the second layer, a quarter of the input channels; of the first, nothing
  channels        of both, a quarter of the input channels (pixels and units): the first ones
  channels,magnitude, channels,gradient: those of largest weights, of largest gradients on the first task
  outputs         of both, a quarter of the output channels (units)
  bias            biases and the output layer
  head            the output layer
"""

from configs import edge

HEAD = ('head/.*', 'all')
PARTS = {
  'full': (),
  'micro': (),
  'upper': (('l0/.*', 'none'), ('l1/.*', 'all'), HEAD),
  'in': (('l0/.*', 'none'), ('l1/.*', 'in 0.25'), HEAD),
  'channels': (('l[01]/.*', 'in 0.25'), HEAD),
  'outputs': (('l[01]/.*', 'out 0.25'), HEAD),
  'bias': (('l[01]/.*', 'bias'), HEAD),
  'head': (('l[01]/.*', 'none'), HEAD),
}
CELLS = (
  'full', 'micro', 'upper', 'in', 'outputs', 'channels', 'channels,magnitude', 'channels,gradient', 'bias',
  'head',
)  # fmt: skip


def get_config(arg: str = 'channels,gradient') -> dict:
  name, _, channels = arg.partition(',')
  return {
    **edge.get_config('er'),
    'name': 'edge_sparse',
    'seeds': (0, 1, 2),
    'model': {'name': 'mlp', 'sizes': (64, 64)},
    'optimizer': {'name': 'adam', 'lr': 1e-3},
    'update': {'parts': PARTS[name], 'channels': channels or 'first'},
    'micro_batches': 4 if name == 'micro' else 1,
  }
