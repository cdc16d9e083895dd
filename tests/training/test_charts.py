"""Charts: round ticks, places that follow the values, spikes that stay visible."""

import numpy as np
import pytest

from jaxllm.training import report


def records(values, name='train/loss', every=10):
  return [{'step': every * (i + 1), name: value} for i, value in enumerate(values)]


def line(values, style='train'):
  return report.make_line(records(values), 'train/loss', 'training', style)


def labels(ticks):
  return [tick['label'] for tick in ticks]


def test_lines_leave_out_what_is_not_finite():
  found = line([1.0, None, float('nan'), 'x', 2.0])
  assert found.steps.tolist() == [10, 50] and found.values.tolist() == [1.0, 2.0]


def test_places_follow_the_values():
  chart = report.make_chart('Loss', [line([4.0, 2.0, 3.0])], '{:g}'.format)
  assert chart['lines'][0]['path'] == 'M33.33 0.00L66.67 100.00L100.00 50.00'
  assert labels(chart['y_ticks']) == ['2', '2.5', '3', '3.5', '4']
  assert [tick['place'] for tick in chart['y_ticks']] == [100, 75, 50, 25, 0]
  assert labels(chart['x_ticks']) == ['0', '10', '20', '30']
  assert chart['lines'][0]['latest'] == '3' and chart['lines'][0]['points'] == []


def test_logarithmic_where_asked_and_where_it_helps():
  wide = report.make_chart('Loss', [line([10.0, 1.0, 3.1622776])], '{:g}'.format, log=True)
  assert wide['lines'][0]['path'].endswith('L100.00 50.00')
  assert labels(wide['y_ticks']) == ['1', '2', '3', '6', '10']
  narrow = report.make_chart('Loss', [line([3.0, 2.0])], '{:g}'.format, log=True)
  assert narrow['y_ticks'][0] == {'label': '2', 'place': 100}
  negative = report.make_chart('Loss', [line([-1.0, 9.0])], '{:g}'.format, log=True)
  assert '0' in labels(negative['y_ticks'])


def test_one_point_is_marked_and_constants_have_an_axis():
  chart = report.make_chart('Loss', [line([2.5])], '{:g}'.format)
  assert chart['lines'][0]['points'] == [{'place': '100.00 50.00', 'label': 'step 10: 2.5'}]
  assert chart['y_ticks']
  assert report.make_chart('Loss', [line([0.0, 0.0])], '{:g}'.format)['y_ticks']


def test_no_points_no_chart_and_empty_lines_are_left_out():
  assert report.make_chart('Loss', [line([])], '{:g}'.format) is None
  assert len(report.make_chart('Loss', [line([]), line([1.0])], '{:g}'.format)['lines']) == 1


def test_many_points_are_thinned_but_a_spike_survives():
  values = np.ones(50_000)
  values[31_337] = 9.0
  path = report.make_chart('Loss', [line(list(values))], '{:g}'.format)['lines'][0]['path']
  assert path.count('L') < 900 and ' 0.00' in path
  many = report.make_chart('Loss', [line(list(values), 'validation')], '{:g}'.format)
  assert many['lines'][0]['points'] == []


def test_smoothing_keeps_straight_lines_and_leaves_out_spikes():
  values = np.linspace(5, 1, 401)
  smoothed = report.smooth(line(list(values)), 'mean', 'train')
  index = np.searchsorted(10 * np.arange(1, 402), smoothed.steps)
  middle = index < 390  # The last window is cut off.
  np.testing.assert_allclose(smoothed.values[middle], values[index][middle], rtol=1e-6)
  values = np.ones(401)
  values[200] = 1000.0
  np.testing.assert_array_equal(report.smooth(line(list(values)), 'mean', 'train').values, 1)
  assert report.smooth(line([]), 'mean', 'train').steps.size == 0


@pytest.mark.parametrize(
  'value, text',
  [(0, '0'), (950, '950'), (12_500, '12.5k'), (999_999, '1M'), (3.1e6, '3.1M'), (7e9, '7B'),
   (0.001, '0.001'), (0.00025, '2.5e-4'), (1e-10, '1e-10'), (-0.5, '-0.5')],
)
def test_compact_numbers(value, text):
  assert report.compact(value) == text
