"""The HTTP tests need the packages of the extra `serve`, and OpenAI's client."""

import importlib.util

_NEEDED = ('starlette', 'uvicorn', 'httpx', 'openai')
collect_ignore = [] if all(map(importlib.util.find_spec, _NEEDED)) else [
  'test_app.py', 'test_hostile.py', 'test_local_completions.py', 'test_page.py',
  'test_protocol.py', 'test_shares.py',
]
