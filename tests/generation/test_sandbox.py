"""Programs from outside: each runs in a fork with limits, which leaves nothing for the next."""

import concurrent.futures
import os
import signal
import subprocess
import sys

import pytest

from jaxllm.generation import sandbox


def render(template, variables=None, cpu_seconds=2):
  return sandbox.run('render', cpu_seconds, 512_000_000, template=template, max_characters=10**6,
                     variables=[variables or {}])


def test_a_process_serves_again_and_what_fails_ends_alone():
  assert render('{{ 1 + 1 }}') == ['2']
  worker = sandbox._idle[-1]
  for template, message in [('{{ ("x" * 10 ** 9) | length }}', 'memory'), ('{{', 'TemplateSyntax'),
                            ('{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}'
                             '{% endfor %}', 'more than 1 s of CPU time')]:
    with pytest.raises(sandbox.SandboxError, match=message):
      render(template, cpu_seconds=1)
    assert sandbox._idle[-1] is worker
  assert render('{{ a }}', {'a': 'é\n'}) == ['é\n']


def test_requests_at_once_have_processes_of_their_own():
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    texts = pool.map(lambda index: render('{{ a }}', {'a': str(index) * 10_000}), range(12))
    assert list(texts) == [[str(index) * 10_000] for index in range(12)]


def test_a_process_that_was_ended_is_replaced():
  render('')
  for worker in list(sandbox._idle):
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
  assert render('b') == ['b']


def test_a_fork_does_not_share_them():
  script = ('import os; from jaxllm.generation import sandbox; '
            'sandbox.run("render", 2, 10**9, template="", max_characters=1, variables=[]); '
            'assert sandbox._idle; child = os.fork(); '
            'child or os._exit(len(sandbox._idle)); '
            'os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))')
  assert subprocess.run([sys.executable, '-c', script], check=False).returncode == 0
