"""Tiny decoders that between them turn every switch, and an independent NumPy forward pass."""

import math

import jax
import numpy as np

from jaxllm.models.config import ExpertsConfig, SharedExpertConfig
from jaxllm.models.decoder import DecoderConfig, abstract
from jaxllm.models.linear import InitializerConfig
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import LearnedPositions, LinearScaling, RotaryPositions

BASE = DecoderConfig(
  vocab_size=50, vocab_multiple=16, embed_dim=16, num_layers=3, num_heads=4, mlp_dim=24,
  max_length=32, initializer=InitializerConfig(stddev=0.3),
)
LAYERNORM = NormConfig(kind='layernorm', bias=True)
ALL_BIASES = ('qkv', 'attention_out', 'mlp', 'head')

CONFIGS = {
  'gpt2': BASE.replace(
    positions=LearnedPositions(), norm=LAYERNORM, activation='gelu_tanh', gated=False,
    biases=('qkv', 'attention_out', 'mlp'), tied_head=True,
  ),
  'llama': BASE.replace(num_kv_heads=2),
  'mistral': BASE.replace(num_kv_heads=2, layer_pattern=('local',), window=4, biases=('qkv',)),
  'gemma': BASE.replace(
    num_kv_heads=1, head_dim=6, layer_pattern=('local', 'local', 'global'), window=3,
    positions=RotaryPositions(base=1e6, scaling=LinearScaling(factor=8)),
    local_positions=RotaryPositions(), norm=NormConfig(scale_plus_one=True, epsilon=1e-6),
    norm_placement='sandwich', activation='gelu_tanh', query_key_norm='head', embedding_scale=4.0,
    attention_scale=0.3, attention_softcap=2.0, logit_softcap=3.0, tied_head=True,
  ),
  'neox': BASE.replace(
    positions=RotaryPositions(fraction=0.5), norm=LAYERNORM, residual='parallel',
    activation='gelu', gated=False, biases=ALL_BIASES,
  ),
  'olmo': BASE.replace(norm_placement='post', query_key_norm='width', num_kv_heads=2),
  'smollm3': BASE.replace(layer_pattern=('global', 'global_nope'), activation='relu'),
  'mixtral': BASE.replace(num_kv_heads=2, experts=ExpertsConfig(num_experts=4, top_k=2)),
  'deepseek': BASE.replace(experts=ExpertsConfig(
    num_experts=6, top_k=3, scores='sigmoid', weight_scale=2.5,
    shared=SharedExpertConfig(mlp_dim=8, gated=True))),
  'nope': BASE.replace(positions=None),
}


