"""Damaged files are refused as such: nothing else escapes from what reads them.

JAXLLM_FUZZ_SECONDS=600 JAXLLM_FUZZ_SEED=$RANDOM make test looks for longer, and elsewhere.
"""

import json
import os
import subprocess
import sys

from tests.fuzz import parsers


def test_mutated_files_are_read_or_refused():
  seconds = os.environ.get('JAXLLM_FUZZ_SECONDS', '0.5')
  command = [sys.executable, '-m', 'tests.fuzz.parsers', 'all', seconds]
  done = subprocess.run([*command, os.environ.get('JAXLLM_FUZZ_SEED', '0'), '20'],
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  results = [*map(json.loads, filter(None, done.stdout.split('\n')))]
  assert [one['group'] for one in results] == [*parsers.GROUPS]
  for one in results:
    assert one['files'] >= 20 and not one['found'], one
