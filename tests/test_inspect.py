"""What is looked at is what the model computes, and costs nothing where nobody looks."""

import functools
import html.parser
import sys

import jax
import numpy as np
import pytest

from jaxllm import inspect, loading
from jaxllm.adapters.quantization import dequantize_tree
from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig
from jaxllm.models import decoder
from jaxllm.models.decoder import Decoder
from jaxllm.objectives.next_token import NextToken, next_token_loss
from tests.interop import small

BYTES = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
TEXT = 'Où <b>?'
NAMES = ('gpt2', 'llama', 'gemma2')


@functools.cache
def model_of(name, **fields):
  config = small.CONFIGS[name].replace(**fields)
  return loading.make_model(config, small.variables(config), BYTES)


@functools.cache
def seen_of(name):
  return inspect.look(model_of(name), TEXT)


@pytest.mark.parametrize('name', NAMES)
def test_attention_rows_sum_to_one_and_see_no_future(name):
  seen, config = seen_of(name), small.CONFIGS[name]
  length = len(seen.ids)
  assert seen.attention_LNTT.shape == (config.num_layers, config.num_heads, length, length)
  np.testing.assert_allclose(seen.attention_LNTT.sum(-1), 1, atol=1e-6)
  assert not np.triu(seen.attention_LNTT, 1).any()
  assert (seen.attention_LNTT.std(axis=(0, 1)) > 0)[np.tril_indices(length, -1)].all()