def variables_of(config: DecoderConfig) -> dict:
  """Return random variables of the right form, biases and scales included."""
  numbers = np.random.default_rng(0)

  def fill(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    values = 0.3 * numbers.standard_normal(leaf.shape, np.float32)
    one = path[-1].key == 'scale' and not config.norm.scale_plus_one
    return values + 1 if one else values

  return jax.tree.map(jax.device_put, jax.tree_util.tree_map_with_path(fill, abstract(config)[0]))


def tokens_of(config: DecoderConfig, batch: int, length: int) -> np.ndarray:
  numbers = np.random.default_rng(1)
  return numbers.integers(0, config.vocab_size, (batch, length), np.int32)


def reference_logits(config: DecoderConfig, variables: dict, tokens: list[int]) -> np.ndarray:
  """Return float64 logits (T, vocab_size) of one sequence, one head and one query at a time."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables['params'])
  x = params['embed']['embedding'][tokens] * (config.embedding_scale or 1)
  if isinstance(config.positions, LearnedPositions):
    x = x + params['positions']['embedding'][: len(tokens)]
  for i, kind in enumerate(config.layer_kinds):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
    before, after = (
      lambda name, x, on=on, layer=layer: _norm(config.norm, layer[name], x) if on else x
      for on in (config.norm_placement != 'post', config.norm_placement != 'pre')
    )
    mixed = _attention(config, kind, layer['attention'], before('attention_norm', x))
    after_attention = x + after('attention_post_norm', mixed)
    source = x if config.residual == 'parallel' else after_attention
    feed_forward = _experts if config.experts else _mlp
    added = feed_forward(config, layer['mlp'], before('mlp_norm', source))
    x = after_attention + after('mlp_post_norm', added)
  x = _norm(config.norm, params['final_norm'], x)
  if config.tied_head:
    logits = x @ params['embed']['embedding'].T
  else:
    logits = x @ params['head']['kernel'] + params['head'].get('bias', 0)
  if config.logit_softcap:
    logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
  return logits[:, : config.vocab_size]


def _norm(config, params, x):
  if config.kind == 'layernorm':
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.epsilon)
  return x * (params['scale'] + config.scale_plus_one) + params.get('bias', 0)


def _mlp(config, params, x):
  activation = {
    'relu': lambda x: np.maximum(x, 0),
    'silu': lambda x: x / (1 + np.exp(-x)),
    'gelu': lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    'gelu_tanh': lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
  }[config.activation]
  up = x @ params['up']['kernel'] + params['up'].get('bias', 0)
  if config.gated:
    up = activation(x @ params['gate']['kernel'] + params['gate'].get('bias', 0)) * up
  else:
    up = activation(up)
  return up @ params['down']['kernel'] + params['down'].get('bias', 0)


def _experts(config, params, x):
  experts, out = config.experts, np.zeros_like(x)
  for t, row in enumerate(x):
    logits = row @ params['router']['kernel']
    if experts.scores == 'softmax':
      scores = ranks = np.exp(logits) / np.exp(logits).sum()
    else:
      scores = 1 / (1 + np.exp(-logits))
      ranks = scores + params['balance_bias']
    chosen = sorted(range(len(ranks)), key=lambda e: -ranks[e])[: experts.top_k]
    total = sum(scores[e] for e in chosen) if experts.normalized else 1
    for e in chosen:
      one = jax.tree.map(lambda leaf, e=e: leaf[e], params['experts'])
      out[t] += experts.weight_scale * scores[e] / total * _mlp(config, one, row)
  if experts.shared:
    gate = 1 / (1 + np.exp(-x @ params['shared_gate']['kernel'])) if experts.shared.gated else 1
    out += gate * _mlp(config, params['shared'], x)
  return out


def _attention(config, kind, params, x):
  def project(name):
    projection = params[name]
    return np.einsum('td,dnh->tnh', x, projection['kernel']) + projection.get('bias', 0)

  query, key, value = project('query'), project('key'), project('value')
  if config.query_key_norm == 'head':
    query = _norm(config.norm, params['query_norm'], query)
    key = _norm(config.norm, params['key_norm'], key)
  elif config.query_key_norm == 'width':
    query, key = (
      _norm(config.norm, {'scale': params[name]['scale'].ravel()}, y.reshape(len(x), -1))
      .reshape(y.shape) for name, y in (('query_norm', query), ('key_norm', key))
    )
  rotary = config.local_positions if kind == 'local' else None
  rotary = rotary or config.positions
  if isinstance(rotary, RotaryPositions) and kind != 'global_nope':
    query, key = _rotate(rotary, query), _rotate(rotary, key)
  group = config.num_heads // config.kv_heads
  mixed = np.zeros_like(query)
  for t in range(len(x)):
    first = max(0, t - config.window + 1) if kind == 'local' else 0
    for n in range(config.num_heads):
      scale = config.attention_scale or 1 / math.sqrt(query.shape[-1])
      logits = scale * key[first : t + 1, n // group] @ query[t, n]
      if config.attention_softcap:
        logits = config.attention_softcap * np.tanh(logits / config.attention_softcap)
      weights = np.exp(logits - logits.max())
      mixed[t, n] = weights / weights.sum() @ value[first : t + 1, n // group]
  out = np.einsum('tnh,nhd->td', mixed, params['out']['kernel'])
  return out + params['out'].get('bias', 0)


def _rotate(rotary, x):
  pairs = int(x.shape[-1] * rotary.fraction) // 2
  factor = rotary.scaling.factor if rotary.scaling else 1
  result = x.copy()
  for t in range(len(x)):
    for i in range(pairs):
      angle = t / factor * rotary.base ** (-i / pairs)
      a, b = x[t, :, i], x[t, :, i + pairs]
      result[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
      result[t, :, i + pairs] = b * math.cos(angle) + a * math.sin(angle)
  return result
