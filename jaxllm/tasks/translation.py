"""Translation: a text and two languages in, a text out; scored by BLEU and chrF."""

from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Literal

import pydantic

from jaxllm.tasks import base, fields
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


class Translation(base.CompletionConfig):
  """Translate `source` into `target`.

  The default data are English interface messages and their German translations.
  """

  kind: Literal['translation'] = 'translation'
  """'translation'."""
  data: RecordsConfig = RecordsConfig(
    sources=(RecordSource(location='package:gettext/de'),), group='source')
  """Records with `source` and `target`, a text or several to score against, of which the first is
  trained on; where languages vary also `source_language` and `target_language`. Or with
  `translation`, texts by code, among them these two."""
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


def example(config: Translation, record: base.Record) -> base.Example:
  """Return the example of a record; without a `target` it can only be answered."""
  languages = {
    field: LANGUAGES.get(name, name)
    for field in ('source_language', 'target_language')
    if (name := record.get(field) or getattr(config, field))}
  target = record.get('target')
  return base.written(config, record, target, **languages, target=fields.first(target or ''))


def shape(config: Translation, record: base.Record) -> base.Record:
  """Return a record with source and target, also where they stand by language."""
  texts = record.get('translation')
  if 'source' in record or not isinstance(texts, Mapping):
    return record
  return {**record, **{name: texts[code] for name, code in (
    ('source', config.source_language), ('target', config.target_language)) if code in texts}}


def read(config: Translation, example: base.Example, answer: base.Answer) -> base.Prediction:
  """Return {'translation_text'}."""
  return {'translation_text': answer.text.strip()}


TEXT: Any = itemgetter('translation_text')

TASK = base.Task(
  Translation, 'generate', {'source': fields.text, 'target': fields.several}, example, read,
  {'bleu': TEXT, 'chrf': TEXT},
  dict.fromkeys(('source_language', 'target_language'), fields.optional(fields.text)), shape)
