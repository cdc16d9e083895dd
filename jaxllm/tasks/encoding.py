"""Segments to token ids and weights: the only place where a task meets a tokenizer."""

from collections.abc import Mapping, Sequence

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.objectives.completion import Tokens
from jaxllm.tasks.base import Segment


def encode(
  segments: Sequence[Segment], tokenizer: Tokenizer, special_ids: Mapping[str, int] | None = None
) -> Tokens:
  """Tokenize each segment by itself, so that weights and tokens cannot come apart.

  Args:
    segments: texts and control tokens.
    tokenizer: BOS or EOS is left out where it has none.
    special_ids: spelling -> id of its other special tokens; a control segment that is not among
      them is tokenized as text.

  Returns:
    ids and the weight of each as a target.
  """
  known = {'bos': tokenizer.bos_id, 'eos': tokenizer.eos_id, **(special_ids or {})}
  ids: list[int] = []
  weights: list[float] = []
  for segment in segments:
    if segment.control and segment.text in known:
      special = known[segment.text]
      new = [] if special is None else [special]
    else:
      new = tokenizer.encode(segment.text)
    ids += new
    weights += [segment.weight] * len(new)
  return Tokens(ids, weights)
