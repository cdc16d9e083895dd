"""Prompts are read on one grid, and whole chunks of it are shared."""

import pytest

from jaxllm.serving.batch import best_row, choose_row, chunk_size, shared


def grid(length, fed=0, chunk=16, small=4):
  """Return (place, size) of every chunk."""
  chunks = []
  while fed < length:
    chunks.append((fed, chunk_size(length, fed, chunk, small)))
    fed += chunks[-1][1]
  return chunks


def test_a_prompt_is_read_in_whole_chunks_and_a_short_rest():
  assert grid(40) == [(0, 16), (16, 16), (32, 4), (36, 4)]
  assert grid(41) == [(0, 16), (16, 16), (32, 16)]
  assert grid(16) == [(0, 16)] and grid(3) == [(0, 4)]


@pytest.mark.parametrize('length', range(1, 70))
def test_reading_goes_on_after_what_is_shared_as_if_all_had_been_read(length):
  prompt = (*range(length),)
  for held in (prompt, prompt[:40], (*prompt[:20], -1, *prompt[21:])):
    count = shared(prompt, held[: len(held) // 16 * 16], 16)
    assert count < length and prompt[:count] == held[:count]
    assert grid(length, count) == [(place, size) for place, size in grid(length) if place >= count]
    assert all(size == 16 for place, size in grid(length) if place < count)


def test_rows_are_chosen_by_what_they_hold():
  prompt = (*range(40),)
  held = [(), prompt[:16], prompt[:32], prompt[:16] + (9,) * 32]
  assert best_row(prompt, held, 16, [0, 1, 2, 3]) == (2, 32)
  assert best_row((7, 7), held, 16, [3, 0, 1, 2, 3]) == (3, 0)
  assert choose_row(prompt, held, [0, 1, 2], 16) == 2
  assert choose_row(prompt, held, [0, 3], 16) == 0, 'it would lose two chunks for one'
  assert choose_row((7,) * 40, held, [3, 0], 16) == 3
