"""The HTTP side: routes, answers, streams. `make_app` puts them together."""

import asyncio
import base64
import contextlib
import dataclasses
import functools
import importlib.resources
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from jaxllm.generation.constraint import ConstraintError
from jaxllm.serving import bodies
from jaxllm.serving.access import ApiError, Keys, invalid, unavailable
from jaxllm.serving.middleware import CONTENT_TYPE, RequestMiddleware, failure
from jaxllm.serving.responses import Answer, Delta
from jaxllm.serving.service import Plan, Service, engine_errors
from jaxllm.serving.streams import ClosedError, FailedError, QueueFullError, RequestStream

PAGE_TYPES = {'html': 'text/html', 'css': 'text/css', 'js': 'text/javascript'}


@dataclasses.dataclass(frozen=True)
class Call:
  """A request that was read: whose it is, when it began to come, and where its answer goes."""

  client: str
  body: bytes
  started: float
  send: Send


# From a call to its response; None: it has been sent.
Work = Callable[[Call], Awaitable[Response | None]]
_STREAM_HEADERS = [(b'content-type', b'text/event-stream; charset=utf-8'),
                   (b'cache-control', b'no-cache'), (b'x-accel-buffering', b'no')]


def make_app(service: Service, keys: Keys, hosts: Sequence[str] | None = None
             ) -> RequestMiddleware:
  """Return the ASGI app.

  Args:
    service: the model and its engine.
    keys: who may ask; none: everyone.
    hosts: names that the server goes by; None: any.
  """
  page = _page_files()
  model = {'id': service.name, 'object': 'model', 'created': service.created,
           'owned_by': 'jaxllm'}

  async def file(request: Request, name: str | None = None) -> Response:
    name = name or request.path_params['name']
    if name not in page:
      raise HTTPException(404)
    return Response(page[name], media_type=PAGE_TYPES[name.rpartition('.')[2]])

  async def statistics(request: Request) -> Response:
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)

  async def models(request: Request) -> Response:
    return JSONResponse({'object': 'list', 'data': [model]})

  async def one_model(request: Request) -> Response:
    service.check_model(request.path_params['model'])
    return JSONResponse(model)

  async def tokenizer_info(request: Request) -> Response:
    return JSONResponse(service.tokenizer_info())

  async def tokenize(call: Call) -> Response:
    tokens = await service.read(call.client, call.body, service.tokenize)
    return JSONResponse({'tokens': tokens, 'count': len(tokens)})

  async def detokenize(call: Call) -> Response:
    text = await service.read(call.client, call.body, service.detokenize)
    return JSONResponse({'prompt': text})

  gets: dict[str, Callable[[Request], Awaitable[Response]]] = {
    '/': functools.partial(file, name='index.html'), '/static/{name}': file,
    '/health': functools.partial(_alive, service, 'ok', FailedError),
    '/ready': functools.partial(_alive, service, 'ready', ClosedError),
    '/metrics': statistics, '/v1/models': models, '/v1/models/{model:path}': one_model,
    '/tokenizer_info': tokenizer_info}
  posts: dict[str, Work] = {
    '/v1/completions': functools.partial(_generate, service, service.completion),
    '/v1/chat/completions': functools.partial(_generate, service, service.chat),
    '/v1/embeddings': functools.partial(_embed, service),
    '/tokenize': tokenize, '/detokenize': detokenize}
  routes = [*(Route(path, endpoint) for path, endpoint in gets.items()),
            *(Route(path, _Post(service, work), methods=['POST'])
              for path, work in posts.items())]
  return RequestMiddleware(Router(routes, redirect_slashes=False), keys, hosts, service.metrics)


@dataclasses.dataclass(frozen=True)
class _Post:
  """An endpoint that reads a body and works as long as its client is connected."""

  service: Service
  work: Work

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    started, service, client = time.monotonic(), self.service, scope['jaxllm.client']

    async def respond() -> None:
      response = await self.work(Call(client, body, started, send))
      if response is not None:
        await response(scope, receive, send)

    with service.buffered.taking(client) as take, contextlib.suppress(ClientDisconnect):
      body = await bodies.receive(Request(scope, receive), service.limits, take)
      # Who only sends half a body takes no place from others.
      with service.active.taking(client) as enter:
        enter(1)
        await _while_connected(receive, respond())


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
  """Do work until it is done, or cancel it and raise ClientDisconnect when the client goes away."""
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
    raise ClientDisconnect from None
  finally:
    watching.cancel()


