"""Overlap of evaluation and training texts."""

from jaxllm.evaluation.contamination import Overlap, overlaps


def test_literals():
  training = iter(['One two, three four FIVE six!', 'seven eight'])
  found = overlaps(
    ['two three four five', 'zero one two three', 'eight', 'eight nine', '', 'seven  eight'],
    training, num_words=3,
  )
  assert found == [
    Overlap(1.0, 'two three four'), Overlap(0.5, 'one two three'), Overlap(1.0, 'eight'),
    Overlap(0.0, None), Overlap(0.0, None), Overlap(1.0, 'seven eight'),
  ]


def test_chinese_is_compared_by_character():
  found = overlaps(['猫坐在垫子上'], ['那只猫坐在垫子里。'], num_words=4)
  assert found == [Overlap(2 / 3, '猫 坐 在 垫')]


def test_runs_do_not_cross_texts():
  assert overlaps(['a b c'], ['a b', 'c'], num_words=3) == [Overlap(0.0, None)]


def test_a_copied_passage_is_found_in_a_long_text():
  passage = ' '.join(f'word{i}' for i in range(30))
  share, example = overlaps([f'{passage} and more of our own words'], [f'x {passage} y'])[0]
  assert 0.7 < share < 0.8 and example.startswith('word0 word1')
