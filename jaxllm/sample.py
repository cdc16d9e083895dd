"""Continue a prompt: `python -m jaxllm.sample --model=runs/demo --prompt="To be"`."""

from absl import flags

from jaxllm import config

MODEL = flags.DEFINE_string('model', None, 'A workdir or a checkpoint.', required=True)
PROMPT = flags.DEFINE_multi_string('prompt', [''], 'Text to continue; may be repeated.')
MAX_NEW_TOKENS = flags.DEFINE_integer('max_new_tokens', 128, 'Tokens to add, at most.')
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, 'Randomness; 0 takes the likeliest token.')
TOP_K = flags.DEFINE_integer('top_k', 0, 'Draw from this many likeliest tokens; 0: from all.')
TOP_P = flags.DEFINE_float('top_p', 0.95, 'Draw from the likeliest tokens of this mass.')
MIN_P = flags.DEFINE_float('min_p', 0.0, "Draw from tokens of at least this share of the best's.")
NUM_SAMPLES = flags.DEFINE_integer('num_samples', 1, 'Continuations of each prompt.', 1)
SEED = flags.DEFINE_integer('seed', 0, 'The same seed gives the same text.')


def main(_) -> None:  # noqa: D103
  from jaxllm import loading

  model = loading.load(MODEL.value)
  prompts = [prompt for prompt in PROMPT.value for _ in range(NUM_SAMPLES.value)]
  texts = loading.generate(
    model, prompts, max_new_tokens=MAX_NEW_TOKENS.value, temperature=TEMPERATURE.value,
    top_k=TOP_K.value, top_p=TOP_P.value, min_p=MIN_P.value, seed=SEED.value,
  )
  for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
    if len(prompts) > 1:
      print(f'--- {index + 1} of {len(prompts)}')
    print(prompt + text)


if __name__ == '__main__':
  config.run_program(main)
