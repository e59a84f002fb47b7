"""Every field of an experiment, with its default and what it means.

A configuration file has `get_config(arg='')`, which returns a nested dict: it starts from `defaults()`
and sets what differs. Fields are overridden on the command line as --config.FIELD=VALUE, fields of a
sub-dict as --config.SUB.FIELD=VALUE. Floats of the optimiser and of methods are traced: runs that
differ in these alone share one compiled program. Everything else is fixed when the program is made.
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from cl_jax.errors import UserError
from cl_jax.methods import names


class Maybe(NamedTuple):
  """The default of a field that holds a `type` or None."""

  type: type
  default: Any = None


SEPARATE = ('task', 'class', 'domain')
SCHEDULES = ('joint', 'cumulative', 'online', 'blurry')


def defaults() -> dict[str, Any]:
  return {
    # What tables and progress call this experiment.
    'name': 'experiment',
    # One run per seed, all in one mapped program. Initial weights, the order of the examples, every
    # method's draws and (see `order`) the order of the classes derive from it.
    'seeds': (0,),
    # --- data ---------------------------------------------------------------------------------------
    # See cl_jax.streams.load.dataset: 'fashion_mnist_small' and 'clinc150' ship with the package; a TFDS
    # name ('mnist', 'tfds:cifar10'), 'text:NAME', 'corpora:NAME+NAME', 'jsonl:DIR' and 'npz:PATH' are
    # looked up.
    'dataset': 'fashion_mnist_small',
    'data': {
      # At most so many training examples of each class in a task, and of each task; None = all.
      'examples_per_class': Maybe(int),
      'examples_per_task': Maybe(int),
      # At most so many examples of each task to evaluate on; None = all.
      'test_per_task': Maybe(int),
      # Examples evaluated at once.
      'test_batch': 256,
      # Of the choices above and of what is held out: the same examples for every run, or, as None, other
      # ones for every run's seed, so that intervals hold the luck of the draw as well.
      'seed': Maybe(int, 0),
      # Text: tokens per sentence (or block of a corpus), and the path of a tokenizer.json or the name of a
      # pretrained model that has one ('' = the pretrained model's own).
      'length': 32,
      'tokenizer': '',
      # For language models, sentences with their label spelt out after them, as in
      # '{text}\\nIntent: {label}'; '' = the label is a number.
      'template': '',
      # TFDS: the names of the splits; the feature that tells the domain ('' = none); the fraction of
      # `train` that becomes the test data where there is no test split (0 = there is one).
      'train': 'train',
      'test': 'test',
      'domain': '',
      'hold_out': 0.0,
      # Images of TFDS and of image folders: (height, width, channels) they are brought to; () = as they are.
      'image': (),
    },
    'feed': {
      # Where training examples are: '' in memory and on the device; 'grain' in the array_record files of a
      # TFDS dataset, of any size, read while the steps before them run. The results have the same bytes;
      # seeds run one after the other, and the checkpoints of a single seed fit both.
      'name': '',
      # Processes that read and decode (0 = threads of this one), and batches that they keep ready (None = as
      # many as one call takes, see `chunk`).
      'workers': 2,
      'ahead': Maybe(int),
    },
    # Fraction of every class that is held out of the training data.
    'validation': 0.0,
    # What is evaluated: 'test', or 'valid', the held-out part (to choose hyperparameters with).
    'evaluate': 'test',
    # --- the stream ---------------------------------------------------------------------------------
    # 'task', 'class' and 'domain' learn one task after the other (van de Ven, Tuytelaars & Tolias 2022).
    # 'joint' learns all tasks at once, 'cumulative' all tasks so far, 'online' every example once and
    # 'blurry' tasks that come and go gradually; the last two tell the learner nothing.
    'scenario': 'class',
    # The labels that 'joint', 'cumulative', 'online' and 'blurry' start from: 'task', 'class', 'domain'.
    # '' is 'class', or 'domain' where the inputs are transformed.
    'base': '',
    # What the learner may know, any of 'task_train', 'task_test', 'boundary'; None is the scenario's own
    # and () is task-free.
    'told': Maybe(tuple),
    # How many tasks, of equally many classes each (by domain: None, every domain is one). `task_sizes`
    # are the numbers of classes of tasks that are not equal.
    'tasks': Maybe(int, 5),
    'task_sizes': (),
    # What a task is made of: 'label', or 'domain' where the dataset has domains.
    'by': 'label',
    # The order of the classes (or domains), the permutations of pixels: 'fixed' (classes in the
    # dataset's order, permutations of seed 0), 'seed' (drawn from the run's seed) or a number (drawn
    # from that one for every run).
    'order': 'fixed',
    'transform': {
      # 'none', 'permuted' or 'rotated': every task is the whole dataset, its pixels in an order of its
      # own or turned by an angle of its own.
      'name': 'none',
      # Permuted: the first task sees plain images; pixels of zeros added on every side first.
      'first_plain': False,
      'pad': 0,
      # Rotated: the angles; () = `tasks` of them evenly over [0, 180).
      'degrees': (),
    },
    'blurry': {
      # Legs with an evaluation after each (None = `tasks`); what is blurred, 'task' or 'class'; the
      # standard deviation of arrival in units of the distance between centres.
      'segments': Maybe(int),
      'by': 'task',
      'width': 0.5,
    },
    # --- training -----------------------------------------------------------------------------------
    # Passes over each task, or, where given, the number of steps per task instead.
    'epochs': 1,
    'iterations': Maybe(int),
    # Examples of a step; whether an epoch's incomplete last batch is left out instead of padded.
    'batch': 128,
    'drop_last': False,
    # Examples at once in what methods compute at the boundary.
    'ends_batch': 256,
    # The network: its module in cl_jax.models, then its arguments. `pretrained` names weights or a
    # directory, for models that load them; what the files beside them say of mean, std, pool and normalise
    # holds where these are not given.
    'model': {'name': 'mlp', 'sizes': (256, 256)},
    # Methods in the order in which their hooks run; () is plain fine-tuning. Each has a sub-dict of its
    # arguments by its name. What the stream knows (classes, tasks, task_classes, steps_per_epoch, and
    # prune_after = two thirds of a task's steps) is None there and filled in. `gate` wraps the method in
    # cl_jax.gated: 0.0 switches it off inside the same program, for ablations; None leaves it alone.
    'methods': (),
    # Bytes that all methods together may add to the state of plain fine-tuning: those with a `capacity` get
    # as many slots as fit, in place of their own number. None = as their `capacity` says.
    'budget_bytes': Maybe(int),
    # What is kept between steps in fewer bits; see cl_jax.codecs for bytes and errors. What has fewer bytes
    # gets more slots out of a budget.
    'compress': {
      # The memory of every method that keeps examples or (latent) activations: '' as they come, 'float32',
      # 'bfloat16', 'uint8', 'int8', 'int4' or 'pqMxK' (M parts of a row, K codewords each).
      'memory': '',
      # ((pattern, codec), ...): parts of the methods' states by path, such as
      # (('.*importance/.*', 'udynamic8'),); codecs are 'bfloat16', 'dynamic8' and 'udynamic8'.
      'state': (),
      # Momentum and moments: '' as they are, 'bfloat16' or 'dynamic8'.
      'optimizer': '',
    },
    # Limits that a learner is refused above, before anything is trained; None = none. What
    # `python -m experiments.budget` prints. They decide nothing about a run that fits.
    'budget': {
      # Every byte that is kept between steps, frozen weights included: a device holds them as well.
      'state_bytes': Maybe(int),
      # Arguments, results and temporary values of a step of one run, as compiled for the device at hand.
      'peak_bytes': Maybe(int),
      # Multiply-adds of a step, of matrix products and convolutions.
      'macs_per_step': Maybe(int),
    },
    # Which outputs compete: 'all', 'seen' (classes seen so far), 'current' (in training those of the task at
    # hand, at test those seen so far) or 'task' (those of the task at hand, which is told).
    'head': 'all',
    'optimizer': {
      # The function of optax, then its arguments; `lr` is its learning rate.
      'name': 'sgd',
      'lr': 0.1,
      # For optimisers without decay of their own: added to the gradient as coefficient * weight.
      'weight_decay': 0.0,
      # 'constant', or 'cosine': down to 0 within every task.
      'schedule': 'constant',
      # ((pattern, factor), ...): the learning rate of parameters by path, as a factor; the patterns must
      # cover all parameters. () = the same for all.
      'groups': (),
      # Forget momentum and moments at every boundary, as codes that make an optimiser a task do. Moments of
      # finished tasks make Adam's steps in a new one small: fine-tuning then forgets less than it would.
      'reset': False,
    },
    # Patterns of parameter paths that are not trained and are shared by all runs.
    'freeze': (),
    # Sparse update, in the place of `freeze`; see cl_jax.sparse.
    'update': {
      # ((pattern, words), ...) over all parameters, the first pattern that matches counts: 'all', 'none',
      # 'bias', 'out 0.25' and 'in 0.25' (a share of the output or input channels of weights 'w'), 'last 2'
      # (layers of a stack). What is not trained is shared by all runs and costs no gradient. () = all.
      'parts': (),
      # The channels: the 'first', those of largest 'magnitude' (norm of the initial weights), or of largest
      # 'gradient' (squares of the gradients on the first task of the first seed, before training).
      'channels': 'first',
    },
    # The gradient of a step in so many parts, one after the other, of which only one's activations are kept:
    # the same up to rounding, but for what looks at a batch as a whole; see cl_jax.micro.
    'micro_batches': 1,
    # Bits of the frozen weight matrices of a stack of layers: None as they are, 16 (bfloat16), 8
    # or 4 to round them; what is added above them (lora) stays in full precision.
    'frozen_bits': Maybe(int),
    # Compute the features of a network that is frozen below its head once, and learn from these.
    'cache_features': False,
    # Steps of one compiled call: checkpoints, signals and progress wait for its end. `eval_every` takes
    # its place where it is not 0, and all tasks are evaluated then: that shows the stability gap.
    'chunk': 100,
    'eval_every': 0,
    # For experiments.framework, hyperparameters task by task, with the values of De Lange et al. 2022.
    'tuning': {
      # Learning rates of the plasticity search; further ones for the first task.
      'rates': (1e-2, 5e-3, 1e-3, 5e-4, 1e-4),
      'first_rates': (1e-1, 5e-2),
      # The share of accuracy that stability may cost; the factor on stability hyperparameters.
      'drop': 0.2,
      'decay': 0.5,
      # Trainings by the method at most.
      'attempts': 10,
      # Early stopping: (epochs without a better validation accuracy after which the rate falls, epochs after
      # which training ends, the factor on the rate); the best epoch is kept. The survey's are (5, 10, 0.1)
      # of 70 epochs; () = all epochs, at one rate.
      'patience': (),
      # What to start from, (('ewc.coef', 800.0), ...); () = the values of the survey.
      'start': (),
    },
    # For experiments.sweep: {'optimizer.lr': (0.1, 0.01), ...}, every combination.
    'sweep': {},
  }


def words(arg: str, scenario: str) -> tuple[dict[str, str], tuple[str, ...]]:
  """Reads FILE:word,word: scenarios ('joint' and such beside a base) and, in order, methods.

  Returns:
    The fields `scenario` and `base`, and the methods; 'naive' stands for none.

  Raises:
    UserError: a word is none of these; close ones are offered.
  """
  everything = (*SEPARATE, *SCHEDULES, 'naive', *names())
  named, schedule, methods = '', '', []
  for word in filter(None, (w.strip() for w in arg.split(','))):
    if word in SEPARATE:
      named = word
    elif word in SCHEDULES:
      schedule = word
    elif word not in everything:
      near = difflib.get_close_matches(word, everything, 3, 0.6)
      hint = f'did you mean {" or ".join(near)}' if near else 'scenarios are '
      hint += '' if near else ', '.join((*SEPARATE, *SCHEDULES))
      hint = "a stream that tells nothing is --config.told='()'" if word == 'task_free' else hint
      raise UserError(f'{word!r} is no scenario and no method: {hint}')
    elif word != 'naive':
      methods.append(word)
  base = named or scenario
  fields = {'scenario': schedule, 'base': base} if schedule else {'scenario': base, 'base': ''}
  return fields, tuple(methods)


def variants(
  arg: str, scenario: str, known: tuple[str, ...]
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
  """As `words`, and which of the words `known` are among them, in the order given."""
  given = [w.strip() for w in arg.split(',')]
  fields, methods = words(','.join(w for w in given if w not in known), scenario)
  return fields, methods, tuple(w for w in given if w in known)


def images(arg: str, capacity: int = 500, **own) -> dict:
  """Small colour images and the reduced ResNet-18, one pass in batches of 10; `own` fields win."""
  fields, methods = words(arg, 'class')
  base = fields['base'] or fields['scenario']
  outputs = {'task': 'heads', 'domain': 'all', 'class': 'seen'}[base]
  replay = {'capacity': capacity, 'draw': 10}
  arguments = {
    'er': replay,
    'er_ace': replay,
    'derpp': {**replay, 'alpha': 0.1, 'beta': 0.5},
    'rehearsal': replay,
    'icarl': replay,
    'agem': {'capacity': capacity, 'draw': 64},
    # Cut behind the third of four stages; a row is a feature map of the fourth's input.
    'latent': {**replay, 'tap': 's2b1'},
    'remind': {**replay, 'tap': 's2b1', 'codebooks': 20},
    'ewc': {'coef': 10.0, 'labels': 'empirical'},
    'si': {'skip': 'head/.*|.*/(scale|bias)' if 'cwr' in methods else ''},
    'lwf': {'outputs': outputs},
    'ebll': {'outputs': outputs},
    'dgr': {'draw': 10, 'outputs': outputs},
    'dreamnet': {'draw': 10, 'outputs': outputs},
  }
  matching = {'der', 'derpp'} & set(methods)  # logits, also those of classes to come
  head = {'task': 'task', 'domain': 'all', 'class': 'all' if matching else 'seen'}[base]
  return {
    **fields,
    'seeds': (0, 1, 2),
    'order': 'seed',
    'batch': 10,
    'model': {'name': 'resnet', 'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)},
    'optimizer': {'name': 'sgd', 'lr': 0.03},
    'head': head,
    'methods': methods,
    'chunk': 25,
    **{m: arguments[m] for m in methods if m in arguments},
    **own,
  }
