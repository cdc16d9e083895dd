"""Laws of fine-tuning: what is frozen does not move, and a task's run is like any other run."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library

from jaxllm import loading, sharding
from jaxllm.adapters import lora as lora_lib
from jaxllm.adapters.lora import LoraConfig
from jaxllm.adapters.quantization import QuantizationConfig, dequantize_tree, quantize
from jaxllm.adapters.rules import PathRule
from jaxllm.checkpoints import reading, store
from jaxllm.config import ConfigError
from jaxllm.data import packing, tokenizers
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.evaluation.perplexity import EvaluationConfig
from jaxllm.experiment import Experiment, FinetuneConfig, TrainingConfig
from jaxllm.interop import huggingface, tokenizer_export
from jaxllm.models.decoder import Decoder
from jaxllm.optim.optimizers import ScheduleConfig
from jaxllm.tasks import chat, encoding, predict
from jaxllm.tasks.base import EOS, Segment
from jaxllm.tasks.chat import Chat, ChatTemplate
from jaxllm.tasks.classification import Sentiment
from jaxllm.tasks.records import RecordsConfig, RecordSource
from jaxllm.training import dataset, loop, pretrained
from jaxllm.training import state as state_lib
from jaxllm.training import step as step_lib
from tests.interop import small
from tests.training import tiny_run as tiny
from tests.training.watched import whole_parameters

LORA = FinetuneConfig(lora=LoraConfig(rank=2, targets=('layers/attention/(query|value)',)))


def sentiment(directory):
  """Write 80 short reviews, and return the task of telling them apart."""
  path = directory / 'reviews.jsonl'
  if not path.exists():
    rows = [{'text': f'{word} {i}', 'label': label} for i in range(40)
            for word, label in (('bad', 'negative'), ('good', 'positive'))]
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  records = RecordsConfig(sources=(RecordSource(location=str(path)),))
  return Sentiment(
    data=records, prompt='{text}:', labels=(('negative', 'n'), ('positive', 'p')))


def experiment(directory, finetune=LORA, **changes):
  fields = {
    'name': 'tuned', 'records_dir': str(directory / 'records'),
    'init_from': str(directory / 'base'), 'data': DataConfig(context_length=32),
    'task': sentiment(directory), 'finetune': finetune,
    'training': TrainingConfig(num_steps=6, batch_size=8, log_every_steps=1, spike=None),
    'schedule': ScheduleConfig(warmup_steps=1),
    'evaluation': EvaluationConfig(every_steps=3),
  }
  return Experiment(**fields | changes)


def train(config, path):
  return loop.train(config, path, jax.devices()[:1])


def lines(path, name):
  records = [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]
  return [record[name] for record in records if name in record]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A directory with a base model, and a run of adapters to it."""
  directory = tmp_path_factory.mktemp('finetune')
  train(tiny.experiment(directory, training__num_steps=3, evaluation__prompts=()),
        directory / 'base')
  train(experiment(directory), directory / 'tuned')
  return directory


def test_only_adapters_are_trained_and_stored(base):
  stored = reading.read_bundle(base / 'tuned').leaves
  params = {path.rpartition('/')[2] for path in stored if path.startswith('params/')}
  assert params == {'a', 'b', 'scale'}
  moments = {path.rpartition('/')[2] for path in stored if '/mu/' in path or '/nu/' in path}
  assert moments == {'a', 'b', 'scale'}
  assert not any('kernel' in path or 'embedding' in path for path in stored)
  losses = lines(base / 'tuned', 'train/loss')
  assert len(losses) == 6 and losses[-1] < losses[0]
  assert len(lines(base / 'tuned', 'validation/loss')) == 2


def test_a_loaded_run_is_the_base_with_its_adapters_added(base):
  adapters, bundle = reading.restore_params(base / 'tuned')
  assert set(adapters['layers']['attention']) == {'query', 'value'}
  model, start = loading.load(base / 'tuned'), loading.load(base / 'base')
  ids = model.encode_prompt('good 7:')
  beside = Decoder(model.config).apply(
    {**start.variables, 'lora': adapters}, jnp.asarray([ids]))[0, :, :model.config.vocab_size]
  np.testing.assert_allclose(model.logits(ids), beside, atol=1e-5)
  assert np.abs(model.logits(ids) - start.logits(ids)).max() > 1e-3
  assert model.experiment.decoder == start.config and model.experiment.tokenizer.kind == 'bytes'
  assert bundle.manifest['train']['documents'] == 64


