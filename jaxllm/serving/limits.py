"""The limits of requests and connections."""

import pydantic

from jaxllm.config import Config


class LimitsConfig(Config):
  """What is accepted."""

  max_body_bytes: int = pydantic.Field(default=4_000_000, gt=0)
  """Bytes of a request's body."""
  max_header_bytes: int = pydantic.Field(default=16_384, ge=1024)
  """Bytes of a request's line and headers."""
  max_prompt_tokens: int | None = pydantic.Field(default=None, gt=0)
  """Tokens of one prompt; None: as many as the context holds, less one."""
  max_rows: int = pydantic.Field(default=64, gt=0)
  """Choices of a request: its prompts times n."""
  max_new_tokens: int = pydantic.Field(default=32_768, gt=0)
  """Tokens that a request may ask for: choices times max_tokens."""
  max_inputs: int = pydantic.Field(default=256, gt=0)
  """Texts that a request may embed."""
  max_biases: int = pydantic.Field(default=512, gt=0, le=512)
  """Entries of logit_bias."""
  max_stop_characters: int = pydantic.Field(default=256, gt=0)
  """Characters of one stop string."""
  max_concurrency: int = pydantic.Field(default=256, gt=0)
  """Requests that are worked on at the same time; further ones are told to come back."""
  max_connections: int = pydantic.Field(default=1024, gt=0)
  """Open connections; further ones are closed."""
  header_seconds: float = pydantic.Field(default=10, gt=0)
  """Time for a request's line and headers to come in."""
  body_seconds: float = pydantic.Field(default=30, gt=0)
  """Time for a request's body to come in."""
  send_seconds: float = pydantic.Field(default=60, gt=0)
  """Time for which a client may take nothing of what is sent to it."""
  request_seconds: float = pydantic.Field(default=600, gt=0)
  """Time for the whole answer."""
  drain_seconds: int = pydantic.Field(default=60, gt=0)
  """Time for running answers to end after SIGTERM."""
