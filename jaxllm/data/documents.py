"""Sources of text: files, packages, TFDS; each yields documents, one after the other, in order."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import pydantic

from jaxllm.config import Config


class SourceConfig(Config):
  """One source of documents."""

  location: str
  """A file, directory or glob; 'package:NAME' for the texts inside an installed package, 'stdlib'
  for Python's own library, 'tfds:NAME[/CONFIG][:VERSION][?split=SPLIT]' for a TFDS dataset."""
  format: Literal['text', 'jsonl', 'csv', 'parquet'] | None = None
  """How files are read; None goes by their suffix, and takes unknown suffixes for text."""
  text_field: str = 'text'
  """The field of a row that holds the text."""
  separator: str | None = None
  """Splits a text file into documents; None makes each file one document."""
  slice: tuple[float, float] = (0.0, 1.0)
  """The part of each file to use, as fractions of its characters (text) or rows."""
  encoding_errors: Literal['strict', 'replace'] = 'strict'
  """Whether invalid UTF-8 is an error or becomes U+FFFD."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'SourceConfig':
    start, stop = self.slice
    if not 0 <= start < stop <= 1:
      raise ValueError(f'slice={self.slice}: expected 0 <= start < stop <= 1')
    if self.separator == '':
      raise ValueError("separator='': expected None or some text")
    return self


@dataclasses.dataclass(frozen=True)
class Document:
  """One text and where it came from."""

  text: str
  source: str
  index: int
  metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def documents(source: SourceConfig) -> Iterator[Document]:
  """Yield the documents of a source; each call starts anew, and the order never changes."""
  path = pathlib.Path(source.location)
  if not path.is_file():
    raise ValueError(f'config.data.sources: no file {source.location!r}')
  yield Document(path.read_text(encoding='utf-8'), source.location, 0)


def package_available(name: str) -> bool:
  """Return whether the package is installed, without importing it."""
  import importlib.util
  return importlib.util.find_spec(name) is not None
