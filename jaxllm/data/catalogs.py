"""Data sets of TFDS and of Hugging Face; neither needs TensorFlow or torch."""

import pathlib
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from jaxllm.data.readers import File, Rows

Catalog = tuple[list[File], Rows]


def tfds(name: str, part: tuple[float, float]) -> Catalog:
  """Open a split of a TFDS data set, prepared where no copy is found.

  Args:
    name: 'NAME[/CONFIG][:VERSION][?split=SPLIT&data_dir=DIR]'; the split is 'train' by default.
    part: fractions of the rows, from and to.

  Returns:
    Its files, and its rows as (place, fields).

  Raises:
    ValueError: the data set is unknown, or neither prepared nor can be downloaded, or not stored
      for random access.
  """
  base, options = _parse('tfds', name, '[/CONFIG][:VERSION]', {'split': 'train', 'data_dir': None})
  split = options['split']
  builder = _tfds_builder(base, split, options['data_dir'])
  paths = [pathlib.Path(path) for path in builder.info.splits[split].filepaths]
  examples = builder.as_data_source(split=split)
  return ([File(path.name, path) for path in paths],
          ((f'{split}[{i}]', dict(examples[i])) for i in _part(len(examples), part)))


def hugging_face(name: str, part: tuple[float, float]) -> Catalog:
  """Open a split of a Hugging Face data set; as `tfds`.

  Args:
    name: 'NAME[:CONFIG]?split=SPLIT'.
    part: fractions of the rows, from and to.
  """
  try:
    import datasets
  except ImportError as error:
    raise ImportError(f"hf:{name} needs datasets: pip install 'jaxllm[tasks]'") from error
  base, options = _parse('hf', name, '[:CONFIG]', {'split': None})
  if not options['split']:
    raise ValueError(f'hf:{name}: say which split, as in hf:{name}?split=train')
  base, _, config = base.partition(':')
  rows = datasets.load_dataset(base, config or None, split=options['split'])
  paths = [pathlib.Path(file['filename']) for file in rows.cache_files]
  return ([File(path.name, path) for path in paths],
          ((f'row {i + 1}', dict(rows[i])) for i in _part(len(rows), part)))


def _part(count: int, part: tuple[float, float]) -> range:
  return range(*(int(count * fraction) for fraction in part))


def _parse(scheme: str, name: str, form: str, options: dict[str, Any]) -> tuple[str, Any]:
  base, _, query = name.partition('?')
  found = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
  if not base or found.keys() - options.keys():
    known = ' and '.join(f'?{option}=' for option in options)
    raise ValueError(f"'{scheme}:{name}': expected {scheme}:NAME{form}, then {known} at most; got "
                     f'{", ".join(found.keys() - options.keys()) or "no name"}')
  return base, {**options, **found}


def _tfds_builder(name: str, split: str, data_dir: str | None) -> Any:
  import tensorflow_datasets

  where = f"'tfds:{name}'"
  try:
    builder = tensorflow_datasets.builder(name, data_dir=data_dir)
    if not builder.is_prepared():
      _require_network(where, builder.data_path)
      builder = tensorflow_datasets.builder(name, data_dir=data_dir, file_format='array_record')
      builder.download_and_prepare()
  except tensorflow_datasets.core.registered.DatasetNotFoundError:
    place = data_dir or tensorflow_datasets.core.constants.DATA_DIR
    raise ValueError(f'{where}: no prepared copy in {place}, and no dataset that '
                     f'TFDS {tensorflow_datasets.__version__} knows') from None
  stored = builder.info.file_format
  if stored not in type(stored).with_random_access():
    raise ValueError(
      f'{where}: {builder.data_path} is stored as {stored.value}, which only TensorFlow reads; '
      f"prepare it again: tfds.builder({name!r}, file_format='array_record')"
      '.download_and_prepare()')
  try:
    builder.info.splits[split]
  except (KeyError, ValueError):
    raise ValueError(f'{where}: no split {split!r}; it has '
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
