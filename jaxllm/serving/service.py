"""From bodies of requests to the engine: tokens, constraints, limits.

`Service` knows the model's tokenizer, template and limits, and turns a body into a `Plan`; that
takes time, and runs in threads.
"""

import contextlib
import functools
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from starlette.responses import JSONResponse, Response

from jaxllm.generation.constraint import JsonConstraint, JsonConstraints
from jaxllm.generation.sampling import MAX_SEED, SamplingConfig
from jaxllm.generation.text import text_of
from jaxllm.interop import chat as templates
from jaxllm.model import Model
from jaxllm.serving import bodies, protocol
from jaxllm.serving.access import ApiError, LimitsConfig, busy, invalid, unavailable
from jaxllm.serving.engine import Engine
from jaxllm.serving.middleware import Metrics
from jaxllm.serving.protocol import ChatCompletionRequest, GenerationRequest, Prompt
from jaxllm.serving.responses import Answer, Names
from jaxllm.serving.shares import Budget, Workers
from jaxllm.serving.streams import ClosedError, QueueFullError, Request

THREADS, SCHEMA_THREADS = 4, 2
# Entries of an answer that are encoded in a moment.
MAX_ENTRIES = 10_000
_JSON = '{"a": [-1.5, true]}'
T = TypeVar('T')
R = TypeVar('R', bound=protocol.ModelRequest)


class Plan(NamedTuple):
  """What a request of text asks of the engine, one request per choice, and its answer."""

  requests: tuple[Request, ...]
  answer: Answer


