"""What a user writes, as strict type checkers see it; mypy reads this file, nobody runs it."""

from typing import Any, assert_type

import jaxllm

experiment: jaxllm.Experiment = jaxllm.Experiment(
  name='typed', data=jaxllm.DataConfig(context_length=64),
  training=jaxllm.TrainingConfig(num_steps=1, batch_size=1), model=jaxllm.PRESETS['gpt2_124m'],
)
assert_type(jaxllm.train(experiment, 'runs/typed'), dict[str, Any])
assert_type(jaxllm.evaluate('runs/typed', text=['a.txt', 'b.txt']), dict[str, Any])
model = assert_type(jaxllm.load('runs/typed', mesh={'fsdp': 2}, dtype='bfloat16'), jaxllm.Model)
assert_type(jaxllm.generate(model, 'To be', max_new_tokens=4, temperature=0.7), str)
assert_type(jaxllm.generate(model, ['To be', 'or not']), list[str])
classify = jaxllm.pipeline('sentiment-analysis', model)
answers = assert_type(classify(['A delight.']), list[dict[str, Any]])
ids: list[int] = model.tokenizer.encode('To be')
shape: tuple[int, ...] = model.logits(ids).shape
version: str = jaxllm.__version__
