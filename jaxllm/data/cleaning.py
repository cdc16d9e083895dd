"""Cleaning of text, step by step; every step can be switched off."""

import pydantic

from jaxllm.config import Config


class CleaningConfig(Config):
  """Which steps of cleaning run; all are off by default, so that text goes through untouched."""

  min_characters: int = pydantic.Field(default=1, ge=1)
  """Documents shorter than this after the other steps are dropped."""


def clean(text: str, config: CleaningConfig) -> str | None:
  """Return the cleaned text, or None where the document is dropped."""
  return text if len(text) >= config.min_characters else None
