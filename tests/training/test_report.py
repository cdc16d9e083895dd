"""The report reads every state of a workdir, escapes what it shows and needs nothing else."""

import html.parser
import json
import re

import pytest

from jaxllm.training.report import write_report

EVIL = '<script>alert("&")</script>'

CONFIG = {
  'name': 'tiny', 'seed': 7,
  'model': {'embed_dim': 16, 'positions': {'kind': 'rotary'}, 'layer_pattern': ['global', 'local']},
  'data': {'context_length': 32, 'sources': [{'path': EVIL}]},
  'training': {'num_steps': 1000, 'batch_size': 4},
}


def train_records(num_steps, every=10):
  return [
    {'step': step, 'time': 1e9 + step, 'train/loss': 4 - step / 500, 'train/grad_norm': 1.0,
     'train/learning_rate': 1e-3, 'train/tokens_per_second': 5000.0, 'train/skipped': 0.0,
     'train/step_seconds': 0.02, 'train/elapsed_seconds': step / 10, 'train/memory_bytes': 2**31}
    for step in range(every, num_steps + 1, every)
  ]


def write(path, name, value, lines=False):
  text = '\n'.join(map(json.dumps, value)) + '\n' if lines else json.dumps(value)
  (path / name).write_text(text, encoding='utf-8')


class Text(html.parser.HTMLParser):
  """Collects the words of a page, the tags, and tags left open."""

  def __init__(self, page):
    super().__init__()
    self.words, self.tags, self.open = [], [], []
    self.feed(page)
    self.text = ' '.join(' '.join(self.words).split())

  def handle_starttag(self, tag, attributes):
    self.tags.append(tag)
    if tag not in ('meta', 'path'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag != 'path':
      assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] != 'style':
      self.words.append(data)


def report(path):
  page = Text(write_report(path).read_text(encoding='utf-8'))
  assert page.open == [] and 'script' not in page.tags
  return page


@pytest.fixture
def finished(tmp_path):
  write(tmp_path, 'config.json', CONFIG)
  scores = {'step': 1000, 'validation/loss': 2.1, 'validation/perplexity': 8.2,
            'validation/bits_per_byte': 3.03}
  write(tmp_path, 'metrics.jsonl', [*train_records(1000), scores], lines=True)
  write(tmp_path, 'samples.jsonl', [{'prompt': 'To be', 'text': 'To be, or not'},
                                    {'prompt': EVIL, 'text': '中文' + EVIL}], lines=True)
  write(tmp_path, 'environment.json', {'device_kind': 'cpu', 'packages': {'jax': '0.10.2'}})
  split = {'documents': 3, 'records': 12, 'tokens': 1234567, 'text_bytes': 7654321}
  write(tmp_path, 'data.json', {'train': split, 'validation': None})
  write(tmp_path, 'summary.json', {
    'step': 1000, 'num_steps': 1000, 'complete': True, 'parameters': 1_540_000,
    'train_tokens': 128000, 'seconds': 100.0,
    'validation': {'loss': 2.0, 'perplexity': 7.39, 'bits_per_byte': 2.885, 'accuracy': 0.4},
  })
  return tmp_path


def test_a_finished_run(finished):
  page = report(finished)
  for words in ('Complete. 1,000 steps.', '128k training tokens', '01:40 time',
                '5,000 tokens per second', '2.000 held-out loss', '7.390 perplexity',
                '2.885 bits per byte', '1.54M parameters', '40.0 % held-out accuracy',
                '"tokens": 1234567',
                '"positions": { "kind": "rotary" }', '"jax": "0.10.2"',
                'peak memory 2.00 GiB', 'unknown: no published peak for cpu', 'training 2',
                'held-out 2.1', 'Learning rate', 'Gradient norm', 'Tokens per second'):
    assert words in page.text, words
  assert page.tags.count('svg') == 4
  assert not list(finished.glob('*.tmp'))


def test_command_date_and_device_come_first(finished):
  write(finished, 'environment.json', {
    'device_kind': 'TPU v5e', 'devices': 8, 'command': 'train --config=x.py'})
  text = report(finished).text
  assert text.index('command train --config=x.py') < text.index('1.54M')
  assert 'date 2001-09-09 01:46 to 2001-09-09 02:03 UTC device 8 x TPU v5e' in text


def test_two_held_out_figures_are_explained(finished):
  summary = json.loads((finished / 'summary.json').read_text())
  write(finished, 'summary.json', {**summary, 'best_step': 900, 'sha256': None})
  text = report(finished).text
  assert '2.000 held-out loss at step 900' in text
  assert 'held-out curve is of config.evaluation.max_batches batches' in text
  write(finished, 'metrics.jsonl', train_records(1000), lines=True)
  assert 'held-out curve' not in report(finished).text


def test_the_legend_prints(finished):
  page = (write_report(finished)).read_text(encoding='utf-8')
  key, = re.findall(r'\.key\.train::before[^{]*{(.*?)}', page, re.DOTALL)
  assert 'border-top' in key and 'background:' not in key


def test_everything_shown_is_escaped(finished):
  write(finished, 'config.json', CONFIG | {'name': EVIL})
  page = report(finished)
  # Title, heading, prompt and text; name and source in JSON.
  assert (page.text.count(EVIL), page.text.count(json.dumps(EVIL))) == (4, 2)


def test_prompts_are_not_repeated_and_texts_are_whole(finished):
  page = report(finished)
  assert 'To be , or not' in page.text and '中文' in page.text


