"""What the documentation site has beside the Markdown of this folder, made when it is built.

- The reference: a page for each room of the package, whose docstrings mkdocstrings renders; the
  public face; every field of every config class; every flag of every program.
- README's figures, CONTRIBUTING.md, SECURITY.md and CHANGELOG.md as pages.
- Formulas between dollar signs become MathML, so that no browser fetches a program to draw them.
- `docs/x.md` in the text becomes a link to that page, and in the mathematics the name of a function
  a link to its line in the source, which is a page too.
- Drawings stand in the page itself, so that they take its colours.
"""

import ast
import html
import importlib
import pathlib
import pkgutil
import posixpath
import re
import typing

import pydantic
from latex2mathml import converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

from jaxllm import __main__ as command_line
from jaxllm import experiment, validation
from jaxllm.config import Config
from jaxllm.generation.sampling import SamplingConfig

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'jaxllm'
DOCS = ROOT / 'docs'
MATHEMATICS = DOCS / 'mathematics.md'
# Pages that are files elsewhere in the repository: page -> (file, from which heading on, to which).
ELSEWHERE = {
  'figures.md': ('README.md', '## Figures', '## Licence'),
  'project/contributing.md': ('CONTRIBUTING.md', '', ''),
  'project/security.md': ('SECURITY.md', '', ''),
  'project/changelog.md': ('CHANGELOG.md', '', ''),
}
PLACES = {file: page for page, (file, *_) in ELSEWHERE.items() if file != 'README.md'}
TOOLS = tuple(f'tools.{name}' for name in command_line.TOOLS)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
  """Put the pages of the rooms where the navigation says ROOMS."""
  for section in config.nav:
    for entry in next(iter(section.values())):
      if isinstance(entry, dict) and entry.get('Rooms'):
        entry['Rooms'] = [{name: f'reference/rooms/{name}.md'} for name in rooms()]
  return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Add the pages that are made here."""
  pages = {
    'reference/index.md': public_page(), 'reference/config.md': config_page(),
    'reference/commands.md': commands_page(),
    **{f'reference/rooms/{name}.md': room_page(name) for name in rooms()},
    **{page: excerpt(*place) for page, place in ELSEWHERE.items() if (ROOT / place[0]).exists()},
  }
  for name, text in pages.items():
    files.append(File.generated(config, name, content=text))
  for module in sorted({place(name)[0] for name in named(MATHEMATICS.read_text('utf-8'))}):
    files.append(File.generated(config, f'source/{module}.md', content=source_page(module),
                                inclusion=InclusionLevel.NOT_IN_NAV))
  return files


def on_page_markdown(markdown: str, page: typing.Any, **_: typing.Any) -> str:
  """Link what the text names as files of documentation."""
  here = posixpath.dirname(page.file.src_uri)

  def link(found: re.Match[str]) -> str:
    name = found[1]
    target = PLACES.get(name) or name.removeprefix('docs/')
    if target == name or target == page.file.src_uri:
      return found[0]
    return f'[`{name}`]({posixpath.relpath(target, here or ".")})'

  return re.sub(r'(?<!\[)`((?:docs/)?[\w/-]+\.md)`', link, markdown)


def on_page_content(content: str, page: typing.Any, **_: typing.Any) -> str:
  """Write formulas as MathML, put drawings into the page, link names to their lines."""
  def line(found: re.Match[str]) -> str:
    module, number = place(found[1])
    return f'<a href="../source/{module}/#__codelineno-0-{number}">{found[0]}</a>'

  def drawing(found: re.Match[str]) -> str:
    text = (DOCS / found[1]).read_text('utf-8')
    return f'<figure>{re.sub("<style>.*?</style>", "", text)}</figure>'

  content = re.sub(r'<p><img [^>]*src="(?:\.\./)*(assets/[\w-]+\.svg)"[^>]*></p>', drawing, content)
  if page.file.src_uri == MATHEMATICS.name:
    content = re.sub(r'<code>(jaxllm\.[\w.]+)</code>', line, content)

  def formula(found: re.Match[str]) -> str:
    display = 'block' if found[2] == '[' else 'inline'
    return converter.convert(html.unescape(found[3]).strip(), display=display)

  return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', formula, content,
                flags=re.S)


def rooms() -> dict[str, list[str]]:
  """Return the modules of each room; those that lie beside the rooms are in `jaxllm`."""
  found: dict[str, list[str]] = {'jaxllm': []}
  for path in sorted(PACKAGE.rglob('*.py')):
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    if parts[0].startswith('__') or len(parts) == 1 and parts[0] in PROGRAMS:
      continue
    if path.name == '__init__.py' and len(ast.parse(path.read_text(encoding='utf-8')).body) == 1:
      continue  # A docstring, which is the first line of the page.
    name = '.'.join(('jaxllm', *parts)).removesuffix('.__init__')
    found.setdefault(parts[0] if len(parts) > 1 else 'jaxllm', []).append(name)
  return found


PROGRAMS = tuple(command_line.PROGRAMS)


def summary(module: str) -> str:
  """Return the first line of the docstring of a module."""
  path = ROOT / module.replace('.', '/')
  path = path / '__init__.py' if path.is_dir() else path.with_suffix('.py')
  return (ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or '').split('\n')[0]


def room_page(name: str) -> str:
  """Return the Markdown of the reference of a room."""
  modules = rooms()[name]
  title = 'Beside the rooms' if name == 'jaxllm' else name
  lead = '' if name == 'jaxllm' else summary(f'jaxllm.{name}')
  return '\n\n'.join([f'# {title}', lead, *(f'::: {module}' for module in modules)])


def public_page() -> str:
  """Return the Markdown of the public face: its functions in full, its classes in a table."""
  tree = ast.parse((PACKAGE / '__init__.py').read_text(encoding='utf-8'))
  places = {name.name: f'{line.module}.{name.name}' for line in ast.walk(tree)
            if isinstance(line, ast.ImportFrom) for name in line.names}
  places['PRESETS'] = 'jaxllm.models.families'
  functions = ('load', 'generate', 'pipeline', 'train', 'evaluate')
  lines = ['# jaxllm from Python', '',
           'What `import jaxllm` gives. Nothing is imported before it is used.', '']
  for name in functions:
    lines += [f'- [`jaxllm.{name}`][{places[name]}]: {first_line(places[name])}']
  lines += ['', '| name | |', '|---|---|']
  for name, place in sorted(places.items(), key=lambda one: one[0].lower()):
    if name not in functions:
      lines.append(f'| [`jaxllm.{name}`][{place}] | {first_line(place)} |')
  return '\n'.join(lines)


def first_line(place: str) -> str:
  """Return the first sentence of a docstring in the package."""
  return cell((pkgutil.resolve_name(place).__doc__ or '').strip().split('\n\n')[0])


def config_classes(cls: type[Config], seen: dict[type[Config], str], path: str) -> None:
  """Collect a config class and those of its fields, each with the first path that leads there."""
  if cls in seen:
    return
  seen[cls] = path
  for name, field in cls.model_fields.items():
    for inner in validation.classes(field.annotation):
      config_classes(inner, seen, f'{path}.{name}')


def config_page() -> str:
  """Return the Markdown of all config classes: field, type, default, meaning."""
  found: dict[type[Config], str] = {}
  config_classes(experiment.Experiment, found, 'config')
  config_classes(SamplingConfig, found, '')
  lines = [
    '# Every field of a config', '',
    'Made from the classes. A field is set in an experiment file, or on the command line by its '
    'path: `--config.optimizer.learning_rate=3e-4`. `python -m jaxllm.train --config=... --help` '
    'lists the fields of one experiment with their values.', '',
  ]
  for cls, path in found.items():
    place = f'{cls.__module__}.{cls.__qualname__}'
    lines += [f'## {cls.__name__}', '', f'{cell(first_paragraph(cls))} ([`{place}`][{place}])', '']
    if path and path != 'config':
      lines += [f'`--{path}`', '']
    if not cls.model_fields:
      continue
    lines += ['| field | type | default | |', '|---|---|---|---|']
    for name, field in cls.model_fields.items():
      lines.append(f'| `{name}` | {type_of(field)} | {default_of(field)} | '
                   f'{cell(field.description or "")} |')
    lines.append('')
  return '\n'.join(lines)


def first_paragraph(cls: type) -> str:
  """Return the first paragraph of a docstring."""
  return (cls.__doc__ or '').strip().split('\n\n')[0]


def cell(text: str) -> str:
  """Return a text as it may stand in the cell of a table."""
  parts = ' '.join(text.split()).replace('|', '\\|').split('`')
  # Every second part is code, in which Markdown itself escapes.
  for index in range(0, len(parts), 2):
    parts[index] = re.sub(r'([*\[\]])', r'\\\1', html.escape(parts[index], quote=False))
  return '`'.join(parts)


def type_of(field: pydantic.fields.FieldInfo) -> str:
  """Return the type of a field, with its bounds, and links to config classes."""
  text = annotation_of(field.annotation)
  signs = {'gt': '>', 'ge': '>=', 'lt': '<', 'le': '<='}
  bounds = [f'{sign} {getattr(one, name)}' for one in field.metadata
            for name, sign in signs.items() if getattr(one, name, None) is not None]
  return text + (f' ({html.escape(", ".join(bounds))})' if bounds else '')


def annotation_of(annotation: typing.Any) -> str:
  """Return an annotation in Markdown."""
  origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
  if annotation is None or annotation is type(None):
    return 'None'
  if annotation is Ellipsis:
    return '...'
  if origin is typing.Annotated:
    return annotation_of(parts[0])
  if origin is typing.Literal:
    return ' or '.join(f'`{part!r}`' for part in parts)
  if origin is typing.Union or str(origin) == "<class 'types.UnionType'>":
    return ' or '.join(map(annotation_of, parts))
  if origin is tuple and parts[-1] is Ellipsis:
    return f'list of {annotation_of(parts[0])}'
  if parts:
    return f'{origin.__name__}({", ".join(map(annotation_of, parts))})'
  name = getattr(annotation, '__name__', str(annotation))
  if isinstance(annotation, type) and issubclass(annotation, Config):
    return f'[{name}](#{name.lower()})'
  return name


def default_of(field: pydantic.fields.FieldInfo) -> str:
  """Return the default of a field; configs that are all default are named by their class."""
  if field.is_required():
    return 'required'
  value = field.get_default(call_default_factory=True)
  if isinstance(value, Config):
    changed = {name: getattr(value, name) for name in value.model_fields_set}
    inside = ', '.join(f'{name}={one!r}' for name, one in changed.items() if name != 'kind')
    return f'`{type(value).__name__}({inside})`'
  text = repr(value)
  return f'`{text}`' if len(text) < 120 else 'see the class'


def commands_page() -> str:
  """Return the Markdown of the flags of all programs."""
  lines = ['# Every flag of a program', '',
           'Made from the programs. `jaxllm NAME ...` is the same as `python -m jaxllm.NAME ...`; '
           'programs that take `--config` take `--config.FIELD=VALUE` for every '
           '[field](config.md). `--help` lists the flags, `--flagfile=FILE` reads them from a '
           'file, `--verbosity=1` shows where an error was raised.', '',
           'Exit codes: 0, done; 75, a signal came and the state is saved; 2, the call was '
           'refused; 1, it failed and may succeed later; 124, the watchdog.', '']
  for name in (*PROGRAMS, *TOOLS):
    module = importlib.import_module(f'jaxllm.{name}')
    text = (module.__doc__ or '').strip()
    lines += [f'## {name}', '', text.replace('\n    ', '\n\n        '), '',
              '| flag | default | |', '|---|---|---|']
    values = module.FLAGS.values
    for flag in values:
      one = values[flag]
      if one.name == flag and not flag.startswith('?'):
        needed = any('other than None' in check.message for check in one.validators)
        default = 'required' if needed else f'`{one.default}`'
        choices = getattr(one.parser, 'enum_values', None)
        choice = f' ({", ".join(choices)})' if choices else ''
        lines.append(f'| `--{flag}` | {default} | {cell(one.help)}{choice} |')
    lines.append('')
  return '\n'.join(lines)


def named(text: str) -> list[str]:
  """Return the names of the package that stand in a page as code."""
  return re.findall(r'`(jaxllm\.[\w.]+)`', text)


def place(name: str) -> tuple[str, int]:
  """Return the file, without its ending, and the line where a name of a module is defined."""
  module, _, last = name.rpartition('.')
  path = ROOT / f'{module.replace(".", "/")}.py'
  for node in ast.parse(path.read_text(encoding='utf-8')).body:
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, 'targets', [])
    if last in (getattr(node, 'name', None), *(getattr(one, 'id', None) for one in targets)):
      return module.replace('.', '/'), node.lineno
  raise ValueError(f'{MATHEMATICS.name}: there is no {name}')


def source_page(module: str) -> str:
  """Return a file of the package as a page with numbered lines."""
  text = (ROOT / f'{module}.py').read_text(encoding='utf-8')
  return ('---\nsearch:\n  exclude: true\n---\n\n'
          f'# {module}.py\n\n````python linenums="1"\n{text}````\n')


def excerpt(file: str, begin: str, end: str) -> str:
  """Return a part of a file as a page."""
  text = (ROOT / file).read_text(encoding='utf-8')
  if begin:
    text = '# ' + begin.lstrip('# ') + text.partition(begin)[2]
  return text.partition(f'\n{end}')[0] if end else text
