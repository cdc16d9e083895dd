"""Each promise of SECURITY.md names tests that are there."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def test_every_promise_names_a_test_that_is_there():
  rows = [line.split('|')[1:3] for line in (ROOT / 'SECURITY.md').read_text().splitlines()
          if line.startswith('| ') and not line.startswith(('| promise', '|--'))]
  assert len(rows) > 15
  for promise, tests in rows:
    names = re.findall(r'`([^`]+)`', tests)
    assert names, promise
    file = None
    for name in names:
      path, _, function = name.partition('::')
      found = [*(ROOT / 'tests').rglob(pathlib.Path(path).name)] if path else [file]
      assert found and found[0] is not None, f'{promise}: {name}'
      file = found[0]
      if function:
        assert any(f'def {function}(' in one.read_text() for one in found), f'{promise}: {name}'
