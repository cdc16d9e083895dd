"""Compiles a grammar in a process of its own, where it can take neither all time nor all memory.

Reads {"grammar": ..., "cpu_seconds": ..., "memory_bytes": ...} and writes {"error": text,
"memory_bytes": number}; an error of '' means that it compiled. Imports nothing of jaxllm.
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
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  matcher = llguidance.LLMatcher(llguidance.LLTokenizer('byte'), request['grammar'], log_level=0)
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  json.dump({'error': matcher.get_error(), 'memory_bytes': 1024 * grown}, sys.stdout)


if __name__ == '__main__':
  main()