@pytest.mark.parametrize('scan_layers', [True, False])
def test_attention_is_what_the_layer_adds(scan_layers):
  model = model_of('llama', scan_layers=scan_layers)
  params = jax.tree.map(np.asarray, model.variables['params'])
  layers = params['layers']
  silent = layers | {'mlp': layers['mlp'] | {'down': jax.tree.map(np.zeros_like,
                                                                  layers['mlp']['down'])}}
  model = loading.make_model(model.config, {'params': params | {'layers': silent}}, BYTES)
  seen = inspect.look(model, TEXT)
  for layer in (1, 2):
    before, after = seen.residual_LTD[layer - 1 : layer + 1]
    one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], layers)
    normed = before / np.sqrt((before**2).mean(-1, keepdims=True) + model.config.norm.epsilon)
    value_TKH = np.einsum('td,dkh->tkh', normed * one['attention_norm']['scale'],
                          one['attention']['value']['kernel'])
    weights_NTT = seen.attention_LNTT[layer]
    mixed_TNH = np.stack([weights_NTT[n] @ value_TKH[:, n // 3] for n in range(6)], 1)
    added = np.einsum('tnh,nhd->td', mixed_TNH, one['attention']['out']['kernel'])
    np.testing.assert_allclose(after - before, added, atol=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_the_lens_at_the_last_layer_is_the_model(name):
  seen, model = seen_of(name), model_of(name)
  np.testing.assert_allclose(seen.logits_TV, model.logits(seen.ids), atol=1e-4)
  np.testing.assert_allclose(seen.lens_logits(-1), seen.logits_TV, atol=1e-4)
  assert np.abs(seen.lens_logits(0) - seen.logits_TV).max() > 0.1
  lens = seen.lens()
  best = inspect.token_text(model, int(seen.logits_TV[2].argmax()))
  assert lens.rows[2][0] == repr(seen.tokens[2]) and lens.rows[2][-1].startswith(repr(best))
  assert len(lens.columns) == 1 + model.config.num_layers


def test_scanned_and_unrolled_layers_show_the_same():
  unrolled = inspect.look(model_of('llama', scan_layers=False), TEXT)
  for name in ('attention_LNTT', 'residual_LTD', 'logits_TV'):
    np.testing.assert_allclose(getattr(unrolled, name), getattr(seen_of('llama'), name), atol=1e-4)


def test_losses_of_tokens_add_up_to_the_loss():
  seen = seen_of('llama')
  ids = np.array([seen.ids], np.int32)
  batch = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'weights': np.ones((1, ids.size - 1)),
           'segment_ids': np.ones_like(ids[:, 1:]), 'positions': np.arange(ids.size - 1)[None]}
  total, count, _ = next_token_loss(
    NextToken(), seen.model.decoder, seen.model.variables, batch)
  assert count == len(seen.ids) - 1 and np.isnan(seen.losses_T[0])
  np.testing.assert_allclose(seen.losses_T[1:].sum(), total, rtol=1e-5)
  assert str(seen.losses()).count('\n') == len(seen.ids)


def test_coloured_text_is_the_text():
  class Spans(html.parser.HTMLParser):
    text, titles = '', ()

    def handle_starttag(self, tag, attributes):
      self.titles += tuple(value for key, value in attributes if key == 'title')

    def handle_data(self, data):
      self.text += data

  seen, spans = inspect.look(model_of('llama'), 'a <b>&\n'), Spans()
  spans.feed(seen.losses_html())
  assert spans.text == 'a <b>&\n'
  assert spans.titles == tuple(f'{loss:.2f} nats' for loss in seen.losses_T)


@pytest.mark.parametrize('name', NAMES)
def test_parameters_add_up(name):
  config = small.CONFIGS[name]
  table = inspect.parameters(config)
  numbers = [row[3] for row in table.rows]
  assert sum(numbers[:-1]) == numbers[-1] == decoder.parameter_count(config)
  kernel, = (row for row in table.rows if row[0] == 'layers/attention/query/kernel')
  assert kernel[1:3] == (f'3 x 24 x 6 x {config.head_size}', 'layers, embed, heads, head_dim')
  assert str(table).splitlines()[-1].split() == ['total', f'{numbers[-1]:,}']
  assert inspect.parameters(model_of(name)) == table


def test_shardings_without_devices():
  config = small.CONFIGS['llama'].replace(vocab_size=272)
  table = inspect.parameters(config, {'fsdp': 4, 'tensor': 2})
  rows = {row[0]: row[3:] for row in table.rows}
  assert rows['embed/embedding'] == (272 * 24, 'tensor, fsdp', 34 * 24)
  assert rows['final_norm/scale'][1:] == ('fsdp', 6)
  assert rows['layers/attention/key/kernel'][2] == 3 * 6 * 1 * 8
  copied = inspect.parameters(config, {'data': 64})
  assert {row[4] for row in copied.rows[:-1]} == {'copied'}
  assert copied.rows[-1][3] == copied.rows[-1][5] == decoder.parameter_count(config)
  with pytest.raises(ValueError, match='size 24, which .*fsdp.* does not divide'):
    inspect.parameters(config, {'fsdp': 7})
  with pytest.raises(ValueError, match='tensors'):
    inspect.parameters(config, {'tensors': 2})


@pytest.mark.parametrize('kind', [None, 'int8'])
def test_neighbours_by_a_loop(kind):
  model = model_of('llama') if kind is None else model_of('llama').quantized(kind)
  table = np.asarray(dequantize_tree(model.variables['params'])['embed']['embedding'])
  wanted = []
  for i in range(259):
    if i != ord('q'):
      a, b = table[i], table[ord('q')]
      wanted.append((-sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5, i))
  wanted = sorted(wanted)[:4]
  found = inspect.neighbours(model, 'q', 4).rows
  assert [row[1] for row in found] == [i for _, i in wanted]
  np.testing.assert_allclose([row[2] for row in found], [-c for c, _ in wanted], rtol=1e-5)
  assert inspect.neighbours(model, ord('q'), 4).rows == found


def test_bad_input_is_one_sentence():
  model = model_of('llama')
  with pytest.raises(ValueError, match=r"token='qu' is 2 tokens: \['q', 'u'\]; name one"):
    inspect.neighbours(model, 'qu')
  with pytest.raises(ValueError, match='token id 999 is not in the vocabulary'):
    inspect.neighbours(model, 999)
  with pytest.raises(ValueError, match='expected 1 to 64 token ids'):
    inspect.look(model, [1] * 65)


def test_training_does_not_pay():
  """The program has the matrix products of the forward pass, and no other results."""
  config = small.CONFIGS['llama'].replace(scan_layers=False)
  variables, tokens = small.variables(config), np.zeros((1, 8), np.int32)

  def products(**options):
    made = jax.make_jaxpr(functools.partial(Decoder(config).apply, **options))(variables, tokens)
    return str(made).count('dot_general')

  # Query, key, value, two of attention, out, gate, up, down.
  assert products() == config.num_layers * 9 + 1
  assert products(mutable=['intermediates']) == config.num_layers * 11 + 1


def test_figures_and_tables_in_a_notebook():
  seen = seen_of('gpt2')
  figure = seen.plot_attention(layer=0, heads=[0, 1, 2, 4, 5])
  panels = [axes for axes in figure.axes if axes.axison]
  assert [axes.get_title() for axes in panels] == [
    f'layer 0, head {n}' for n in (0, 1, 2, 4, 5)]
  np.testing.assert_array_equal(panels[3].images[0].get_array(), seen.attention_LNTT[0, 4])
  axes, = seen.plot_lens().axes
  assert len(axes.texts) == 3 * len(seen.ids)
  assert '<td>&#x27;&lt;&#x27;</td>' in seen.losses()._repr_html_()


def test_without_matplotlib(monkeypatch):
  monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)
  with pytest.raises(ImportError, match=r"matplotlib is not installed: pip install 'jaxllm\["):
    seen_of('llama').plot_lens()