def test_the_base_stays_as_it_is_and_the_skipped_step_too(base):
  config = loop.pretrained.resolve(experiment(base))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  tx = state_lib.make_optimizer(config)
  start = loading.load(base / 'base').variables['params']
  before = jax.tree.map(np.array, start)
  state = state_lib.create_state(config, tx, mesh, start)
  step = step_lib.make_train_step(config, tx, mesh)
  batches = dataset.open_dataset(config).make_batches('train', 8, True, None)
  for number in range(3):
    state, metrics = step(state, sharding.put_batch(
      batches.batch_at(number), sharding.batch_sharding(mesh, config.mesh)))
    assert metrics['applied'] == 1 and metrics['grad_norm'] > 0
  jax.tree.map(np.testing.assert_array_equal, state.frozen['base'], before)
  assert all(np.abs(adapter['b']).max() > 0 for _, adapter in lora_lib.adapters(state.params))


def test_stopped_and_resumed_equals_never_stopped(base):
  config = experiment(base)
  calls = []
  real = store.check

  class Stop(Exception):
    pass

  def stop_after_five(handle):
    calls.append(1)
    if len(calls) == 5:
      store.wait(handle)
      raise Stop
    real(handle)

  often = config.replace(checkpoint=config.checkpoint.replace(every_steps=3))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(store, 'check', stop_after_five)
    with pytest.raises(Stop):
      train(often, base / 'resumed')
  train(often, base / 'resumed')
  assert lines(base / 'resumed', 'train/loss') == lines(base / 'tuned', 'train/loss')
  pair = [reading.restore_params(base / name)[0] for name in ('resumed', 'tuned')]
  jax.tree.map(np.testing.assert_array_equal, *pair)


def test_eight_devices_train_the_same_adapters(base):
  config = experiment(base, mesh={'data': 2, 'fsdp': 2, 'tensor': 2}, evaluation=EvaluationConfig(
    every_steps=3, prompts=('good 3:',), prompt_tokens=4))
  with whole_parameters(tiny.MODEL, config.mesh) as whole:
    loop.train(config, base / 'meshed')
    loop.train(config.replace(training=config.training.replace(num_steps=7)), base / 'meshed')
  assert not whole
  np.testing.assert_allclose(
    lines(base / 'meshed', 'train/loss')[:6], lines(base / 'tuned', 'train/loss'), rtol=1e-5)
  assert lines(base / 'meshed', 'task/sentiment/accuracy') == pytest.approx(
    lines(base / 'tuned', 'task/sentiment/accuracy')[-1:] * 2, abs=0.2)
  sample = json.loads((base / 'meshed' / 'samples.jsonl').read_text().splitlines()[-1])
  assert sample['text'] == loading.generate(
    base / 'meshed', 'good 3:', max_new_tokens=4, temperature=config.evaluation.temperature,
    top_p=config.evaluation.top_p, seed=config.seed)


def test_packed_equals_unpacked(base):
  config = loop.pretrained.resolve(experiment(base, finetune=FinetuneConfig()))
  examples = predict.examples(config.task, 'train')
  tokenizer = dataset.open_dataset(config).tokenizer
  packed, alone = (
    packing.batch_arrays(tiny.training_records(examples, tokenizer, 32, together=together))
    for together in (True, False)
  )
  assert len(packed['tokens']) < len(alone['tokens'])
  loss = step_lib.make_sums(config)
  params = loading.load(base / 'base').variables['params']
  both = jax.jit(jax.value_and_grad(
    lambda params, batch: loss({'params': params}, {}, batch, None)['loss_sum']))
  (first, grads), (second, expected) = (both(params, batch) for batch in (packed, alone))
  np.testing.assert_allclose(first, second, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), grads, expected)


def test_a_quantised_base_gives_the_model_that_was_trained(base):
  config = QuantizationConfig(kind='int8')
  train(experiment(base, finetune=LORA.replace(base=config)), base / 'quantised')
  assert lines(base / 'quantised', 'train/loss')[-1] < lines(base / 'quantised', 'train/loss')[0]
  start = quantize(loading.load(base / 'base').variables, config)
  adapters, _ = reading.restore_params(base / 'quantised')
  expected = lora_lib.merge(dequantize_tree(start)['params'], adapters)
  jax.tree.map(
    np.testing.assert_array_equal, loading.load(base / 'quantised').variables['params'], expected)


