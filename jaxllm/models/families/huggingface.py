"""How models are stored on the Hugging Face hub: the names of tensors and the keys of config.json.

A family file declares a `Format`, which import, export and the checks read. Families share
`rms_decoder` and `rms_config`, which translate the keys that most of them have, and their parts:
rotary positions, layer kinds, single values of an untrusted config.json, names of tensors.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from jaxllm.models import positions as ropes
from jaxllm.models.config import DecoderConfig
from jaxllm.models.norms import NormConfig

Keys = Mapping[str, Any]
# A path, or a tuple of several, -> name of the tensor.
Names = Mapping[Any, str]

# More than any published model has; a larger number is a damaged or hostile file.
MAX_SIZE, MAX_LAYERS = 2**31, 4096

ACTIVATIONS: dict[str, Any] = {
  'silu': 'silu', 'swish': 'silu', 'relu': 'relu', 'gelu': 'gelu', 'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
}
ACTIVATION_NAMES = {
  'silu': 'silu', 'relu': 'relu', 'gelu': 'gelu', 'gelu_tanh': 'gelu_pytorch_tanh',
}
KINDS = {'full_attention': 'global', 'sliding_attention': 'local'}
# Field of `DecoderConfig` -> key of config.json, in most families.
SIZES = {
  'vocab_size': 'vocab_size', 'embed_dim': 'hidden_size', 'num_layers': 'num_hidden_layers',
  'num_heads': 'num_attention_heads', 'mlp_dim': 'intermediate_size',
}


@dataclasses.dataclass(frozen=True)
class Format:
  """How models of one `model_type` are stored.

  Attributes:
    model_type: as in config.json.
    architecture: the class that `transformers` loads them with.
    names: our parameter path (several, where they are fused into one tensor) -> name of the tensor,
      in which `{}` stands for the layer. Paths that a config does not have are skipped.
    decode: config.json -> config; raises a ValueError for what cannot be expressed.
    encode: config -> keys of config.json; what it cannot say is found by decoding again.
    prefix: beginning of `names`, except those of the head; files of the bare model leave it out,
      or have one of `other_prefixes` in its place.
    kernels: whether matrices are stored (out, in), as by torch, or (in, out).
    fused: whether fused tensors hold one part after the other, or the parts of each head.
    aliases: name in a file -> name in `names`.
    ignored: regular expression of names that hold no weight of a text decoder -> the reason.
  """

  model_type: str
  architecture: str
  names: Names
  decode: Callable[[Keys], DecoderConfig]
  encode: Callable[[DecoderConfig], dict[str, Any]]
  prefix: str = 'model.'
  other_prefixes: tuple[str, ...] = ('',)
  kernels: Literal['out_in', 'in_out'] = 'out_in'
  fused: Literal['concatenated', 'per_head'] = 'concatenated'
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  ignored: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {r'.*\.rotary_emb\.inv_freq': 'rotary frequencies, computed'})


def size(keys: Keys, name: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
  """Return a count from config.json, or raise a ValueError."""
  value = _get(keys, name, default)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
    raise ValueError(f'config.json: {name}={value!r}; a whole number from 1 to {limit} is needed')
  return value


def number(
  keys: Keys, name: str, default: float | None = None, above: float = -1e308
) -> float:
  """Return a finite number from config.json, or raise a ValueError."""
  value = _get(keys, name, default)
  if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < 1e308:
    raise ValueError(f'config.json: {name}={value!r}; a finite number is needed'
                     f'{f" above {above}" if above == 0 else ""}')
  return float(value)


def flag(keys: Keys, name: str, default: bool = False) -> bool:
  """Return a boolean from config.json, or raise a ValueError."""
  value = _get(keys, name, default)
  if not isinstance(value, bool):
    raise ValueError(f'config.json: {name}={value!r}; true or false is needed')
  return value


def _get(keys: Keys, name: str, default: Any) -> Any:
  return default if keys.get(name) is None else keys[name]


def sizes(keys: Keys, names: Mapping[str, str]) -> dict[str, int]:
  """Return fields of `DecoderConfig` from config.json, by a table such as `SIZES`."""
  return {field: size(keys, name, limit=MAX_LAYERS if field == 'num_layers' else MAX_SIZE)
          for field, name in names.items()}


def common_keys(config: DecoderConfig, names: Mapping[str, str]) -> dict[str, Any]:
  """Return the keys that every family has; `names` as in `sizes`."""
  return {name: getattr(config, field) for field, name in names.items()} | {
    'initializer_range': config.initializer.stddev or 0.02,
    'tie_word_embeddings': config.tied_head,
  }


def affine_names(names: Mapping[str, str]) -> dict[str, str]:
  """Return the names of the weight and the bias of kernels and norms."""
  return {
    f'{path}/{leaf}': f'{name}.{kind}' for path, name in names.items()
    for leaf, kind in (('scale' if 'norm' in path else 'kernel', 'weight'), ('bias', 'bias'))}


def qkv_names(
  name: str, leaves: Mapping[str, str] = {'kernel': 'weight', 'bias': 'bias'}  # noqa: B006
) -> dict[tuple[str, ...], str]:
  """Return the names of queries, keys and values that are fused into one tensor."""
  return {
    tuple(f'layers/attention/{part}/{leaf}' for part in ('query', 'key', 'value')): f'{name}.{kind}'
    for leaf, kind in leaves.items()}


def with_defaults(keys: Keys, defaults: Keys) -> Keys:
  """Return `keys` with the values of a family for what its config.json leaves out (or null)."""
  absent = {name: value for name, value in defaults.items() if keys.get(name) is None}
  return collections.ChainMap(absent, keys)  # type: ignore[arg-type]


def refuse(keys: Keys, name: str, *accepted: Any) -> None:
  """Raise a ValueError where a key changes the computation in a way that we do not have."""
  value = keys.get(name)
  if value is not None and value not in accepted:
    raise ValueError(f'config.json: {name}={value!r} is not supported (only '
                     f'{", ".join(map(repr, accepted)) or "null"})')


def activation(keys: Keys, name: str, default: str) -> Any:
  """Return our name of the activation that config.json names, or raise a ValueError."""
  value = keys.get(name) or default
  if not isinstance(value, str) or value not in ACTIVATIONS:
    raise ValueError(f'config.json: {name}={value!r} is not supported (supported: '
                     f'{", ".join(ACTIVATIONS)})')
  return ACTIVATIONS[value]


def pattern(kinds: Sequence[str]) -> tuple[str, ...]:
  """Return the shortest sequence that, repeated, gives `kinds`."""
  length = next(length for length in range(1, len(kinds) + 1)
                if all(kind == kinds[i % length] for i, kind in enumerate(kinds)))
  return tuple(kinds[:length])


def layer_types(keys: Keys, default: Sequence[str]) -> list[str]:
  """Return our kind of each layer, from `layer_types` or `default` (in their words)."""
  types = keys.get('layer_types') or default
  if not isinstance(types, list | tuple) or len(types) != len(default):
    raise ValueError(f'config.json: layer_types={types!r}; one of {", ".join(KINDS)} for each of '
                     f'{len(default)} layers is needed')
  unknown = [kind for kind in types if str(kind) not in KINDS]
  if unknown:
    raise ValueError(f'config.json: layer_types names {unknown[0]!r} (supported: '
                     f'{", ".join(KINDS)})')
  return [KINDS[kind] for kind in types]


def layer_type_names(config: DecoderConfig) -> list[str]:
  """Return the `layer_types` of config.json."""
  names = {kind: name for name, kind in KINDS.items()}
  return [names.get(kind, 'full_attention') for kind in config.layer_kinds]


def rotary(
  keys: Keys, base: float = 10_000.0, fraction: float = 1.0, rope: Keys | None = None
) -> ropes.RotaryPositions:
  """Read rotary positions from config.json, in the older or newer writing.

  Args:
    keys: of config.json: `rope_theta` with `rope_scaling`, or `rope_parameters`.
    base: where none is named.
    fraction: where none is named.
    rope: to be read instead of `rope_parameters` (families with several).
  """
  if rope is None:
    rope = _rope(keys)
  if not isinstance(rope, Mapping):
    raise ValueError(f'config.json: rope_scaling={rope!r}; an object is needed')
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if str(kind) not in _SCALINGS:
    raise ValueError(f'config.json: rope_scaling of type {kind!r} is not supported (supported: '
                     f'{", ".join(_SCALINGS)})')
  return ropes.RotaryPositions(
    base=number(rope, 'rope_theta', number(keys, 'rope_theta', base)),
    fraction=number(
      rope, 'partial_rotary_factor', number(keys, 'partial_rotary_factor', fraction)),
    scaling=_SCALINGS[kind](keys, rope),
  )


def rotary_keys(config: DecoderConfig) -> dict[str, Any]:
  """Return `rope_theta` and `rope_scaling` for config.json: the writing that all versions read."""
  positions = config.positions
  if not isinstance(positions, ropes.RotaryPositions):
    return {}
  keys: dict[str, Any] = {'rope_theta': positions.base,
                          'rope_scaling': scaling_keys(config, positions.scaling)}
  if positions.fraction != 1:
    keys['partial_rotary_factor'] = positions.fraction
  return keys


_SCALING_KEYS = {
  'factor': 'factor', 'attention_factor': 'attention_factor',
  'original_length': 'original_max_position_embeddings',
  'low_frequency_factor': 'low_freq_factor', 'high_frequency_factor': 'high_freq_factor',
  'fast_turns': 'beta_fast', 'slow_turns': 'beta_slow', 'whole_pairs': 'truncate',
  'short_factors': 'short_factor', 'long_factors': 'long_factor',
}


def scaling_keys(config: DecoderConfig, scaling: ropes.Scaling | None) -> dict[str, Any] | None:
  """Return `rope_scaling` for config.json."""
  if scaling is None:
    return None
  keys: dict[str, Any] = {'rope_type': scaling.kind}
  for field, value in dict(scaling).items():
    if field in _SCALING_KEYS and value is not None and value is not True:
      keys[_SCALING_KEYS[field]] = list(value) if isinstance(value, tuple) else value
  if isinstance(scaling, ropes.LongRopeScaling):
    keys['factor'] = max(1.0, config.max_length / scaling.original_length)
  return keys


def context_length(keys: Keys, positions: ropes.RotaryPositions) -> int:
  """Return the longest context: a scaling reaches `factor` times further than the training did.

  Where `max_position_embeddings` already is the longer one, config.json names the length of the
  training beside it.
  """
  longest, scaling = size(keys, 'max_position_embeddings'), positions.scaling
  if not isinstance(scaling, ropes.LinearScaling | ropes.YarnScaling):
    return longest
  trained = (_length(keys, _rope(keys)) if isinstance(scaling, ropes.LinearScaling)
             else scaling.original_length)
  reach = int(min(trained * scaling.factor, 1e18))
  return max(longest, size({'context length': reach}, 'context length'))


def context_keys(config: DecoderConfig) -> dict[str, int]:
  """Return the keys that `context_length` reads."""
  scaling, longest = getattr(config.positions, 'scaling', None), config.max_length
  if not isinstance(scaling, ropes.LinearScaling):
    return {'max_position_embeddings': longest}
  trained = longest / scaling.factor
  if trained.is_integer():
    return {'max_position_embeddings': int(trained)}
  return {'max_position_embeddings': longest, 'original_max_position_embeddings': int(trained)}


def _rope(keys: Keys) -> Any:
  return keys.get('rope_scaling') or keys.get('rope_parameters') or {}


def rms_decoder(keys: Keys, partial: bool = False, **fields: Any) -> DecoderConfig:
  """Translate the keys that the families with RMSNorm and a gated MLP share.

  Args:
    partial: whether this family may rotate a part of each head.
    **fields: of `DecoderConfig`, where a family differs.
  """
  found = sizes(keys, SIZES)
  width, heads = found['embed_dim'], found['num_heads']
  biases = ('qkv', 'attention_out') if flag(keys, 'attention_bias') else ()
  positions = fields.pop('positions', None) or rotary(keys)
  if positions.fraction != 1 and not partial:
    raise ValueError(f'config.json: partial_rotary_factor={positions.fraction} is not supported '
                     'for this model_type')
  shared = {
    **found,
    'num_kv_heads': size(keys, 'num_key_value_heads', heads),
    'head_dim': size(keys, 'head_dim', max(1, width // heads)),
    'max_length': context_length(keys, positions),
    'positions': positions,
    'norm': NormConfig(kind='rmsnorm', epsilon=number(keys, 'rms_norm_eps', 1e-6)),
    'activation': None if 'activation' in fields else activation(keys, 'hidden_act', 'silu'),
    'biases': biases + (('mlp',) if flag(keys, 'mlp_bias') else ()),
    'tied_head': flag(keys, 'tie_word_embeddings'),
  }
  return DecoderConfig(**{**shared, **fields})


def rms_config(config: DecoderConfig, **keys: Any) -> dict[str, Any]:
  """Return the keys that `rms_decoder` reads; `keys` replaces and adds some."""
  return {
    **common_keys(config, SIZES),
    'num_key_value_heads': config.kv_heads,
    'head_dim': config.head_size,
    'hidden_act': ACTIVATION_NAMES[config.activation],
    **context_keys(config),
    'rms_norm_eps': config.norm.epsilon,
    'attention_dropout': config.attention_dropout_rate,
    **rotary_keys(config),
    **keys,
  }


def _length(keys: Keys, rope: Keys) -> int:
  """The length of the training: named at one of two places, else the longest context."""
  longest = size(keys, 'max_position_embeddings')
  inner = size(rope, 'original_max_position_embeddings', longest)
  return size(keys, 'original_max_position_embeddings', inner)


def _stretch(keys: Keys, rope: Keys) -> tuple[int, float]:
  """The length of the training, and how many times further the scaling reaches."""
  length = _length(keys, rope)
  return length, number(rope, 'factor', size(keys, 'max_position_embeddings') / length)


def _yarn(keys: Keys, rope: Keys) -> ropes.YarnScaling:
  length, factor = _stretch(keys, rope)
  sharpness = rope.get('attention_factor')
  if sharpness is None and rope.get('mscale') and rope.get('mscale_all_dim'):
    growth = 0.1 * math.log(max(factor, 1.0))
    above, below = (number(rope, name) * growth + 1 for name in ('mscale', 'mscale_all_dim'))
    sharpness = above / below
  return ropes.YarnScaling(
    factor=factor, original_length=length, attention_factor=sharpness,
    fast_turns=number(rope, 'beta_fast', 32.0), slow_turns=number(rope, 'beta_slow', 1.0),
    whole_pairs=flag(rope, 'truncate', True))


def _longrope(keys: Keys, rope: Keys) -> ropes.LongRopeScaling:
  length, factor = _stretch(keys, rope)
  sharpness = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
  return ropes.LongRopeScaling(
    short_factors=rope.get('short_factor') or (), long_factors=rope.get('long_factor') or (),
    original_length=length, attention_factor=number(rope, 'attention_factor', sharpness))


_SCALINGS: dict[str, Callable[[Keys, Keys], ropes.Scaling | None]] = {
  'default': lambda keys, rope: None,
  'linear': lambda keys, rope: ropes.LinearScaling(factor=number(rope, 'factor')),
  'llama3': lambda keys, rope: ropes.Llama3Scaling(
    factor=number(rope, 'factor'),
    low_frequency_factor=number(rope, 'low_freq_factor'),
    high_frequency_factor=number(rope, 'high_freq_factor'),
    original_length=_length(keys, rope),
  ),
  'yarn': _yarn,
  'longrope': _longrope,
  'su': _longrope,
}
