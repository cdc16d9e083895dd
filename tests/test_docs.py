"""The documentation site holds together; `make docs` builds it and proves the rest.

What is proven here needs none of the site's packages: every page is in the navigation, once, and
every link from page to page leads to a file and to a heading in it.
"""

import importlib
import pathlib
import posixpath
import re
import sys
import types

import pytest
import yaml

from jaxllm.objectives import preference
from jaxllm.optim import optimizers

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PAGES = sorted(DOCS.rglob('*.md'))
# Pages that docs/hooks.py makes.
MADE = re.compile(r'reference/|project/|figures\.md')
LINK = re.compile(r'(?<!!)\[[^\]]*\]\(([^)\s]+)\)')


def entries(node):
  if isinstance(node, str):
    yield node
  for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
    yield from entries(inner)


def without_code(text):
  return re.sub(r'^( *)```.*?^\1```', '', text, flags=re.S | re.M)


def anchors(text):
  """Return the anchors that the site gives to the headings of a page."""
  found = set()
  for title in re.findall(r'^#+ (.+)$', without_code(text), re.M):
    own = re.search(r'\{#([\w-]+)\}$', title)
    plain = re.sub(r'[^\w\s-]', '', title.lower()).strip()
    found.add(own[1] if own else re.sub(r'[-\s]+', '-', plain))
  return found


def test_every_page_is_in_the_navigation_once():
  listed = list(entries(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav']))
  assert len(listed) == len(set(listed))
  written = {name for name in listed if not MADE.match(name)} - {'ROOMS'}
  assert written == {str(path.relative_to(DOCS)) for path in PAGES}


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_links_lead_somewhere(path):
  text = without_code(path.read_text(encoding='utf-8'))
  for target in LINK.findall(re.sub(r'`[^`\n]*`', 'code', text)):
    if target.startswith(('http://', 'https://')):
      continue
    name, _, anchor = target.partition('#')
    here = str(path.relative_to(DOCS))
    page = posixpath.normpath(posixpath.join(posixpath.dirname(here), name)) if name else here
    if MADE.match(page):
      continue
    assert (DOCS / page).is_file(), f'{here}: {target}'
    if anchor:
      assert anchor in anchors((DOCS / page).read_text(encoding='utf-8')), f'{here}: {target}'


def test_formulas_lead_to_code_that_exists():
  """The site links each name to its line: docs/hooks.py."""
  names = re.findall(r'`(jaxllm\.[\w.]+)`', (DOCS / 'mathematics.md').read_text(encoding='utf-8'))
  assert len(names) > 30
  for name in names:
    module, _, last = name.rpartition('.')
    value = vars(importlib.import_module(module))[last]
    assert getattr(value, '__module__', module) == module, name


def test_losses_and_optimizers_have_their_formula():
  text = (DOCS / 'mathematics.md').read_text(encoding='utf-8')
  for name in (*preference.FORMULAS, *optimizers.OPTIMIZERS):
    assert re.search(rf'^\| `{name}` \| .*\$', text, re.M), name


def commands(path):
  """Return the commands and lines of Python of a page, without comments."""
  blocks = re.findall(r'^```(?:python)?\n(.*?)^```', path.read_text(encoding='utf-8'), re.S | re.M)
  lines = [re.sub(r'(^|\s+)#.*', '', line) for block in blocks if '\n  benchmarks/' not in block
           for line in block.split('\n')]
  return [line for line in lines if line.strip()]


@pytest.mark.parametrize('english, chinese', [
  (ROOT / 'README.md', ROOT / 'README.zh-CN.md'), (DOCS / 'start.md', DOCS / 'zh/start.md'),
], ids=['README', 'start'])
def test_chinese_pages_hold_the_same_commands(english, chinese):
  assert commands(english) == commands(chinese) and len(commands(english)) > 7
  for one, other in ((english, chinese), (chinese, english)):
    link = posixpath.relpath(other, one.parent)
    assert f']({link})' in one.read_text(encoding='utf-8'), f'{one.name} has no link to {link}'


def test_the_pages_that_are_made_need_nothing_that_is_gone(monkeypatch):
  for name in ('latex2mathml', 'mkdocs', 'mkdocs.config', 'mkdocs.config.defaults',
               'mkdocs.structure', 'mkdocs.structure.files'):
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(
      converter=None, MkDocsConfig=None, File=None, Files=None, InclusionLevel=None))
  monkeypatch.syspath_prepend(DOCS)
  hooks = importlib.import_module('hooks')
  assert '## DecoderConfig' in hooks.config_page()
  assert 'jaxllm.prepare' in hooks.commands_page() and 'generate' in hooks.public_page()
  assert all(hooks.room_page(name) for name in hooks.rooms())
  monkeypatch.delitem(sys.modules, 'hooks')
