"""The HTTP side: routes, answers, streams. `make_app` puts them together."""

import asyncio
import base64
import contextlib
import dataclasses
import importlib.resources
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

import numpy as np
from starlette.routing import Route, Router

from jaxllm.generation.constraint import ConstraintError
from jaxllm.serving import responses
from jaxllm.serving.engine import ClosedError, Engine, FailedError, QueueFullError, Ticket
from jaxllm.serving.errors import ApiError, invalid, unavailable
from jaxllm.serving.limits import (
  Disconnected,
  Guard,
  Keys,
  Receive,
  Scope,
  Send,
  log_failure,
  read_body,
)
from jaxllm.serving.metrics import Sample
from jaxllm.serving.responses import Choice, Delta
from jaxllm.serving.service import Plan, Service, gather

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]

PAGE_TYPES = {'html': 'text/html; charset=utf-8', 'css': 'text/css; charset=utf-8',
              'js': 'text/javascript; charset=utf-8'}
_STREAM_HEADERS = [(b'content-type', b'text/event-stream; charset=utf-8'),
                   (b'cache-control', b'no-cache'), (b'x-accel-buffering', b'no')]


def make_app(service: Service, keys: Keys, hosts: Sequence[str] | None = None) -> Guard:
  """Return the ASGI app.

  Args:
    service: the model and its engine.
    keys: who may ask; none: everyone.
    hosts: names that the server goes by; None: any.
  """
  page = _page_files()

  routes = [
    ('GET', '/', _file(page, 'index.html')),
    ('GET', '/static/{name}', _file(page, None)),
    ('GET', '/health', _alive(service.engine, 'ok', FailedError)),
    ('GET', '/ready', _alive(service.engine, 'ready', ClosedError)),
    ('GET', '/metrics', _metrics(service)),
    ('GET', '/v1/models', _constant({'object': 'list', 'data': [_model(service)]})),
    ('GET', '/v1/models/{model:path}', _one_model(service)),
    ('POST', '/v1/completions', _generate(service, service.completion)),
    ('POST', '/v1/chat/completions', _generate(service, service.chat)),
    ('POST', '/v1/embeddings', _embed(service)),
    ('GET', '/tokenizer_info', _constant(service.tokenizer_info())),
    ('POST', '/tokenize', _compute(
      service, service.tokenize, lambda tokens: {'tokens': tokens, 'count': len(tokens)})),
    ('POST', '/detokenize', _compute(
      service, service.detokenize, lambda text: {'prompt': text})),
  ]
  router = Router([Route(path, _Endpoint(path, handler), methods=[method])
                   for method, path, handler in routes], redirect_slashes=False)
  return Guard(router, keys, hosts, service.metrics)


@dataclasses.dataclass(frozen=True)
class _Endpoint:
  """A handler that tells the guard which route it is."""

  path: str
  handler: Handler

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    scope['jaxllm.route'] = self.path
    await self.handler(scope, receive, send)


def _generate(service: Service, make_plan: Callable[[bytes], Plan]) -> Handler:
  """Answer by text."""
  async def handle(scope: Scope, receive: Receive, send: Send) -> None:
    started = time.monotonic()
    with service.admitted():
      body = await read_body(scope, receive, service.limits)
      plan = await service.in_thread(make_plan, body)
      tickets = service.submit(plan)
      answer = _stream if plan.request.stream else _whole
      try:
        await _while_connected(receive, answer(service, plan, tickets, send, started))
      finally:
        for ticket in tickets:
          ticket.cancel()

  return handle


async def _whole(service: Service, plan: Plan, tickets: Sequence[Ticket], send: Send,
                 started: float) -> None:
  deltas: list[list[Delta]] = [[Delta(index)] for index in range(len(tickets))]
  choices = _choices(plan)
  async with _answering(service):
    async with contextlib.aclosing(gather(tickets, service.metrics, started)) as pieces:
      async for row, piece in pieces:
        deltas[row].append(choices[row].take(piece))
    content = responses.whole(plan.answer, [responses.total(parts) for parts in deltas],
                              plan.prompt_tokens, sum(choice.num_tokens for choice in choices))
    await send_json(send, content)