def test_adapters_refuse_another_base_or_none(base, tmp_path):
  shutil.copytree(base / 'base', tmp_path / 'base')
  train(experiment(base, init_from=str(tmp_path / 'base'), training=TrainingConfig(
    num_steps=2, batch_size=8, spike=None)), tmp_path / 'tuned')
  loading.load(tmp_path / 'tuned')
  shutil.rmtree(tmp_path / 'base')
  with pytest.raises(ValueError, match='holds adapters to .*base.*which cannot be loaded'):
    loading.load(tmp_path / 'tuned')
  train(tiny.experiment(base, seed=1, training__num_steps=3, evaluation__prompts=()),
        tmp_path / 'base')
  with pytest.raises(ValueError, match='config.init_from=.* is not the model that the'):
    loading.load(tmp_path / 'tuned')


def test_a_run_that_has_begun_needs_no_base_to_be_resolved(base, tmp_path):
  shutil.copytree(base / 'base', tmp_path / 'base')
  config = experiment(base, FinetuneConfig(), init_from=str(tmp_path / 'base'))
  begun = pretrained.resolve(config)
  shutil.rmtree(tmp_path / 'base')
  assert pretrained.resolve(config, begun) == begun
  for other in (None, begun.replace(init_from='elsewhere')):
    with pytest.raises(ValueError, match='no such file or directory'):
      pretrained.resolve(config, other)


def test_another_vocabulary_is_refused_before_the_data_are_read(base, tmp_path):
  tokenizer = library.Tokenizer(library.models.WordLevel({'[UNK]': 0, 'a': 1}, unk_token='[UNK]'))
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  config = experiment(
    base, FinetuneConfig(), tokenizer=TokenizerConfig(kind='json', path=str(tmp_path)))
  with pytest.raises(ValueError, match='config.init_from=.*base was trained with another tokeniz'):
    pretrained.check_start(pretrained.resolve(config))


def test_rules_freeze_and_must_match(base):
  rules = (PathRule(pattern='layers/attention/.*'), PathRule(pattern='embed/.*'))
  config = FinetuneConfig(rules=rules)
  train(experiment(base, finetune=config), base / 'ruled')
  before, after = (loading.load(base / name).variables['params'] for name in ('base', 'ruled'))
  jax.tree.map(np.testing.assert_array_equal,
               before['layers']['attention'], after['layers']['attention'])
  np.testing.assert_array_equal(before['embed']['embedding'], after['embed']['embedding'])
  moved = after['layers']['mlp']['up']['kernel'] - before['layers']['mlp']['up']['kernel']
  assert np.abs(moved).max() > 0
  stored = reading.read_bundle(base / 'ruled').leaves
  assert not any('/mu/' in path and '/attention/' in path for path in stored)
  for frozen in (FinetuneConfig(rules=(PathRule(pattern='.*'),)),
                 LORA.replace(rules=(PathRule(pattern='.*/[ab]'),))):
    with pytest.raises(ValueError, match='config.finetune.rules: .* nothing is trained'):
      train(experiment(base, finetune=frozen), base / 'still')
  nothing = FinetuneConfig(rules=(PathRule(pattern='layers/attn/.*'),))
  with pytest.raises(ValueError, match="rule 'layers/attn/.*' matches no parameter"):
    train(experiment(base, finetune=nothing), base / 'refused')


def test_chat_data_take_the_template_of_the_model(tmp_path):
  signs = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  vocab = {sign: i for i, sign in enumerate(signs)} | {'<|a|>': 256, '<|z|>': 257}
  template = ('{% for m in messages %}<|a|>{{ m.role[0] }}:{{ m.content }}<|z|>{% endfor %}'
              '{% if add_generation_prompt %}<|a|>a:{% endif %}')
  tokenizer = tokenizers.from_files({
    'tokenizer.json': tokenizer_export.byte_level_bpe(vocab, [], special=['<|a|>', '<|z|>']),
    'chat_template.jinja': template.encode(),
  })
  turns = [('user', '<|z|>'), ('assistant', 'yes'), ('user', 'so'), ('assistant', 'no')]
  messages = [{'role': role, 'content': content} for role, content in turns]
  (tmp_path / 'chats.jsonl').write_text(json.dumps({'messages': messages}))
  task = Chat(template=None, data=RecordsConfig(
    sources=(RecordSource(location=str(tmp_path / 'chats.jsonl'), split='train'),)))
  rows = tiny.training_records(
    loading.task_examples(task, 'train', tokenizer), tokenizer, 40,
    add_bos=False)
  batch = packing.batch_arrays(rows)
  said = [(int(target), float(weight)) for target, weight in zip(
    batch['targets'][0], batch['weights'][0], strict=True)]
  plain = tokenizer.encode
  heard = [*plain('u:<|z|>'), 257, 256, *plain('a:')]
  assert said[: len(heard)] == [(i, 0) for i in heard]
  learnt = [(i, 1) for i in (*plain('yes'), 257)]
  assert said[len(heard) :][: len(learnt)] == learnt
  assert sum(weight for _, weight in said) == len(plain('yes')) + len(plain('no')) + 2
  with pytest.raises(ValueError, match='no chat template of its own'):
    loading.task_examples(task, 'train', tokenizers.from_files({'bytes.txt': b''}))