async def _generate(
  service: Service, make_plan: Callable[[bytes, str], Plan], call: Call
) -> Response | None:
  """Answer by text, whole or streamed."""
  plan = await service.read(call.client, call.body, make_plan, call.client)
  with engine_errors():
    stream = service.engine.submit(plan.requests, call.client)
  try:
    async with contextlib.aclosing(_deltas(service, plan.answer, stream, call.started)) as deltas:
      if plan.answer.stream:
        await _send_events(service, plan.answer, deltas, call.send)
        return None
      async with _answering(service):
        async for _ in deltas:
          pass
        return await service.write(call.client, plan.answer.num_entries, plan.answer.whole)
  finally:
    stream.cancel()


async def _deltas(
  service: Service, answer: Answer, stream: RequestStream, started: float
) -> AsyncGenerator[Delta, None]:
  """Yield what the choices of an answer gain, and note the times between their tokens."""
  times: dict[int, list[float]] = {}
  async for piece in stream:
    choice, now = answer.choices[piece.row], time.monotonic()
    delta = choice.take(piece)
    if choice.num_tokens and piece.tokens:
      if piece.row not in times:
        service.metrics.first_token_seconds.observe(now - started)
      times.setdefault(piece.row, [now, now])[1] = now
    if piece.finish_reason is not None and choice.num_tokens > 1:
      first, last = times[piece.row]
      service.metrics.token_seconds.observe((last - first) / (choice.num_tokens - 1))
    yield delta


async def _send_events(
  service: Service, answer: Answer, deltas: AsyncIterator[Delta], send: Send
) -> None:
  """Send server-sent events; an error after the first is an event too, the last one."""
  # Not by Starlette's response: the time limit has to hold while a client takes nothing.
  async def event(content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(
      content, allow_nan=False, separators=(',', ':'))
    await send({'type': 'http.response.body', 'body': f'data: {text}\n\n'.encode(),
                'more_body': True})

  await send({'type': 'http.response.start', 'status': 200, 'headers': _STREAM_HEADERS})
  begun = set[int]()
  try:
    async with _answering(service):
      async for delta in deltas:
        is_first = delta.index not in begun
        if is_first or delta.text or delta.scored or delta.finish_reason:
          await event(answer.chunk(delta, is_first))
          begun.add(delta.index)
      if answer.include_usage:
        await event(answer.last_chunk())
      await event('[DONE]')
  except ApiError as error:
    await event(error.content())
  except Exception as error:  # noqa: BLE001 - told to the client, and logged.
    await event(failure(error).content())
  await send({'type': 'http.response.body', 'body': b'', 'more_body': False})


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


async def _embed(service: Service, call: Call) -> Response:
  requests, as_base64 = await service.read(call.client, call.body, service.embedding)
  with engine_errors():
    stream = service.engine.submit(requests, call.client)
  try:
    async with _answering(service):
      found = [one.mean_D for one in sorted([one async for one in stream])]
  finally:
    stream.cancel()

  def whole() -> dict[str, Any]:
    data = [{'object': 'embedding', 'index': index,
             'embedding': base64.b64encode(vector.astype('<f4').tobytes()).decode() if as_base64
                          else vector.tolist()}
            for index, vector in enumerate(found)]
    count = sum(len(request.prompt) for request in requests)
    return {'object': 'list', 'data': data, 'model': service.name,
            'usage': {'prompt_tokens': count, 'total_tokens': count}}

  return await service.write(call.client, sum(vector.size for vector in found), whole)


async def _alive(
  service: Service, status: str, error: type[ClosedError], _: Request
) -> Response:
  """Answer whether the engine works: 503 where it refuses, by this error, to take anything."""
  try:
    service.engine.submit([])
  except QueueFullError:
    pass
  except ClosedError as caught:
    if isinstance(caught, error):
      raise unavailable('the engine takes no requests any more', 'closed') from None
  return JSONResponse({'status': status})


def _page_files() -> dict[str, bytes]:
  """Return the files of the page by name; nothing else can be asked for."""
  folder = importlib.resources.files('jaxllm.serving') / 'page'
  return {file.name: file.read_bytes() for file in folder.iterdir()
          if file.name.rpartition('.')[2] in PAGE_TYPES} if folder.is_dir() else {}