async def _stream(service: Service, plan: Plan, tickets: Sequence[Ticket], send: Send,
                  started: float) -> None:
  """Send server-sent events; an error after the first is an event too, the last one."""
  choices, begun = _choices(plan), set[int]()

  async def event(content: Any) -> None:
    text = content if isinstance(content, str) else _json(content)
    await send({'type': 'http.response.body', 'body': f'data: {text}\n\n'.encode(),
                'more_body': True})

  await send({'type': 'http.response.start', 'status': 200, 'headers': _STREAM_HEADERS})
  try:
    async with _answering(service):
      async with contextlib.aclosing(gather(tickets, service.metrics, started)) as pieces:
        async for row, piece in pieces:
          delta = choices[row].take(piece)
          if row in begun and not (delta.text or delta.scored or delta.finish_reason):
            continue
          await event(responses.chunk(plan.answer, delta, row not in begun))
          begun.add(row)
      if plan.answer.include_usage:
        await event(responses.last_chunk(plan.answer, plan.prompt_tokens,
                                         sum(choice.num_tokens for choice in choices)))
      await event('[DONE]')
  except ApiError as error:
    await event(error.content())
  except Exception as error:  # noqa: BLE001 - told to the client, and logged.
    log_failure(error)
    await event(ApiError(500, 'the server failed; it is not your request').content())
  await send({'type': 'http.response.body', 'body': b'', 'more_body': False})


def _choices(plan: Plan) -> list[Choice]:
  return [Choice(plan.answer.names, index, echo, plan.answer.scored)
          for index, echo in enumerate(plan.echoes)]


@contextlib.asynccontextmanager
async def _answering(service: Service) -> AsyncIterator[None]:
  """Turn what can go wrong while a request is answered into errors for its client."""
  seconds = service.limits.request_seconds
  try:
    async with asyncio.timeout(seconds):
      yield
  except TimeoutError:
    # Tried again it would take as long.
    raise unavailable(f'the answer took more than {seconds:g} seconds; ask for fewer tokens',
                      'request_timeout', again=False) from None
  except ClosedError:
    raise unavailable('the server stopped before the answer was complete', 'closed') from None
  except ConstraintError as error:
    raise invalid('response_format', str(error)) from None


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
  """Do work until it is done or the client goes away.

  Raises:
    Disconnected: the client has gone, and the work was cancelled.
    Exception: what the work raises.
  """
  async def gone() -> None:
    while (await receive())['type'] != 'http.disconnect':
      pass
    task.cancel()

  # In the task of the request, so that nothing lies between the last bytes of an answer and the end
  # of the request: who then asks again is not refused for what was answered.
  task = cast(asyncio.Task[None], asyncio.current_task())
  watching = asyncio.create_task(gone())
  try:
    await work
  except asyncio.CancelledError:
    if not watching.done() or watching.exception():
      raise
    task.uncancel()
    raise Disconnected from None
  finally:
    watching.cancel()


def _embed(service: Service) -> Handler:
  async def handle(scope: Scope, receive: Receive, send: Send) -> None:
    with service.admitted():
      body = await read_body(scope, receive, service.limits)
      prompts, as_base64 = await service.in_thread(service.embedding, body)
      vectors = service.embed(prompts)

      async def answer() -> None:
        async with _answering(service):
          found = await asyncio.wrap_future(vectors)
          data = [{'object': 'embedding', 'index': index,
                   'embedding': _base64(vector) if as_base64 else vector.tolist()}
                  for index, vector in enumerate(found)]
          count = sum(map(len, prompts))
          await send_json(send, {'object': 'list', 'data': data, 'model': service.name,
                                 'usage': {'prompt_tokens': count, 'total_tokens': count}})

      try:
        await _while_connected(receive, answer())
      finally:
        vectors.cancel()

  return handle


