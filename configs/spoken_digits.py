from configs import common

CLOSED = ('ncm', 'slda', 'ranpac')

def get_config(arg: str = 'class,er') -> dict:
  fields, methods = common.words(arg, 'class')
  base = fields['base'] or fields['scenario']
  replay = {'capacity': 600, 'draw': 24}
  arguments = {
    'er': replay, 'er_ace': replay, 'derpp': {**replay, 'alpha': 0.1, 'beta': 0.5},
    'gdumb': {'capacity': 600},
    'ranpac': {'width': 150, 'lam': 10.0},
  }
  closed = {*CLOSED} & set(methods)
  matching = {'derpp'} & set(methods)
  return {
    **fields,
    'name': 'spoken_digits',
    'seeds': (0, 1, 2),
    'dataset': 'spoken_digit',
    'data': {'test_batch': 60},
    'by': 'domain' if base == 'domain' else 'label',
    'tasks': None if base == 'domain' else 5,
    'order': 'seed',
    'epochs': 1,
    'batch': 8,
    'ends_batch': 60,
    'model': {'name': 'mlp', 'sizes': (64,)},
    'optimizer': {'name': 'sgd', 'lr': 0.1},
    'head': 'all' if base == 'domain' or closed or matching else 'seen',
    'methods': methods,
    **{m: arguments[m] for m in methods if m in arguments},
  }