def test_a_run_is_talked_to_as_it_was_trained(base, tmp_path):
  several = [[{'role': 'user', 'content': f'Is it {i}?'}, {'role': 'assistant', 'content': 'Yes'}]
             for i in range(80)]
  said, chats = several[0], tmp_path / 'chats.jsonl'
  chats.write_text('\n'.join(json.dumps({'messages': messages}) for messages in several))
  template = ChatTemplate(prefix='[{role}]', suffix='[end]\n', controls=())
  task = Chat(template=template, data=RecordsConfig(sources=(RecordSource(location=str(chats)),)))
  train(experiment(base, task=task, name='talks', finetune=FinetuneConfig()), base / 'talks')
  model = loading.load(base / 'talks')
  own = model.chat_format
  example, = chat.examples([{'messages': said}], template)
  trained = encoding.encode(example.segments, model.tokenizer, add_bos=model.add_bos).ids
  asked = own.encode(said[:1])
  assert trained[: len(asked)] == asked and own.stop == ('[end]',)
  # Whoever loads or serves the model elsewhere renders the same.
  exported = base / 'exported'
  huggingface.save(exported, model.config, model.variables, model.tokenizer.files(),
                          add_bos=model.add_bos, model_type='llama')
  elsewhere = loading.load(exported)
  assert elsewhere.chat_format.encode(said[:1]) == asked
  # Trained on, as the model's own template.
  again = task.replace(template=None)
  for tokenizer in (elsewhere.tokenizer,
                    loading.describe(base / 'talks').tokenizer):
    found = loading.task_examples(again, 'train', tokenizer)[0]
    # To the model the end of its turn is text, which nothing stops at; EOS is in its place.
    messages = found.record['messages']
    assert found.segments[-3:] == (
      Segment(template.render([messages[:1]], True)[0]), Segment(messages[1]['content'], 1.0), EOS)


@pytest.mark.parametrize(('changes', 'message'), [
  ({'init_from': None}, 'model, tokenizer, finetune.lora cannot do without'),
  ({'task': None}, 'set one'),
])
def test_what_cannot_be_is_refused(base, changes, message):
  with pytest.raises(ConfigError, match=message):
    experiment(base, **changes)


def test_adapters_go_to_peft_and_come_back(tmp_path):
  config, _ = small.save(tmp_path / 'base')
  tuned = experiment(tmp_path, FinetuneConfig(lora=LoraConfig(rank=2)))
  loop.train(tuned, tmp_path / 'run', jax.devices()[:1])
  converted = subprocess.run(
    [sys.executable, '-m', 'jaxllm.convert', f'--source={tmp_path}/run',
     f'--target={tmp_path}/adapter', '--format=peft'],
    capture_output=True, text=True, check=False)
  assert converted.returncode == 0, converted.stderr
  assert {path.name for path in (tmp_path / 'adapter').iterdir()} == {
    'adapter_config.json', 'adapter_model.safetensors'}
  ids = np.arange(40) % config.vocab_size
  run, back, base = (loading.load(tmp_path / name).logits(ids)
                     for name in ('run', 'adapter', 'base'))
  np.testing.assert_allclose(back, run, atol=1e-5)
  assert np.abs(back - base).max() > 1e-3
  with pytest.raises(ValueError, match='has no adapters'):
    loop.train(experiment(tmp_path, FinetuneConfig()), tmp_path / 'whole', jax.devices()[:1])
    loading.adapters(tmp_path / 'whole')
