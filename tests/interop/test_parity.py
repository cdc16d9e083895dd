"""Our models are transformers' models: from their files, to their files, token for token."""

import functools
import logging
import warnings

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import small

from jaxllm.generation import decode
from jaxllm.generation.sampling import SamplingConfig
from jaxllm.interop import huggingface
from jaxllm.models.decoder import Decoder, unstack

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4
# Beyond the trained length of every scaling, which a greedy continuation stays within.
LENGTH = 56


@functools.partial(jax.jit, static_argnames='model')
def _apply(model, variables, tokens, segments):
  return model.apply(variables, tokens, segments)


def our_logits(loaded, tokens, segments=None):
  # One shape for all tests of a model, so that it is compiled once.
  segments = np.ones_like(tokens, np.int32) if segments is None else segments
  logits = _apply(Decoder(loaded.config), loaded.variables, jnp.asarray(tokens), segments)
  return np.asarray(logits)[..., : loaded.config.vocab_size]


def their_logits(model, tokens, mask=None):
  import torch

  arguments = {}
  if mask is not None:
    mask = torch.tensor(mask)
    arguments = {'attention_mask': mask, 'position_ids': (mask.cumsum(-1) - 1).clamp(min=0)}
  with torch.no_grad():
    return model(torch.tensor(tokens), **arguments).logits.numpy()


def their_greedy(model, prompts, count):
  """Continue prompts as one left-padded batch."""
  import torch

  longest = max(map(len, prompts))
  ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
  mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
  out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count,
                       min_new_tokens=count, eos_token_id=None, pad_token_id=0)
  return out[:, longest:].tolist()


def our_greedy(loaded, prompts, count):
  sampling = SamplingConfig(temperature=0.0, max_new_tokens=count)
  done = decode.generate(Decoder(loaded.config), unstack(loaded.variables), prompts, sampling)
  return [generation.tokens for generation in done]


def assert_same(ours, theirs):
  assert np.abs(ours - theirs).max() < TOLERANCE
  assert (ours.argmax(-1) == theirs.argmax(-1)).all()


@pytest.fixture(scope='module', params=list(models.MODELS))
def pair(request, tmp_path_factory):
  """(name, model of transformers, the same loaded by us, its directory)."""
  path = tmp_path_factory.mktemp(request.param)
  model = models.make(request.param)
  model.save_pretrained(path)
  return request.param, model, small.load(path), path


def test_logits_of_a_full_and_of_a_padded_batch(pair):
  _, model, loaded, _ = pair
  draw = np.random.default_rng(1)
  tokens = draw.integers(0, model.config.vocab_size, (3, LENGTH))
  tokens[0, 0] = model.config.vocab_size - 1
  assert_same(our_logits(loaded, tokens), their_logits(model, tokens))
  lengths = np.array([LENGTH, 17, 5])
  right = np.arange(LENGTH)[None] < lengths[:, None]
  left = right[:, ::-1]
  # They pad on the left, we on the right.
  moved = np.zeros_like(tokens)
  for row, length in enumerate(lengths):
    moved[row, LENGTH - length :] = tokens[row, :length]
  ours = our_logits(loaded, np.where(right, tokens, 0), right.astype(np.int32))
  if depends_on_batch(loaded.config):
    theirs = [their_logits(model, tokens[row : row + 1, :n])[0] for row, n in enumerate(lengths)]
    assert_same(ours[right], np.concatenate(theirs))
  else:
    assert_same(ours[right], their_logits(model, moved, left.astype(np.int64))[left])


def depends_on_batch(config):
  """Whether transformers lets the longest row of a batch choose the rotation of all rows."""
  scaling = getattr(config.positions, 'scaling', None)
  return getattr(scaling, 'kind', None) == 'longrope'


def test_greedy_continuations_of_a_full_and_of_a_padded_batch(pair):
  _, model, loaded, _ = pair
  draw = np.random.default_rng(2)
  prompts = draw.integers(3, model.config.vocab_size, (3, 11)).tolist()
  assert our_greedy(loaded, prompts, 32) == their_greedy(model, prompts, 32)
  ragged = [prompts[0], prompts[1][:4], prompts[1][:7]]
  if depends_on_batch(loaded.config):
    expected = [their_greedy(model, [prompt], 32)[0] for prompt in ragged]
  else:
    expected = their_greedy(model, ragged, 32)
  assert our_greedy(loaded, ragged, 32) == expected


def test_reference_agrees(pair):
  _, model, loaded, path = pair
  ids = np.random.default_rng(3).integers(0, model.config.vocab_size, LENGTH)
  ours = huggingface.open_model(path).reference(ids.tolist(), np.dtype('float32'))
  assert_same(ours, their_logits(model, ids[None])[0])


@pytest.mark.parametrize('own_family', [True, False])
def test_export_is_loaded_without_a_warning_and_is_the_same(pair, own_family, tmp_path, caplog):
  import transformers

  _, model, loaded, _ = pair
  model_type = loaded.model_type if own_family else None
  form = huggingface.save(tmp_path / 'out', loaded.config, loaded.variables,
                                 model_type=model_type)
  assert form.model_type == (model_type or form.model_type)
  logging.getLogger('transformers').propagate = True
  with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
    warnings.simplefilter('error')
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'out', output_loading_info=True, dtype='float32'
    )
  assert not caplog.records, caplog.text
  assert not any(info.values()), info
  tokens = np.random.default_rng(4).integers(0, model.config.vocab_size, (3, LENGTH))
  assert_same(our_logits(loaded, tokens), their_logits(again.eval(), tokens))


def test_import_after_export_is_byte_equal(pair, tmp_path):
  _, _, loaded, _ = pair
  huggingface.save(tmp_path / 'out', loaded.config, loaded.variables,
                          model_type=loaded.model_type, shard_bytes=20_000)
  assert len(list((tmp_path / 'out').glob('model-*.safetensors'))) > 1
  again = small.load(tmp_path / 'out')
  assert again.config == loaded.config
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(),
                      again.variables, loaded.variables)
  assert all(jax.tree.leaves(same))
