"""Compiles a grammar in a process of its own, where it can take neither all time nor all memory.

Reads {"grammar": ..., "cpu_seconds": ..., "memory_bytes": ...} and writes {"error": text}; '' means
that it compiled. Imports nothing of jaxllm.
"""

import json
import resource
import sys


def main() -> None:
  """Answer one request."""
  import llguidance

  request = json.load(sys.stdin)
  seconds = request['cpu_seconds']
  resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
  resource.setrlimit(resource.RLIMIT_AS, (request['memory_bytes'],) * 2)
  matcher = llguidance.LLMatcher(llguidance.LLTokenizer('byte'), request['grammar'], log_level=0)
  json.dump({'error': matcher.get_error()}, sys.stdout)


if __name__ == '__main__':
  main()
