"""Translation: a text and two languages in, a text out; scored by BLEU and chrF."""

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal

import pydantic

from jaxllm.tasks.base import (
  Answer,
  CompletionConfig,
  Example,
  Prediction,
  Record,
  Task,
  completion,
  request,
)
from jaxllm.tasks.records import RecordsConfig, RecordSource

LANGUAGES: Mapping[str, str] = {
  'ar': 'Arabic', 'cs': 'Czech', 'da': 'Danish', 'de': 'German', 'el': 'Greek', 'en': 'English',
  'es': 'Spanish', 'fi': 'Finnish', 'fr': 'French', 'he': 'Hebrew', 'hi': 'Hindi',
  'hu': 'Hungarian', 'id': 'Indonesian', 'it': 'Italian', 'ja': 'Japanese', 'ko': 'Korean',
  'nl': 'Dutch', 'pl': 'Polish', 'pt': 'Portuguese', 'pt_BR': 'Brazilian Portuguese',
  'ro': 'Romanian', 'ru': 'Russian', 'sv': 'Swedish', 'tr': 'Turkish', 'uk': 'Ukrainian',
  'vi': 'Vietnamese', 'zh': 'Chinese', 'zh_Hant': 'Traditional Chinese',
}
"""Code -> how prompts spell the language; any other code or name stands for itself."""


class Translation(CompletionConfig):
  """Translate `source` into `target`.

  The default data are English interface messages and their German translations.
  """

  kind: Literal['translation'] = 'translation'
  """'translation'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:gettext/de'),), group='source'
  )
  """Records with `source` and `target`, and where languages vary `source_language` and
  `target_language`."""
  source_language: str = 'en'
  """Language of the source, where the record does not say: a code or a name."""
  target_language: str = 'de'
  """Language of the target, where the record does not say."""
  prompt: str = '{source_language}: {source}\n{target_language}:'
  """Text before the answer."""
  target: str = ' {target}'
  """The answer."""
  request: str | None = 'Translate from {source_language} to {target_language}: {source}'
  """What a chat model is asked."""
  max_new_tokens: int = pydantic.Field(default=128, gt=0)
  """Most tokens of a translation."""


def example(config: Translation, record: Record) -> Example:
  """Return the example of a record; without a `target` it can only be answered."""
  languages = {
    field: LANGUAGES.get(name, name)
    for field in ('source_language', 'target_language')
    if (name := str(record.get(field, getattr(config, field))))
  }
  filled = {'target': '', **record, **languages}
  return Example(completion(config, filled), record.get('target'), record,
                 request=request(config, filled))


def read(config: Translation, example: Example, answer: Answer) -> Prediction:
  """Return {'translation_text'}."""
  return {'translation_text': answer.text.strip()}


TEXT: Any = itemgetter('translation_text')

TASK = Task(
  Translation, 'generate', ('source', 'target'), example, read, {'bleu': TEXT, 'chrf': TEXT}
)
