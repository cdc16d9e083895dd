"""Applications: records become prompts and targets, answers become predictions with a metric."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

import pydantic

from jaxllm.tasks import (
  chat,
  classification,
  language_modeling,
  multiple_choice,
  preference,
  question_answering,
  summarization,
  translation,
)
from jaxllm.tasks.base import Task

TASKS: Mapping[str, Task] = {
  'translation': translation.TASK,
  'summarization': summarization.TASK,
  'sentiment': classification.SENTIMENT,
  'classification': classification.TASK,
  'question_answering': question_answering.TASK,
  'extractive_question_answering': question_answering.EXTRACTIVE,
  'multiple_choice': multiple_choice.TASK,
  'preference': preference.TASK,
  'language_modeling': language_modeling.TASK,
  'chat': chat.TASK,
}
"""The `kind` of a task's config -> task."""

if TYPE_CHECKING:
  AnyTask = Any
else:
  AnyTask = Annotated[Union[tuple(task.config for task in TASKS.values())],  # noqa: UP007
                      pydantic.Field(discriminator='kind')]
"""The config of any task, by its `kind`."""
