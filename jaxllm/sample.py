"""Continue a prompt, or chat: `python -m jaxllm.sample --model=runs/demo --prompt="To be"`.

`--chat` talks to a model that has a chat template: a line is a message, /reset forgets; with
`--prompt` that is the message, and the answer the end.
`--num_drafted=4` guesses tokens ahead, from the text itself or by the smaller model `--draft`, and
gives the same continuation in fewer passes of the model.
"""

import sys
from collections.abc import Iterable, Iterator

from jaxllm import config

FLAGS = config.Flags()
MODEL, MESH, DTYPE = FLAGS.model()
PROMPT = FLAGS.multi_string('prompt', [''], 'Text to continue, or a message of a chat; repeatable.')
CHAT = FLAGS.bool('chat', False, "Converse, by the model's chat template.")
SYSTEM = FLAGS.string('system', None, 'The system message of a chat.')
# Their defaults are those of SamplingConfig.
MAX_NEW_TOKENS = FLAGS.integer('max_new_tokens', None, 'Tokens to add, at most; 128.', 1)
TEMPERATURE = FLAGS.float(
  'temperature', None, 'Randomness; 0 takes the likeliest token; by default 1.', 0)
SEED = FLAGS.integer('seed', None, 'The same seed gives the same text; 0.', 0)
NUM_SAMPLES = FLAGS.integer('num_samples', 1, 'Continuations of each prompt.', 1)
STOP = FLAGS.multi_string('stop', [], 'A text that ends a continuation; may be repeated.')
FLAGS.section('What is drawn from')
TOP_K = FLAGS.integer('top_k', None, 'Draw from this many likeliest tokens; 0: from all.', 0)
TOP_P = FLAGS.float('top_p', None, 'Draw from the likeliest tokens of this mass.', 0, 1)
MIN_P = FLAGS.float(
  'min_p', None, "Draw from tokens of at least this share of the best's.", 0, 1)
REPETITION_PENALTY = FLAGS.float('repetition_penalty', None, 'Above 1 avoids repetition.', 0)
NO_REPEAT_NGRAM_SIZE = FLAGS.integer(
  'no_repeat_ngram_size', None, 'No so many tokens come twice.', 0)
FLAGS.alias('no_repeat_ngram', 'no_repeat_ngram_size')
SAMPLING = FLAGS.string(
  'sampling', '{}', 'Other rules, as JSON: {"min_new_tokens": 5, "presence_penalty": 0.5}; see '
  'SamplingConfig.')
FLAGS.section('Beams and guesses')
NUM_BEAMS = FLAGS.integer('num_beams', 1, 'Beams of a beam search; 1: draw.', 1)
LENGTH_PENALTY = FLAGS.float('length_penalty', 1.0, 'Above 0 favours long beams.')
NUM_DRAFTED = FLAGS.integer('num_drafted', 0, 'Tokens guessed before each pass; 0: none.', 0)
DRAFT = FLAGS.string('draft', None, 'A smaller model with the same vocabulary that guesses.')
FLAGS.section(config.LOADING)
VERIFY = FLAGS.enum('verify', 'full', ['full', 'off'], 'Whether checkpoints are checked.')
QUANTIZE = FLAGS.enum('quantize', None, ['int8', 'int4'], 'Store the weights smaller.')
CACHE_DTYPE = FLAGS.enum('cache_dtype', None, ['int8'], 'Store keys and values smaller.')


def main(_) -> None:  # noqa: D103
  from jaxllm import loading
  from jaxllm.generation import text
  from jaxllm.generation.sampling import SamplingConfig
  from jaxllm.interop import sources

  _check_flags()
  others = SamplingConfig.from_json(SAMPLING.value)
  own = (MAX_NEW_TOKENS, TEMPERATURE, TOP_K, TOP_P, MIN_P, SEED, REPETITION_PENALTY,
         NO_REPEAT_NGRAM_SIZE)
  if twice := sorted({flag.name for flag in own} & others.model_fields_set):
    raise ValueError(f'--sampling: {", ".join(twice)} has a flag of its own')
  options = {name: getattr(others, name) for name in others.model_fields_set}
  options |= {flag.name: flag.value for flag in own if flag.value is not None}
  options |= {name: FLAGS[name].value for name in ('num_beams', 'length_penalty')
              if FLAGS[name].present}
  if NUM_DRAFTED.value:
    options['num_drafted'] = NUM_DRAFTED.value
  sampling, _ = text.read_options(options, NUM_SAMPLES.value, DRAFT.value)
  for path in filter(None, (MODEL.value, DRAFT.value)):
    sources.check_exists(path)
  model = loading.load(MODEL.value, MESH.value, DTYPE.value, VERIFY.value)
  if QUANTIZE.value:
    model = model.quantized(QUANTIZE.value)
  if CHAT.value:
    _chat(model, sampling)
    return
  texts = loading.generate(
    model, PROMPT.value, None, STOP.value, NUM_SAMPLES.value, DRAFT.value, CACHE_DTYPE.value,
    **options)
  prompts = [prompt for prompt in PROMPT.value for _ in range(NUM_SAMPLES.value)]
  for index, (prompt, continued) in enumerate(zip(prompts, texts, strict=True)):
    if len(texts) > 1:
      print(f'--- {index + 1} of {len(texts)}')
    print(prompt + continued)


def _check_flags() -> None:
  """Refuse flags that another one would leave without effect; see also `text.read_options`."""
  ways = {'num_beams': NUM_BEAMS.value > 1, 'num_drafted': NUM_DRAFTED.value, 'draft': DRAFT.value}
  for name in [name for name, on in ways.items() if on]:
    if CHAT.value:
      raise ValueError(f'--chat with --{name}: these are different ways to decode; choose one')
  for name in ('num_samples', 'cache_dtype') if CHAT.value else ():
    if FLAGS[name].present:
      raise ValueError(f'--{name} works without --chat only')
  if CACHE_DTYPE.value and any(ways.values()):
    raise ValueError(f'--cache_dtype={CACHE_DTYPE.value} works with plain decoding only')
  if SYSTEM.value is not None and not CHAT.value:
    raise ValueError('--system works with --chat only')


def _chat(model, sampling) -> None:
  from jaxllm.generation import chat

  if model.chat_format is None:
    raise ValueError(f'--chat: {MODEL.value} has no chat template; use --prompt')
  chat_format = model.chat_format

  def write(text: str) -> None:
    print(text, end='', flush=True)

  lines: Iterable[str] = PROMPT.value
  if not FLAGS['prompt'].present:
    write(f'{chat.HELP}\n')
    lines = _lines()
  chat.converse(model.decoder, model.unstacked, model.tokenizer, chat_format.encode, sampling,
                lines, write, SYSTEM.value, (*STOP.value, *chat_format.stop),
                chat_format.eos_token_ids)


def _lines() -> Iterator[str]:
  """Yield lines as they are typed; end of input, or Ctrl-C, ends the conversation."""
  while True:
    try:
      yield input('> ' if sys.stdin.isatty() else '')
    except (EOFError, KeyboardInterrupt):
      return


if __name__ == '__main__':
  config.run_program(main, FLAGS)
