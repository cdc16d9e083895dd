"""An independent forward pass in NumPy, against which a model's logits are proven.

It reads tensors by the names of their own format and the config by its own keys, shares no code,
table or config with the decoder, and prefers plainness to speed. Every conversion is measured
against it. Two things are told per model: where tensors lie, `_NAMES`, and the switches, `_Spec`
(`_from_keys` for Hugging Face, `_from_metadata` for GGUF).

Axis letters beyond the usual: O, the outputs of a matrix, P, pairs of rotated dimensions.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Returns a tensor, or some rows of it, by its name; None where there is none.
Get = Callable[..., Any]
Find = Callable[..., Any]
Keys = Mapping[str, Any]

# Part of a model -> its name; `{}` stands for the layer. Matrices are (out, in) but in GPT-2.
_LLAMA = {
  'embed': 'model.embed_tokens.weight', 'final': 'model.norm', 'head': 'lm_head.weight',
  'layer': 'model.layers.{}.', 'norm1': 'input_layernorm', 'norm2': 'post_attention_layernorm',
  'q': 'self_attn.q_proj', 'k': 'self_attn.k_proj', 'v': 'self_attn.v_proj',
  'o': 'self_attn.o_proj', 'q_norm': 'self_attn.q_norm', 'k_norm': 'self_attn.k_norm',
  'gate': 'mlp.gate_proj', 'up': 'mlp.up_proj', 'down': 'mlp.down_proj',
}
_SANDWICH = _LLAMA | {
  'norm2': 'pre_feedforward_layernorm', 'after1': 'post_attention_layernorm',
  'after2': 'post_feedforward_layernorm',
}
_EXPERTS = _LLAMA | {
  'router': 'mlp.gate', 'shared_scale': 'mlp.shared_expert_gate',
  **{f'{kind}_{part}': f'mlp.{owner}.{part}_proj' for part in ('gate', 'up', 'down')
     for kind, owner in (('expert', 'experts.{}'), ('shared', 'shared_expert'))},
}
_NAMES: dict[str, dict[str, str]] = {
  'gpt2': {
    'embed': 'transformer.wte.weight', 'places': 'transformer.wpe.weight',
    'final': 'transformer.ln_f', 'head': 'lm_head.weight', 'layer': 'transformer.h.{}.',
    'norm1': 'ln_1', 'norm2': 'ln_2', 'qkv': 'attn.c_attn', 'o': 'attn.c_proj',
    'up': 'mlp.c_fc', 'down': 'mlp.c_proj',
  },
  'gpt_neox': {
    'embed': 'gpt_neox.embed_in.weight', 'final': 'gpt_neox.final_layer_norm',
    'head': 'embed_out.weight', 'layer': 'gpt_neox.layers.{}.', 'norm1': 'input_layernorm',
    'norm2': 'post_attention_layernorm', 'qkv': 'attention.query_key_value',
    'o': 'attention.dense', 'up': 'mlp.dense_h_to_4h', 'down': 'mlp.dense_4h_to_h',
  },
  'phi3': _LLAMA | {'qkv': 'self_attn.qkv_proj', 'gate_up': 'mlp.gate_up_proj'},
  'olmo2': {
    part: name for part, name in _SANDWICH.items() if part not in ('norm1', 'norm2')},
  'gemma2': _SANDWICH, 'gemma3_text': _SANDWICH,
  'olmoe': _EXPERTS, 'qwen2_moe': _EXPERTS, 'qwen3_moe': _EXPERTS,
  'mixtral': _LLAMA | {
    'router': 'block_sparse_moe.gate', 'expert_gate': 'block_sparse_moe.experts.{}.w1',
    'expert_up': 'block_sparse_moe.experts.{}.w3', 'expert_down': 'block_sparse_moe.experts.{}.w2',
  },
  'gguf': {
    'embed': 'token_embd.weight', 'final': 'output_norm', 'head': 'output.weight',
    'layer': 'blk.{}.', 'norm1': 'attn_norm', 'norm2': 'ffn_norm',
    'after1': 'post_attention_norm', 'after2': 'post_ffw_norm', 'q': 'attn_q', 'k': 'attn_k',
    'v': 'attn_v', 'o': 'attn_output', 'q_norm': 'attn_q_norm', 'k_norm': 'attn_k_norm',
    'gate': 'ffn_gate', 'up': 'ffn_up', 'down': 'ffn_down', 'router': 'ffn_gate_inp',
    'shared_scale': 'ffn_gate_inp_shexp',
    **{f'{kind}_{part}': f'ffn_{part}_{end}' for part in ('gate', 'up', 'down')
       for kind, end in (('stacked', 'exps'), ('shared', 'shexp'))},
  },
}


@dataclasses.dataclass
class _Spec:
  """The switches of a model. `turns` and `local_turns`: radians per position, and a factor."""

  names: Mapping[str, str]
  depth: int
  heads: int
  kv_heads: int
  head_dim: int
  epsilon: float
  act: str
  turns: tuple[np.ndarray, float] | None = None
  local_turns: tuple[np.ndarray, float] | None = None
  neighbours: bool = False  # Whether pairs are dimensions 2i and 2i + 1, not i and i + P.
  window: Any = None
  local: Callable[[int], bool] = lambda layer: False
  unrotated: Callable[[int], bool] = lambda layer: False
  layer_norm: bool = False
  plus_one: bool = False
  parallel: bool = False
  in_out: bool = False
  per_head: bool = False  # Whether q, k and v of one head stand together in 'qkv'.
  tied: bool = False
  scale: float = 0.0
  softcap: float | None = None
  final_softcap: float | None = None
  embed_factor: float = 1.0
  top_k: int = 0  # Experts of a token.
  weights_to_1: bool = False  # Whether the weights of these are made to sum to 1.


def logits(
  keys: Keys, stored: Callable[[str], np.ndarray], ids: list[int], dtype: Any = np.float32,
  gguf: bool = False,
) -> np.ndarray:
  """Return logits (T, V) of the next token after each of `ids`.

  Args:
    keys: config.json, or the metadata of a GGUF file.
    stored: returns a tensor by its name, floats of any size; raises a KeyError if there is none.
    ids: T token ids.
    dtype: float32 or float64, in which all is computed.
    gguf: whether keys, names and layout are those of GGUF files.
  """
  def get(name: str, rows: Any = slice(None)) -> Any:
    try:
      return stored(name)[rows].astype(dtype)
    except KeyError:
      return None

  spec = _from_metadata(keys, get, len(ids)) if gguf else _from_keys(keys, len(ids))
  names = spec.names
  x_TD = get(names['embed'], ids) * spec.embed_factor
  if 'places' in names:
    x_TD = x_TD + get(names['places'], slice(len(ids)))
  for layer in range(spec.depth):
    find = _finder(names, get, layer)
    mixed = _attend(spec, find, layer, _norm(spec, find, 'norm1', x_TD))
    mixed = x_TD + _norm(spec, find, 'after1', mixed)
    before = x_TD if spec.parallel else mixed
    feed_forward = _experts if spec.top_k else _mlp
    added = feed_forward(spec, find, _norm(spec, find, 'norm2', before))
    x_TD = mixed + _norm(spec, find, 'after2', added)
  x_TD = _norm(spec, _finder(names, get, None), 'final', x_TD)
  table = stored(names['embed' if spec.tied else 'head'])
  # In pieces: a large vocabulary would take gigabytes.
  pieces = [x_TD @ table[i : i + 16384].astype(dtype).T for i in range(0, len(table), 16384)]
  return _cap(np.concatenate(pieces, axis=1), spec.final_softcap)


def _finder(names: Mapping[str, str], get: Get, layer: int | None) -> Find:
  """Return the function (part, 'weight' or 'bias', expert) -> tensor of this layer, or None."""
  start = '' if layer is None else names['layer'].format(layer)
  return lambda part, leaf, expert=None: (
    get(f'{start}{names[part].format(expert)}.{leaf}') if part in names else None)


def _cap(x: np.ndarray, cap: float | None) -> np.ndarray:
  return x if cap is None else cap * np.tanh(x / cap)


def _norm(spec: _Spec, find: Find, part: str, x: np.ndarray) -> np.ndarray:
  """Apply a norm of the layer, if it has one of that name."""
  weight, bias = find(part, 'weight'), find(part, 'bias')
  if weight is None:
    return x
  if spec.layer_norm:
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + spec.epsilon)
  x = x * (weight + spec.plus_one)
  return x if bias is None else x + bias


def _linear(spec: _Spec, find: Find, part: str, x_TD: np.ndarray) -> np.ndarray:
  weight, bias = find(part, 'weight'), find(part, 'bias')
  y_TO = x_TD @ (weight if spec.in_out else weight.T)
  return y_TO if bias is None else y_TO + bias


def _attend(spec: _Spec, find: Find, layer: int, x_TD: np.ndarray) -> np.ndarray:
  length, dim = len(x_TD), spec.head_dim
  if 'qkv' in spec.names:
    y_TO = _linear(spec, find, 'qkv', x_TD)
    if spec.per_head:
      y_TO = y_TO.reshape(length, spec.heads, 3, dim).swapaxes(1, 2).reshape(length, -1)
    ends = [spec.heads * dim, (spec.heads + spec.kv_heads) * dim]
    q, k, v = np.split(y_TO, ends, axis=1)
  else:
    q, k, v = (_linear(spec, find, part, x_TD) for part in 'qkv')
  by_head = (weight := find('q_norm', 'weight')) is None or weight.size == dim
  shape = (length, -1, dim) if by_head else (length, -1)
  q, k = (_norm(spec, find, f'{part}_norm', x.reshape(shape)) for part, x in (('q', q), ('k', k)))
  q, k, v = (part.reshape(length, -1, dim) for part in (q, k, v))
  turns = spec.local_turns if spec.local(layer) and spec.local_turns else spec.turns
  if turns is not None and not spec.unrotated(layer):
    q, k = _rotate(spec, q, *turns), _rotate(spec, k, *turns)
  k, v = (np.repeat(part, spec.heads // spec.kv_heads, axis=1) for part in (k, v))
  scores_NTS = _cap(np.einsum('TNH,SNH->NTS', q, k) * (spec.scale or dim**-0.5), spec.softcap)
  distance_TS = np.arange(length)[:, None] - np.arange(length)[None]
  hidden_TS = distance_TS < 0
  if spec.local(layer):
    hidden_TS |= distance_TS >= spec.window
  scores_NTS = np.where(hidden_TS, -np.inf, scores_NTS)
  weights_NTS = np.exp(scores_NTS - scores_NTS.max(-1, keepdims=True))
  weights_NTS = weights_NTS / weights_NTS.sum(-1, keepdims=True)
  mixed = np.einsum('NTS,SNH->TNH', weights_NTS, v).reshape(length, -1)
  return _linear(spec, find, 'o', mixed)


def _rotate(spec: _Spec, x_TNH: np.ndarray, turns_P: np.ndarray, factor: float) -> np.ndarray:
  pairs = len(turns_P)
  angles = np.arange(len(x_TNH))[:, None, None] * turns_P[None, None]
  cos, sin = (factor * f(angles).astype(x_TNH.dtype) for f in (np.cos, np.sin))
  out = x_TNH.copy()
  if spec.neighbours:
    first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
  else:
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
  a, b = x_TNH[..., first], x_TNH[..., second]
  out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
  return out


def _mlp(spec: _Spec, find: Find, x_TD: np.ndarray) -> np.ndarray:
  act, gate = _ACTIVATIONS[spec.act], None
  if 'gate_up' in spec.names:
    gate, up = np.split(_linear(spec, find, 'gate_up', x_TD), 2, axis=1)
  else:
    up = _linear(spec, find, 'up', x_TD)
    if 'gate' in spec.names:
      gate = _linear(spec, find, 'gate', x_TD)
  return _linear(spec, find, 'down', act(up) if gate is None else act(gate) * up)


def _experts(spec: _Spec, find: Find, x_TD: np.ndarray) -> np.ndarray:
  logits_TE = _linear(spec, find, 'router', x_TD)
  scores_TE = np.exp(logits_TE - logits_TE.max(-1, keepdims=True))
  scores_TE = scores_TE / scores_TE.sum(-1, keepdims=True)
  chosen_TK = np.argsort(-scores_TE, axis=-1, kind='stable')[:, : spec.top_k]
  if spec.weights_to_1:
    scores_TE = scores_TE / np.take_along_axis(scores_TE, chosen_TK, -1).sum(-1, keepdims=True)
  stacked = {part: find(f'stacked_{part}', 'weight') for part in ('gate', 'up', 'down')}
  y_TD = np.zeros_like(x_TD)
  for expert in np.unique(chosen_TK):
    def of_expert(part: str, leaf: str, expert: int = expert) -> Any:
      whole = stacked[part] if leaf == 'weight' else None
      return find(f'expert_{part}', leaf, expert) if whole is None else whole[expert]

    at = np.nonzero(chosen_TK == expert)[0]
    y_TD[at] += scores_TE[at, expert][:, None] * _mlp(spec, of_expert, x_TD[at])
  if find('shared_up', 'weight') is not None:
    scale_T1 = _linear(spec, find, 'shared_scale', x_TD).reshape(-1, 1)
    shared_TD = _mlp(spec, lambda part, leaf: find(f'shared_{part}', leaf), x_TD)
    y_TD += shared_TD / (1 + np.exp(-scale_T1))
  return y_TD


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
  return 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


_ERF = np.vectorize(math.erf, otypes=[float])
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'silu': lambda x: x / (1 + np.exp(-x)), 'swish': lambda x: x / (1 + np.exp(-x)),
  'relu': lambda x: np.maximum(x, 0),
  'gelu': lambda x: 0.5 * x * (1 + _ERF(x / 2**0.5).astype(x.dtype)),
  'gelu_new': _gelu_tanh, 'gelu_pytorch_tanh': _gelu_tanh, 'gelu_fast': _gelu_tanh,
}


def _turns(
  keys: Keys, rope: Keys, base: float, dim: int, longest: int, length: int
) -> tuple[np.ndarray, float]:
  """Return radians per position of each pair, and the factor of cosine and sine."""
  exponents_P = np.arange(0, dim, 2) / dim
  turns_P = base**-exponents_P
  kind: str | None = rope.get('rope_type') or rope.get('type')
  by: Any = rope.get('factor')
  trained: int = (keys.get('original_max_position_embeddings')
             or rope.get('original_max_position_embeddings') or longest)
  if kind == 'linear':
    return turns_P / by, 1.0
  if kind == 'llama3':
    waves_P, low, high = 2 * math.pi / turns_P, rope['low_freq_factor'], rope['high_freq_factor']
    smooth_P = (trained / waves_P - low) / (high - low)
    between_P = (1 - smooth_P) * turns_P / by + smooth_P * turns_P
    slow_P = np.where(waves_P > trained / low, turns_P / by, between_P)
    return np.where(waves_P < trained / high, turns_P, slow_P), 1.0
  if kind == 'yarn':
    def pair(times: float) -> float:
      return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    start, stop = pair(rope.get('beta_fast') or 32), pair(rope.get('beta_slow') or 1)
    if rope.get('truncate', True):
      start, stop = math.floor(start), math.ceil(stop)
    start, stop = max(start, 0), min(stop, dim - 1)
    slow_P = np.clip((np.arange(dim // 2) - start) / max(stop - start, 0.001), 0, 1)
    by = by or longest / trained
    growth, whole = 0.1 * math.log(by), rope.get('mscale_all_dim')
    above, below = (rope['mscale'], whole) if rope.get('mscale') and whole else (1, 0)
    factor = rope.get('attention_factor') or (above * growth + 1) / (below * growth + 1)
    return turns_P / by * slow_P + turns_P * (1 - slow_P), factor
  if kind in ('longrope', 'su'):
    divisors = rope['long_factor' if length > trained else 'short_factor']
    by = by or longest / trained
    wider = math.sqrt(1 + math.log(by) / math.log(trained)) if by > 1 else 1.0
    return turns_P / np.asarray(divisors), rope.get('attention_factor') or wider
  return turns_P, 1.0


def _from_keys(keys: Keys, length: int) -> _Spec:
  """Read config.json."""
  kind = keys['model_type']
  if kind == 'gemma3':
    return _from_keys({**keys['text_config'], 'model_type': 'gemma3_text'}, length)
  if kind == 'gpt2':
    return _Spec(
      _NAMES[kind], keys['n_layer'], keys['n_head'], keys['n_head'],
      keys['n_embd'] // keys['n_head'], keys.get('layer_norm_epsilon', 1e-5),
      keys.get('activation_function', 'gelu_new'), layer_norm=True, in_out=True,
      tied=keys.get('tie_word_embeddings', True),
      scale=0.0 if keys.get('scale_attn_weights', True) else 1.0)
  gemma, neox = kind.startswith('gemma'), kind == 'gpt_neox'
  depth, heads = keys['num_hidden_layers'], keys.get('num_attention_heads', 8)
  head_dim = keys.get('head_dim') or {'qwen3': 128}.get(kind) or (
    256 if gemma else keys['hidden_size'] // heads)
  kinds = keys.get('layer_types') or []
  spec = _Spec(
    _NAMES.get(kind, _LLAMA), depth, heads,
    keys.get('num_key_value_heads') or (4 if kind == 'gemma3_text' else heads), head_dim,
    keys.get('layer_norm_eps' if neox else 'rms_norm_eps',
             1e-5 if kind in ('phi3', 'mixtral', 'olmoe') else 1e-6),
    keys.get('hidden_act') or 'silu', layer_norm=neox, per_head=neox, plus_one=gemma,
    parallel=neox and keys.get('use_parallel_residual', True),
    tied=keys.get('tie_word_embeddings', gemma or kind == 'smollm3'),
    window=keys.get('sliding_window'), top_k=keys.get('num_experts_per_tok', 0),
    weights_to_1=keys.get('norm_topk_prob', kind == 'mixtral'))
  if kind in ('mistral', 'mixtral', 'phi3'):
    spec.local = lambda layer: spec.window is not None
  elif kind in ('qwen2', 'qwen3') and keys.get('use_sliding_window'):
    first = keys.get('max_window_layers', 28)
    spec.local = lambda layer: kinds[layer][0] == 's' if kinds else layer >= first
  elif kind in ('gemma2', 'gemma3_text'):
    every = 2 if kind == 'gemma2' else keys.get('sliding_window_pattern', 6)
    spec.local = lambda layer: kinds[layer][0] == 's' if kinds else (layer + 1) % every != 0
  elif kind == 'smollm3':
    marks, every = keys.get('no_rope_layers'), keys.get('no_rope_layer_interval', 4)
    spec.unrotated = lambda layer: not marks[layer] if marks else (layer + 1) % every == 0
  if gemma:
    act = keys.get('hidden_activation') or keys.get('hidden_act') or 'gelu_pytorch_tanh'
    spec.act = 'gelu_pytorch_tanh' if act == 'gelu' else act
    spec.embed_factor = keys['hidden_size'] ** 0.5
  if kind in ('gemma2', 'gemma3_text'):
    second = kind == 'gemma2'
    spec.window = keys.get('sliding_window', 4096)
    spec.scale = keys.get('query_pre_attn_scalar', 256) ** -0.5
    spec.softcap = keys.get('attn_logit_softcapping', 50.0) if second else None
    spec.final_softcap = keys.get('final_logit_softcapping', 30.0 if second else None)
  _add_turns(spec, keys, kind, length)
  return spec


def _add_turns(spec: _Spec, keys: Keys, kind: str, length: int) -> None:
  rope = keys.get('rope_scaling') or keys.get('rope_parameters') or {}
  longest = keys.get('max_position_embeddings', 131072 if kind == 'gemma3_text' else 8192)
  base = {'smollm3': 2e6, 'gemma3_text': 1e6}.get(kind, 1e4)
  base = keys.get('rope_theta') or keys.get('rotary_emb_base') or base
  share = keys.get('partial_rotary_factor') or (0.25 if kind == 'gpt_neox' else 1.0)
  share = keys.get('rotary_pct', share)
  if kind == 'gemma3_text':
    local = (keys.get('rope_parameters') or {}).get('sliding_attention') or {}
    local_base = local.get('rope_theta') or keys.get('rope_local_base_freq') or 1e4
    spec.local_turns = _turns(keys, {}, local_base, spec.head_dim, longest, length)
    rope = rope.get('full_attention') or rope
  dim = int(spec.head_dim * float(rope.get('partial_rotary_factor') or share))
  spec.turns = _turns(keys, rope, rope.get('rope_theta') or base, dim, longest, length)


def _from_metadata(keys: Keys, get: Get, length: int) -> _Spec:
  """Read the metadata of a GGUF file."""
  kind = keys['general.architecture']

  def value(name: str, default: Any = None) -> Any:
    return keys.get(f'{kind}.{name}', default)

  gemma, heads = kind.startswith('gemma'), value('attention.head_count')
  width: Any = value('embedding_length')
  head_dim = value('attention.key_length', width // heads)
  spec = _Spec(
    _NAMES['gguf'], value('block_count'), heads, value('attention.head_count_kv', heads), head_dim,
    value('attention.layer_norm_rms_epsilon'), 'gelu_pytorch_tanh' if gemma else 'silu',
    neighbours=kind == 'llama', embed_factor=width**0.5 if gemma else 1.0,
    top_k=value('expert_used_count', 0), weights_to_1=kind in ('llama', 'qwen3moe'))
  if kind in ('gemma2', 'gemma3'):
    every = value('attention.sliding_window_pattern', 2 if kind == 'gemma2' else 6)
    spec.window = value('attention.sliding_window', 4096 if kind == 'gemma2' else 0)
    spec.local = lambda layer: spec.window and (
      every[layer] if isinstance(every, list) else not every or layer % every < every - 1)
    spec.softcap = value('attn_logit_softcapping', 50.0) if kind == 'gemma2' else None
    cap = value('final_logit_softcapping', 30.0 if kind == 'gemma2' else 0)
    spec.final_softcap = cap or None
    # The 27B models divide by the square root of width / heads, not of the head dimension.
    wide = (kind, spec.depth) in (('gemma2', 46), ('gemma3', 62))
    spec.scale = (width / heads if wide else head_dim) ** -0.5
  base = value('rope.freq_base', 1e6 if kind == 'gemma3' else 1e4)
  dim = value('rope.dimension_count', head_dim)
  spec.turns = _llama_cpp_turns(value, get, base, dim, length)
  if kind == 'gemma3':
    local_base = value('rope.freq_base_swa', 1e4)
    spec.local_turns = _turns({}, {}, local_base, dim, 0, length)
  spec.tied = get('output.weight') is None
  return spec


def _llama_cpp_turns(
  value: Callable[..., Any], get: Get, base: float, dim: int, length: int
) -> tuple[np.ndarray, float]:
  """Return `_turns` of the metadata of a GGUF file."""
  rope = {
    'type': value('rope.scaling.type', 'linear'),
    'factor': value('rope.scaling.factor') or value('rope.scale_linear') or 1.0,
    'original_max_position_embeddings': value('rope.scaling.original_context_length'),
    'beta_fast': value('rope.scaling.yarn_beta_fast'),
    'beta_slow': value('rope.scaling.yarn_beta_slow'),
  }
  turns_P, factor = _turns({}, rope, base, dim, value('context_length'), length)
  divisors_P = get('rope_freqs.weight')
  turns_P = turns_P if divisors_P is None else turns_P / divisors_P
  return turns_P, factor * value('rope.scaling.attn_factor', 1.0)
