"""The requests need the packages of the extra `serve`, and httpx."""

import importlib.util

_NEEDED = ('starlette', 'uvicorn', 'httpx')
collect_ignore = [] if all(map(importlib.util.find_spec, _NEEDED)) else ['test_requests.py']