def _compute(service: Service, work: Callable[[bytes], Any], content: Callable[[Any], Any]
             ) -> Handler:
  """Answer by what `work` makes of the body, in a thread."""
  async def handle(scope: Scope, receive: Receive, send: Send) -> None:
    with service.admitted():
      body = await read_body(scope, receive, service.limits)
      await send_json(send, content(await service.in_thread(work, body)))

  return handle


def _constant(content: Any) -> Handler:
  async def handle(scope: Scope, receive: Receive, send: Send) -> None:
    await send_json(send, content)

  return handle


def _model(service: Service) -> dict[str, Any]:
  return {'id': service.name, 'object': 'model', 'created': service.created,
          'owned_by': 'jaxllm'}


def _one_model(service: Service) -> Handler:
  async def handle(scope: Scope, receive: Receive, send: Send) -> None:
    service.check_model(scope['path_params']['model'])
    await send_json(send, _model(service))

  return handle


def _alive(engine: Engine, status: str, error: type[ClosedError]) -> Handler:
  """Answer whether the engine works: 503 where it refuses, by this error, to take anything."""
  async def handle(scope: Scope, receive: Receive, send: Send) -> None:
    try:
      engine.submit([])
    except QueueFullError:
      pass
    except ClosedError as caught:
      if isinstance(caught, error):
        raise unavailable('the engine takes no requests any more', 'closed') from None
    await send_json(send, {'status': status})

  return handle


def _metrics(service: Service) -> Handler:
  async def handle(scope: Scope, receive: Receive, send: Send) -> None:
    text = service.metrics.text(_measured(service.engine, service.active))
    await _send(send, text.encode(), 'text/plain; version=0.0.4; charset=utf-8')

  return handle


def _measured(engine: Engine, active: int) -> list[tuple[str, str, list[Sample]]]:
  """Return the metrics of the engine, now."""
  now = engine.statistics()
  counters = ('prompt_tokens', 'completion_tokens', 'prefix_hit_tokens', 'decode_steps',
              'compilations')
  gauges = {'requests_active': active, 'queue_rows': now.queued, 'slots': now.num_slots,
            'slots_busy': now.busy_slots, 'batch_fill_ratio': now.busy_slots / now.num_slots,
            'cache_tokens': now.cached_tokens, 'cache_capacity_tokens': now.capacity_tokens,
            'cache_fill_ratio': now.cached_tokens / now.capacity_tokens}
  measured: list[tuple[str, str, list[Sample]]] = [
    (f'jaxllm_{name}_total', 'counter', [({}, getattr(now, name))]) for name in counters]
  measured += [(f'jaxllm_{name}', 'gauge', [({}, value)]) for name, value in gauges.items()]
  rows: list[Sample] = [({'reason': reason}, count)
                        for reason, count in sorted(now.finished.items())]
  return [*measured, ('jaxllm_rows_finished_total', 'counter', rows)]


def _page_files() -> dict[str, bytes]:
  """Return the files of the page by name; nothing else can be asked for."""
  folder = importlib.resources.files('jaxllm.serving') / 'page'
  if not folder.is_dir():
    return {}
  return {file.name: file.read_bytes() for file in folder.iterdir()
          if file.name.rpartition('.')[2] in PAGE_TYPES}


def _file(files: dict[str, bytes], name: str | None) -> Handler:
  async def handle(scope: Scope, receive: Receive, send: Send) -> None:
    wanted = name or scope['path_params']['name']
    if wanted not in files:
      raise ApiError(404, 'there is no such file', code='not_found')
    await _send(send, files[wanted], PAGE_TYPES[wanted.rpartition('.')[2]])

  return handle


def _base64(vector: np.ndarray) -> str:
  return base64.b64encode(vector.astype('<f4').tobytes()).decode()


def _json(content: Any) -> str:
  return json.dumps(content, allow_nan=False, separators=(',', ':'))


async def send_json(send: Send, content: Any) -> None:
  """Send content as the whole response."""
  await _send(send, _json(content).encode(), 'application/json')


async def _send(send: Send, body: bytes, content_type: str) -> None:
  headers = [(b'content-type', content_type.encode()),
             (b'content-length', str(len(body)).encode())]
  await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
  await send({'type': 'http.response.body', 'body': body})
