"""A run with differential privacy and one without, audited alike.

    python experiments/benchmarks/privacy.py [--noise=0,0.5,2] [--epochs=30]

The texts are docstrings of Python's own library: half are trained on, half are not. Ten canaries
are planted among the former. Noise 0 trains without privacy. Each row of the table is a run: its
epsilon, its losses, and what `jaxllm.tools.audit` finds. Needs the extra `privacy`.
"""

import importlib
import inspect
import json
import pathlib
import pkgutil
import random
import sys
import tempfile
import warnings

from absl import app, flags

import jaxllm
from jaxllm import loading
from jaxllm.data.documents import SourceConfig
from jaxllm.optim.privacy import PrivacyConfig
from jaxllm.tools import audit
from jaxllm.training import loop

NOISE = flags.DEFINE_list('noise', ['0', '0.5', '2'], 'Noise multipliers; 0: without privacy.')
EPOCHS = flags.DEFINE_integer('epochs', 30, 'How often each record is read.')
TEXTS = flags.DEFINE_integer('texts', 400, 'Texts that are trained on.')
OUTPUT = flags.DEFINE_string('output', 'runs/privacy.json', 'Where the JSON goes.')

CONTEXT, BATCH = 128, 40
NAMES = ('antigravity', 'idlelib', 'lib2to3', 'test', 'this', 'tkinter', 'turtle', 'turtledemo')


def docstrings() -> list[str]:
  """Return different docstrings of the standard library, in a random order."""
  found = {}
  warnings.simplefilter('ignore')
  for module in pkgutil.iter_modules():
    if module.name.startswith('_') or module.name in NAMES or (
        module.name not in sys.stdlib_module_names):
      continue
    try:
      loaded = importlib.import_module(module.name)
    except Exception:  # A module of another system.
      continue
    for _, value in inspect.getmembers(loaded, lambda x: inspect.isclass(x) or callable(x)):
      if isinstance(text := inspect.getdoc(value), str) and 150 < len(text) < 800:
        found[text] = None
  texts = sorted(found)
  random.Random(0).shuffle(texts)
  return texts


def experiment(folder: pathlib.Path, noise: float, num_records: int) -> jaxllm.Experiment:
  return jaxllm.Experiment(
    name='privacy', records_dir=str(folder / 'records'),
    model=jaxllm.DecoderConfig(
      vocab_size=258, vocab_multiple=8, embed_dim=96, num_layers=3, num_heads=4, num_kv_heads=4,
      mlp_dim=256, max_length=CONTEXT, tied_head=True),
    data=jaxllm.DataConfig(
      sources=(SourceConfig(location=str(folder / 'members.jsonl')),),
      validation=(SourceConfig(location=str(folder / 'others.jsonl')),), context_length=CONTEXT),
    tokenizer=jaxllm.TokenizerConfig(kind='bytes'),
    training=jaxllm.TrainingConfig(
      num_steps=EPOCHS.value * num_records // BATCH, batch_size=BATCH, spike=None, writers=()),
    privacy=PrivacyConfig(noise_multiplier=noise, clip_norm=0.5) if noise else None,
    optimizer=jaxllm.OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
    schedule=jaxllm.ScheduleConfig(warmup_steps=20),
    checkpoint=jaxllm.CheckpointConfig(every_steps=10**6),
    evaluation=jaxllm.EvaluationConfig(every_steps=10**6))


def main(_) -> None:
  texts = docstrings()
  canaries = audit.new_canaries(10, 1)
  half = min(TEXTS.value, len(texts) // 2)
  rows = []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for kind, lines in (('members', texts[:half] + canaries), ('others', texts[half : 2 * half])):
      (folder / f'{kind}.jsonl').write_text(
        ''.join(json.dumps({'text': line}) + '\n' for line in lines))
    num_records = sum(len(line) + 1 for line in texts[:half]) // CONTEXT
    for noise in map(float, NOISE.value):
      summary = loop.train(experiment(folder, noise, num_records), folder / f'noise_{noise}')
      model = loading.load(folder / f'noise_{noise}')
      members, others = (
        [model.encode_prompt(text)[:CONTEXT] for text in part]
        for part in (texts[:half], texts[half : 2 * half]))
      rows.append({
        'noise': noise, 'epsilon': summary.get('privacy/epsilon'),
        'epsilon_if_sampled': summary.get('privacy/epsilon_if_sampled'),
        'held_out_loss': summary['validation']['loss'],
        **audit.audit(model, members, others, canaries, prefix_tokens=40, suffix_tokens=30)})
      print(json.dumps(rows[-1]), flush=True)
  for key in rows[0]:
    values = [f'{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]' if isinstance(v, tuple)
              else '-' if v is None else f'{v:.3f}' for v in (row[key] for row in rows)]
    print(f'{key:44}' + ''.join(f'{value:>24}' for value in values))
  path = pathlib.Path(OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(rows, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main)
