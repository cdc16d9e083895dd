"""A run that takes seconds: byte tokens, two layers, documents made by a small grammar."""

import random

from jaxllm.config import override
from jaxllm.data import packing
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, TrainingConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.optim.optimizers import ScheduleConfig
from jaxllm.tasks import encoding

MODEL = DecoderConfig(
  vocab_size=258, vocab_multiple=8, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2,
  mlp_dim=32, max_length=32, tied_head=True,
)


def write_corpus(directory, num_documents=40):
  directory.mkdir(parents=True, exist_ok=True)
  pick = random.Random(0)
  words = ['the king', 'a queen', 'my lord', 'speaks', 'sleeps', 'and then', 'goes home', 'tonight']
  for index in range(num_documents):
    text = ' '.join(pick.choice(words) for _ in range(30)) + f'.\nEnd of scene {index}.\n'
    (directory / f'{index:03}.txt').write_text(text, encoding='utf-8')
  return directory


def experiment(tmp_path, **changes):
  corpus = tmp_path / 'corpus'
  if not corpus.exists():
    write_corpus(corpus)
  config = Experiment(
    name='tiny',
    records_dir=str(tmp_path / 'records'),
    model=MODEL,
    data=DataConfig(
      sources=(SourceConfig(location=str(corpus)),), validation=0.2, context_length=32
    ),
    tokenizer=TokenizerConfig(kind='bytes'),
    training=TrainingConfig(num_steps=8, batch_size=8, log_every_steps=1, spike=None),
    schedule=ScheduleConfig(warmup_steps=2),
    evaluation=EvaluationConfig(every_steps=4, prompts=('the king',), prompt_tokens=8),
  )
  return override(config, {path.replace('__', '.'): value for path, value in changes.items()})


def training_records(examples, tokenizer, context_length, together=True, **options):
  """Return examples as records that are trained on."""
  found, _ = encoding.training_sequences(examples, tokenizer, context_length, **options)
  kept = [tokens for tokens in found if tokens is not None]
  return packing.pack(kept, context_length, tokenizer.vocab_size, together)