def test_the_page_is_self_contained_and_follows_the_colour_scheme(finished):
  text = write_report(finished).read_text(encoding='utf-8')
  assert not re.search(r'(src|href)=|url\(|@import|https?:', text)
  assert 'prefers-color-scheme: dark' in text
  # Lines and labels take their colours from the page: none is written into the drawing.
  assert not re.search(r'<(svg|path)[^>]*(fill|stroke|style)=', text)


def test_an_unfinished_run(finished):
  (finished / 'summary.json').unlink()
  (finished / 'samples.jsonl').unlink()
  write(finished, 'metrics.jsonl', train_records(250), lines=True)
  page = report(finished)
  assert 'Not finished. 250 of 1,000 steps.' in page.text
  assert '32k training tokens' in page.text and '00:25 time' in page.text
  assert 'None yet. They are written when the run is complete' in page.text
  assert '3.500 training loss' in page.text


def test_validation_older_than_the_last_step_says_so(finished):
  (finished / 'summary.json').unlink()
  scores = {'step': 100, 'validation/loss': 2.1}
  write(finished, 'metrics.jsonl', [*train_records(250), scores], lines=True)
  assert '2.100 held-out loss at step 100' in report(finished).text


def test_a_summary_of_an_earlier_end_is_not_believed(finished):
  write(finished, 'metrics.jsonl', train_records(1500), lines=True)
  assert 'Not finished. 1,500 of 1,000 steps' in report(finished).text


def test_one_record(finished):
  (finished / 'summary.json').unlink()
  first = {'step': 1, 'train/loss': 4.25, 'train/grad_norm': None}
  (finished / 'metrics.jsonl').write_text(json.dumps(first) + '\n{"step": 2, "tr')
  page = report(finished)
  assert 'Not finished. 1 of 1,000 steps.' in page.text and '128 training tokens' in page.text
  assert '4.250 training loss' in page.text


@pytest.mark.parametrize('damage', [False, True])
def test_an_empty_or_damaged_workdir(tmp_path, damage):
  names = ('config.json', 'metrics.jsonl', 'samples.jsonl', 'environment.json', 'data.json',
           'summary.json')
  for name in names if damage else ():
    (tmp_path / name).write_bytes(b'\xff\xfe not json [')
  page = report(tmp_path)
  assert tmp_path.name in page.text
  assert 'Not started. No metrics have been written yet.' in page.text
  assert 'holds no data.json, config.json or environment.json' in page.text


def test_losses_that_were_not_finite_are_gaps(finished):
  (finished / 'summary.json').unlink()
  records = train_records(250)
  records[-1]['train/loss'] = None
  write(finished, 'metrics.jsonl', records, lines=True)
  assert '3.520 training loss' in report(finished).text


def other(path, directory, **config):
  """Write another run beside the first one."""
  directory = path / directory
  directory.mkdir()
  write(directory, 'config.json', CONFIG | config)
  write(directory, 'metrics.jsonl', [
    *train_records(500), {'step': 500, 'validation/loss': 2.5, 'validation/bits_per_byte': 3.5},
    {'step': 500, 'goodput/fraction': 0.5, 'goodput/useful_seconds': 3.0,
     'goodput/data_seconds': -0.001}], lines=True)
  return directory


def compare(*paths):
  target = write_report(*paths, target=paths[0] / 'page.html')
  text = target.read_text(encoding='utf-8')
  assert not re.search(r'(src|href)=|url\(|@import|https?:', text)
  page = Text(text)
  assert page.open == [] and 'script' not in page.tags
  return page.text, text


def test_runs_lie_over_each_other(finished):
  second = other(finished, 'second', name='larger', seed=8, training={'num_steps': 500})
  text, page = compare(finished, second)
  assert 'tiny · larger tiny: Complete. 1,000 steps. larger: Complete' not in text
  assert 'larger: Not finished. 500 of 500 steps.' in text
  assert 'held-out loss 2.000 2.500' in text and 'parameters 1.54M –' in text
  # One line of each run in each chart, in the colour of the run.
  titles = ('Training loss', 'Held-out loss', 'Held-out bits per byte', 'Learning rate')
  for chart in re.findall(r'<figure.*?</figure>', page, re.DOTALL):
    if any(title in chart for title in titles):
      assert re.findall(r'class="line \w+ (run\d)"', chart) == ['run1', 'run2']
  assert text.count('tiny 3') and 'larger 3' in text
  differences = text.partition('What differs in the configs')[2].partition('Samples')[0]
  assert differences.split() == (
    'tiny larger name "tiny" "larger" seed 7 8 training.num_steps 1000 500 '
    'training.batch_size 4 –').split()
  assert 'steps that count 00:03, 100.0 % Data' in text  # And none of the time before 0.
  assert 'training documents 3 – ' in text


def test_runs_of_one_name_are_told_apart_by_their_directories(finished):
  second = other(finished, 'second')
  text, _ = compare(finished, second)
  assert f'{finished} · {second}' in text
  assert 'Nothing: the configs are the same.' in text


def test_samples_over_time(finished):
  write(finished, 'samples.jsonl', [
    {'step': step, 'prompt': prompt, 'text': f' at {step}'}
    for step in (500, 1000) for prompt in ('To be', 'HAMLET')], lines=True)
  assert 'To be at 500 step 1000 To be at 1000 step 500 HAMLET at 500' in report(finished).text
  second = other(finished, 'second', name='larger')
  write(second, 'samples.jsonl', [{'step': 500, 'prompt': 'To be', 'text': '.'}], lines=True)
  assert 'tiny, step 1000 To be at 1000 larger To be .' in compare(finished, second)[0]
