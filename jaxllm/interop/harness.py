"""A model as lm-eval's, so that its tasks score it: the three requests, token for token.

    import lm_eval
    lm_eval.simple_evaluate(harness.language_model(jaxllm.load(path)), tasks=['...'])

What is cut, what is put before an empty context, and where an answer ends is as lm-eval's own `hf`
model does it. Needs the extra `harness`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.generation import scoring
from jaxllm.generation import text as texts
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.interop import chat
from jaxllm.model import Model

MAX_NEW_TOKENS = 256


def language_model(model: Model, batch_size: int = 8, max_length: int | None = None) -> Any:
  """Return a model as an `lm_eval.api.model.LM`.

  Args:
    model: from `jaxllm.load`.
    batch_size: answers that are written together.
    max_length: tokens of a window; None: the context of the model.

  Raises:
    ImportError: lm-eval is not installed.
    ValueError: `max_length` does not fit the model.
  """
  try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
  except ImportError as error:
    raise ImportError("this needs lm-eval: pip install 'jaxllm[harness]'") from error
  window = max_length or model.config.max_length
  if not 2 <= window <= model.config.max_length:
    raise ValueError(f'max_length={max_length}: between 2 and the context of the model, '
                     f'{model.config.max_length}')

  def log_likelihoods(pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    return scoring.score_continuations(
      model.decoder, model.unstacked, [context for context, _ in pairs],
      [target for _, target in pairs], window)

  class LanguageModel(TemplateLM):
    """See `language_model`; the methods are lm-eval's."""

    tokenizer_name = model.tokenizer.fingerprint
    max_length = window

    @property
    def eot_token_id(self) -> int:
      return _first_token(model.tokenizer.eos_id, model.tokenizer.bos_id)

    @property
    def prefix_token_id(self) -> int:
      return _first_token(model.tokenizer.bos_id, model.tokenizer.eos_id)

    def tok_encode(
      self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
      begins = model.add_bos and add_special_tokens is not False
      return _encode(model.tokenizer, string, begins, again=add_special_tokens is not None)

    def _loglikelihood_tokens(
      self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
      return log_likelihoods([(context, target) for _, context, target in requests])

    def loglikelihood_rolling(
      self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
      windows = [
        [utils.make_disjoint_window(pair) for pair in utils.get_rolling_token_windows(
          self.tok_encode(request.args[0]), self.prefix_token_id, window, context_len=1)]
        for request in requests
      ]
      flat = [pair for pairs in windows for pair in pairs]
      found = iter(log_likelihoods(flat))
      return [sum(next(found)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
      asked = [request.args for request in requests]
      options = [normalize_gen_kwargs(options, MAX_NEW_TOKENS) for _, options in asked]
      return _generate(
        model, [self.tok_encode(context) for context, _ in asked], options, window, batch_size
      )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
      return model.tokenizer.chat_template if chat_template else None

    def apply_chat_template(
      self, chat_history: list[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
      return _chat_text(model.tokenizer, chat_history, add_generation_prompt)

  return LanguageModel()


def _first_token(*ids: int | None) -> int:
  found = next((token for token in ids if token is not None), None)
  if found is None:
    raise ValueError('the tokenizer has neither BOS nor EOS, which lm-eval puts before a text')
  return found


def _encode(tokenizer: Tokenizer, text: str, begins: bool, again: bool) -> list[int]:
  """Return ids; BOS comes first where the text `begins`, unless it is there and not `again`."""
  ids = chat.encode_with_special(tokenizer, text)
  bos_id = tokenizer.bos_id
  if not begins or bos_id is None or (ids[:1] == [bos_id] and not again):
    return ids
  return [bos_id, *ids]


def _chat_text(
  tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> str:
  template = tokenizer.chat_template
  if template is None:
    raise ValueError('apply_chat_template: the model has no chat template')
  names = {token: text for text, token in tokenizer.special_tokens.items()}
  special: dict[str, Any] = {f'{name}_token': '' if token is None else names.get(token, '')
                             for name, token in (('bos', tokenizer.bos_id),
                                                 ('eos', tokenizer.eos_id))}
  return chat.render(template, [messages], add_generation_prompt, **special)[0]


def _generate(
  model: Model, prompts: Sequence[list[int]], options: Sequence[Mapping[str, Any]], window: int,
  batch_size: int,
) -> list[str]:
  """Continue prompts up to the first of their stop texts."""
  read: list[tuple[SamplingConfig, tuple[str, ...]]] = [_sampling(one) for one in options]
  results: dict[int, str] = {}
  for wanted in dict.fromkeys(read):
    sampling, stop = wanted
    room = window - sampling.max_new_tokens
    if room < 1:
      raise ValueError(f'max_gen_toks={sampling.max_new_tokens} leaves nothing of {window} tokens '
                       'for the prompt')
    rows = [row for row, own in enumerate(read) if own == wanted]
    for places in _batches([len(prompts[row]) for row in rows], batch_size):
      batch = [rows[place] for place in places]
      found = texts.complete(
        model.decoder, model.unstacked, model.tokenizer,
        [prompts[row][-room:] for row in batch], sampling, stop, model.eos_token_ids,
      )
      for row, one in zip(batch, found, strict=True):
        text = model.tokenizer.decode(one.tokens)
        results[row] = text[: min((text.find(end) for end in stop if end in text), default=None)]
  return [results[row] for row in range(len(prompts))]


def _sampling(options: Mapping[str, Any]) -> tuple[SamplingConfig, tuple[str, ...]]:
  """Read the options of a request; what is unknown is refused."""
  fields = {name: value for name, value in options.items() if name not in ('until', 'do_sample')}
  fields['max_new_tokens'] = fields.pop('max_gen_toks')
  if not options.get('do_sample'):
    fields['temperature'] = 0.0
  until = options.get('until') or ()
  stop = (until,) if isinstance(until, str) else tuple(until)
  return SamplingConfig(**fields), tuple(filter(None, stop))


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
  """Return row numbers in batches of about the same length."""
  order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
  return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
