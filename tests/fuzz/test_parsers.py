"""Damaged files are refused as such: nothing else escapes from what reads them.

JAXLLM_FUZZ_SECONDS=600 JAXLLM_FUZZ_SEED=$RANDOM make test looks for longer, and elsewhere.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.fuzz import parsers


@pytest.mark.parametrize('group', [*parsers.GROUPS])
def test_mutated_files_are_read_or_refused(group):
  seconds = os.environ.get('JAXLLM_FUZZ_SECONDS', '3')
  command = [sys.executable, '-m', 'tests.fuzz.parsers', group, seconds]
  done = subprocess.run([*command, os.environ.get('JAXLLM_FUZZ_SEED', '0')], capture_output=True,
                        text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  result = json.loads(done.stdout.strip().split('\n')[-1])
  assert result['files'] > 20 and not result['found'], result
