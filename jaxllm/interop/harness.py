# ruff: noqa: D102
"""A model as lm-eval's, so that its tasks score it: the three requests, token for token.

    import lm_eval
    lm_eval.simple_evaluate(harness.LanguageModel(jaxllm.load(path)), tasks=['...'])

What is cut, what is put before an empty context, and where an answer ends is as lm-eval's own `hf`
model does it. Needs the extra `harness`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.generation import scoring
from jaxllm.generation import text as texts
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.interop import chat
from jaxllm.model import Model

try:
  from lm_eval.api.model import TemplateLM
  from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
  raise ImportError("this needs lm-eval: pip install 'jaxllm[harness]'") from error

MAX_NEW_TOKENS = 256


class LanguageModel(TemplateLM):
  """A model as an `lm_eval.api.model.LM`, whose methods are lm-eval's.

  Args:
    model: from `jaxllm.load`.
    batch_size: answers that are written together.
    max_length: tokens of a window; None: the context of the model.

  Raises:
    ValueError: `max_length` does not fit the model.
  """

  def __init__(self, model: Model, batch_size: int = 8, max_length: int | None = None):
    super().__init__()
    self.max_length = max_length or model.config.max_length
    if not 2 <= self.max_length <= model.config.max_length:
      raise ValueError(f'max_length={max_length}: between 2 and the context of the model, '
                       f'{model.config.max_length}')
    self._model, self._batch_size = model, batch_size

  @property
  def tokenizer_name(self) -> str:
    return self._model.tokenizer.fingerprint

  @property
  def eot_token_id(self) -> int:
    return _first_token(self._model.tokenizer.eos_id, self._model.tokenizer.bos_id)

  @property
  def prefix_token_id(self) -> int:
    return _first_token(self._model.tokenizer.bos_id, self._model.tokenizer.eos_id)

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Encode; BOS comes first where the model wants one, unless the text spells it already."""
    ids = chat.encode_with_special(self._model.tokenizer, string)
    bos_id = self._model.tokenizer.bos_id
    if (bos_id is None or not self._model.add_bos or add_special_tokens is False
        or (add_special_tokens is None and ids[:1] == [bos_id])):
      return ids
    return [bos_id, *ids]

  def _loglikelihood_tokens(
    self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
  ) -> list[tuple[float, bool]]:
    longest = max((len(target) for _, _, target in requests), default=0)
    if longest > self.max_length:
      raise ValueError(f'a continuation has {longest} tokens, but the context {self.max_length}')
    rows = [[*context, *target][-self.max_length - 1 :] for _, context, target in requests]
    places = [range(len(row) - len(target), len(row))
              for row, (_, _, target) in zip(rows, requests, strict=True)]
    found = scoring.score(self._model.decoder, self._model.variables, rows, places)
    return [(float(one.log_probs_N.sum(dtype=float)), bool(one.is_greedy_N.all()))
            for one in found]

  def loglikelihood_rolling(
    self, requests: Sequence[Any], disable_tqdm: bool = False
  ) -> list[float]:
    rows = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
    found = scoring.rolling(
      self._model.decoder, self._model.variables, rows, [range(1, len(row)) for row in rows],
      self.max_length, self.max_length)
    return [float(one.sum()) for one in found]

  def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
    prompts = [self.tok_encode(context) for context, _ in (one.args for one in requests)]
    options = [_sampling(one.args[1]) for one in requests]
    results: dict[int, str] = {}
    for sampling, stop in dict.fromkeys(options):
      room = self.max_length - sampling.max_new_tokens
      if room < 1:
        raise ValueError(f'max_gen_toks={sampling.max_new_tokens} leaves nothing of '
                         f'{self.max_length} tokens for the prompt')
      rows = [row for row, own in enumerate(options) if own == (sampling, stop)]
      rows.sort(key=lambda row: -len(prompts[row]))
      for start in range(0, len(rows), self._batch_size):
        batch = rows[start : start + self._batch_size]
        found = texts.complete(
          self._model.decoder, self._model.unstacked, self._model.tokenizer,
          [prompts[row][-room:] for row in batch], sampling, stop, self._model.eos_token_ids)
        for row, one in zip(batch, found, strict=True):
          text = self._model.tokenizer.decode(one.tokens)
          results[row] = text[: min((text.find(end) for end in stop if end in text), default=None)]
    return [results[row] for row in range(len(prompts))]

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    return self._model.tokenizer.chat_template if chat_template else None

  def apply_chat_template(
    self, chat_history: list[Mapping[str, Any]], add_generation_prompt: bool = True
  ) -> str:
    tokenizer = self._model.tokenizer
    if tokenizer.chat_template is None:
      raise ValueError('apply_chat_template: the model has no chat template')
    return chat.render(tokenizer.chat_template, [chat_history], add_generation_prompt,
                       **tokenizer.named_tokens)[0]


def _first_token(*ids: int | None) -> int:
  found = next((token for token in ids if token is not None), None)
  if found is None:
    raise ValueError('the tokenizer has neither BOS nor EOS, which lm-eval puts before a text')
  return found


def _sampling(options: Mapping[str, Any]) -> tuple[SamplingConfig, tuple[str, ...]]:
  """Read the options of a request; what is unknown is refused."""
  fields = normalize_gen_kwargs(options, MAX_NEW_TOKENS)
  fields['max_new_tokens'] = fields.pop('max_gen_toks')
  if not fields.pop('do_sample'):
    fields['temperature'] = 0.0
  stop = tuple(filter(None, fields.pop('until')))
  return SamplingConfig(**fields), stop