class Service:
  """A model, by the name that clients know, and what may be asked of it.

  `shared`: whether there are several clients that are told apart.
  """

  def __init__(self, model: Model, engine: Engine, name: str, limits: LimitsConfig,
               shared: bool = False):
    self.engine, self.name, self.tokenizer = engine, name, model.tokenizer
    self._context_length, most = engine.context_length, engine.config
    room = most.num_slots + most.max_queue
    self.limits = limits.replace(
      # More could never be taken, however long a client waits.
      max_rows=min(limits.max_rows, max(3 * room // 4, 1) if shared else room),
      max_text_bytes=limits.max_text_bytes or max(32 * self._context_length, 200_000),
      max_prompt_tokens=min(limits.max_prompt_tokens or self._context_length,
                            self._context_length - 1))
    self.created = int(time.time())
    self.active = Budget(limits.max_concurrency, 'too many requests are being worked on')
    self.buffered = Budget(limits.max_buffered_bytes, 'too many bodies are coming in')
    self.metrics = Metrics(engine, lambda: self.active.used)
    self._model = model
    self._vocab_size = min(model.config.vocab_size, model.tokenizer.vocab_size)
    self._names = Names(model.tokenizer)
    self._template = '\n'.join(model.tokenizer.chat_templates.values())
    self._workers = Workers(THREADS, 'jaxllm-tokens')
    # What may compile a schema, which can take seconds, keeps nobody else waiting.
    self._schema_workers = Workers(SCHEMA_THREADS, 'jaxllm-schemas')

  async def read(self, client: str, body: bytes, work: Callable[..., T], *args: Any) -> T:
    """Return what `work` makes of a body, computed off the event loop."""
    workers = self._schema_workers if b'json_' in body else self._workers
    return await workers.run(client, len(body), work, body, *args)

  async def write(self, client: str, size: int, work: Callable[[], Any]) -> Response:
    """Return the response with what `work` makes; `size` is the number of its entries."""
    if size <= MAX_ENTRIES:
      return JSONResponse(work())
    # Encoding at once would let no other thread run until the end.
    parts = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(',', ':')).iterencode
    content = await self._workers.run(client, size, lambda: ''.join(parts(work())).encode())
    return Response(content, media_type='application/json')

  def close(self) -> None:
    """Let the threads go."""
    self._workers.close()
    self._schema_workers.close()

  def completion(self, body: bytes, client: str = '') -> Plan:
    """Plan the answer to the body of a completion, or raise an ApiError."""
    request = self._read(protocol.CompletionRequest, body)
    prompts = self._tokens('prompt', request.prompt)
    echoes = [None] * len(prompts) if not request.echo else [
      prompt if isinstance(prompt, str) else text_of(self.tokenizer, prompt)
      for prompt in request.prompt]
    return self._plan(request, prompts, echoes, client)

  def chat(self, body: bytes, client: str = '') -> Plan:
    """Plan the answer to the body of a chat completion, or raise an ApiError."""
    request = self._read(protocol.ChatCompletionRequest, body)
    if self._model.chat_format is None:
      raise invalid('messages', 'this model has no chat template; send a text to /v1/completions',
                    'no_chat_template')
    self._check_template(request)
    self._check_size('messages', sum(len(one['content']) for one in request.messages))
    with _expressible('messages'):
      ids = self._model.chat_format.encode(request.messages, **request.variables)
    return self._plan(request, [self._fitting('messages', ids)], [None], client)

  def _check_template(self, request: protocol.ChatCompletionRequest) -> None:
    """Refuse by name what the chat template would pass over."""
    needed = [('tools', r'\btools\b')] if 'tools' in request.variables else []
    for index, message in enumerate(request.messages):
      needed += [(f'messages[{index}].tool_calls', r'\btool_calls\b')] * ('tool_calls' in message)
      needed += [(f'messages[{index}].role', r'["\']tool["\']')] * (message['role'] == 'tool')
    if effort := request.reasoning_effort:
      needed.append(('reasoning_effort', r'\breasoning_effort\b' + (
        r'|\benable_thinking\b' if effort == 'none' else '')))
    for name, pattern in needed:
      if not re.search(pattern, self._template):
        raise invalid(name, 'the chat template of this model does not read it; leave it out',
                      'unsupported_field')

  def embedding(self, body: bytes) -> tuple[list[Request], bool]:
    """Return the requests of an embedding, and whether it is wanted as base64."""
    request = self._read(protocol.EmbeddingRequest, body)
    sampling = SamplingConfig(max_new_tokens=1)
    return [Request(prompt, sampling, 0, pool=True)
            for prompt in self._tokens('input', request.input)], request.encoding_format == 'base64'

  def tokenize(self, body: bytes) -> list[int]:
    """Return the tokens of the body of a tokenize request.

    Unlike in prompts and messages, spelled special tokens become tokens: so a client learns their
    ids, and can render a chat template by itself.
    """
    request = self._read(protocol.TokenizeRequest, body)
    begin = self._model.encode_prompt('') if request.add_special_tokens else []
    self._check_size('prompt', len(request.prompt))
    with _expressible('prompt'):
      return begin + templates.encode_with_special(self.tokenizer, request.prompt)

  def detokenize(self, body: bytes) -> str:
    """Return the text of the tokens in the body of a detokenize request."""
    return text_of(self.tokenizer, self._read(protocol.DetokenizeRequest, body).tokens)

  def tokenizer_info(self) -> dict[str, Any]:
    """Return what clients need to know of the tokenizer."""
    named = {token: text for text, token in self.tokenizer.special_tokens.items()}
    ids = {'bos_token': self.tokenizer.bos_id, 'eos_token': self.tokenizer.eos_id,
           'pad_token': self.tokenizer.pad_id}
    return {
      'tokenizer_class': 'jaxllm', 'vocab_size': self._vocab_size,
      'model_max_length': self._context_length, 'add_bos_token': self._model.add_bos,
      **{name: named.get(value) if value is not None else None for name, value in ids.items()},
      'chat_template': self.tokenizer.chat_template}

  def check_model(self, model: str | None) -> None:
    """Raise an `ApiError` if a model is named that is not this one."""
    if model is not None and model != self.name:
      raise ApiError(404, f'model: there is no such model; this server has {self.name!r}', 'model',
                     'model_not_found')

  def _read(self, model: type[R], body: bytes) -> R:
    request = bodies.read(
      model, bodies.parse(body), limits=self.limits, vocab_size=self._vocab_size)
    self.check_model(request.model)
    return request

  def _tokens(self, name: str, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    result = []
    for index, prompt in enumerate(prompts):
      at = name if len(prompts) == 1 else f'{name}[{index}]'
      self._check_size(at, len(prompt))
      with _expressible(at):
        ids = self._model.encode_prompt(prompt) if isinstance(prompt, str) else prompt
      result.append(self._fitting(at, ids))
    return result

  def _check_size(self, name: str, size: int) -> None:
    """Refuse a text that could keep a thread busy for long."""
    if size > (most := self.limits.max_text_bytes or size):
      raise invalid(name, f'longer than {most} characters or ids; send less of it',
                    'context_length_exceeded')

  def _fitting(self, name: str, ids: Sequence[int]) -> tuple[int, ...]:
    most = self.limits.max_prompt_tokens or 0
    if not 1 <= len(ids) <= most:
      raise invalid(name, f'{len(ids)} tokens, where 1 to {most} are accepted; the context has '
                          f'{self._context_length}', 'context_length_exceeded')
    return tuple(ids)

  def _plan(self, request: GenerationRequest, prompts: Sequence[tuple[int, ...]],
            echoes: Sequence[str | None], client: str) -> Plan:
    rows = len(prompts) * request.n
    if rows > self.limits.max_rows:
      raise invalid('n', f'{len(prompts)} prompts times n={request.n} are more than '
                         f'{self.limits.max_rows} choices; send several requests')
    room = self._context_length - max(map(len, prompts))
    length = request.length
    if length is None:
      length = max(min(room, self.limits.max_new_tokens // rows), 1)
    if length > room:
      raise invalid('max_tokens', f'{bodies.shown(length)} tokens after {max(map(len, prompts))} '
                    f'of the prompt do not fit the context of {self._context_length}; at most '
                    f'{room} do', 'context_length_exceeded')
    if length * rows > self.limits.max_new_tokens:
      raise invalid('max_tokens', f'{length} tokens for each of {rows} choices are more than '
                    f'{self.limits.max_new_tokens}; ask for fewer')
    turn = self._model.chat_format if isinstance(request, ChatCompletionRequest) else None
    constraint = self._constraint(request, client)
    # What is bound to a schema ends when that is complete, not where a text happens to stand.
    ends = turn.stop if turn and constraint is None else ()
    score_prompt = request.num_top is not None and echoes[0] is not None
    sampling = request.sampling.replace(
      max_new_tokens=length,
      # Clients that only score a prompt count on one more token, which EOS would not be.
      min_new_tokens=int(score_prompt and length == 1))
    requests = tuple(
      Request(prompt, sampling, _seed(request.seed, choice), turn.eos_token_ids if turn else (),
              (*request.stop, *ends), request.num_top or 0, score_prompt,
              constraint and constraint.copy())
      for prompt in prompts for choice in range(request.n))
    echoes = [echo for echo in echoes for _ in range(request.n)]
    return Plan(requests, Answer(request, self._names, echoes, sum(map(len, prompts))))

  def _constraint(self, request: GenerationRequest, client: str) -> JsonConstraint | None:
    if (schema := request.text_schema) is None:
      return None
    if self._constraints is None:
      raise invalid('response_format', 'the vocabulary of this model cannot spell JSON; leave it '
                                       'out')
    try:
      return self._constraints.schema(schema, client)
    except ValueError as error:
      raise invalid('response_format.json_schema.schema', str(error)[:300]) from None

  @functools.cached_property
  def _constraints(self) -> JsonConstraints | None:
    tokenizer = self.tokenizer
    # Of some tokenizers the text of ids is not that of the bytes of each.
    ids = tokenizer.encode(_JSON)
    joined = b''.join(tokenizer.id_bytes[token] for token in ids).decode(errors='replace')
    if not joined.strip() == text_of(tokenizer, ids).strip() == _JSON:
      return None
    try:
      return JsonConstraints(tokenizer.id_bytes, sorted(tokenizer.eos_token_ids),
                             self._model.config.vocab_size)
    except ValueError:
      return None


@contextlib.contextmanager
def _expressible(name: str) -> Iterator[None]:
  """Name the field whose text cannot become tokens."""
  try:
    yield
  except templates.TemplateError as error:
    raise invalid(name, str(error)[:200], 'chat_template') from None
  except ValueError:
    raise invalid(name, 'the tokenizer cannot express the text') from None


def _seed(seed: int | None, choice: int) -> int:
  if seed is None:
    return secrets.randbelow(MAX_SEED + 1)
  return (seed + choice) % (MAX_SEED + 1)


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
  """Turn what the engine raises when it takes requests into errors for their client."""
  try:
    yield
  except QueueFullError:
    raise busy('too many requests wait; come back later') from None
  except ClosedError:
    raise unavailable('the server takes no requests any more', 'closed') from None
  except ValueError as error:
    raise invalid(None, str(error)[:200]) from None
