"""Families with a mixture of experts: Mixtral, OLMoE, Qwen 2 and Qwen 3.

Reference:
  The released configurations, and: Mixtral, Jiang et al., arXiv 2401.04088; OLMoE, Muennighoff et
  al., 2409.02060; Qwen 2 and 3, Yang et al., 2407.10671 and 2505.09388.
"""

from collections.abc import Mapping
from typing import Any

from jaxllm.models.config import DecoderConfig, ExpertsConfig, SharedExpertConfig
from jaxllm.models.families import huggingface as hf
from jaxllm.models.families import llama

_MIXTRAL = llama.PRESETS['mistral_7b_v0.3'].replace(
  vocab_size=32000, experts=ExpertsConfig(num_experts=8, top_k=2))

PRESETS = {
  'mixtral_8x7b': _MIXTRAL,
  'mixtral_8x22b': _MIXTRAL.replace(
    max_length=65536, embed_dim=6144, num_layers=56, num_heads=48, mlp_dim=16384),
  'olmoe_1b_7b': llama.PRESETS['llama2_7b'].replace(
    vocab_size=50304, embed_dim=2048, num_layers=16, num_heads=16, mlp_dim=1024,
    query_key_norm='width', experts=ExpertsConfig(num_experts=64, top_k=8, normalized=False)),
  'qwen1.5_moe_a2.7b': llama.PRESETS['qwen2_1.5b'].replace(
    embed_dim=2048, num_layers=24, num_heads=16, num_kv_heads=None, mlp_dim=1408, max_length=8192,
    tied_head=False, experts=ExpertsConfig(
      num_experts=60, top_k=4, normalized=False,
      shared=SharedExpertConfig(mlp_dim=5632, gated=True))),
  'qwen3_30b_a3b': llama.PRESETS['qwen3_8b'].replace(
    embed_dim=2048, num_layers=48, num_kv_heads=4, mlp_dim=768,
    experts=ExpertsConfig(num_experts=128, top_k=8)),
}

_LAYER = 'model.layers.{}.'
_PROJECTIONS = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}
# More than any published model has; see `hf.MAX_LAYERS`.
_MAX_EXPERTS = 2**16


def _names(owner: str, matrices: Mapping[str, str] = _PROJECTIONS) -> dict[Any, str]:
  """Return the names of a family; `{}` stands for the layer, and then for the expert."""
  return {
    **{path: name for path, name in llama.NAMES.items() if '/mlp/' not in path},
    'layers/mlp/router/kernel': f'{_LAYER}{owner}.gate.weight',
    **{f'layers/mlp/experts/{ours}/kernel': f'{_LAYER}{owner}.experts.{{}}.{theirs}.weight'
       for ours, theirs in matrices.items()},
  }


def _decode(
  keys: hf.Keys, width: str = 'moe_intermediate_size', normalized: bool = False,
  shared: SharedExpertConfig | None = None, **fields: Any,
) -> DecoderConfig:
  """Translate the keys that these families share; `width` is that of an expert's hidden width."""
  hf.refuse(keys, 'mlp_only_layers', [])
  hf.refuse(keys, 'decoder_sparse_step', 1)
  hf.refuse(keys, 'use_sliding_window', False)
  name = 'num_local_experts' if keys.get('num_experts') is None else 'num_experts'
  limit = _MAX_EXPERTS // hf.size(keys, 'num_hidden_layers', limit=hf.MAX_LAYERS)
  experts = ExpertsConfig(
    num_experts=hf.size(keys, name, limit=limit), top_k=hf.size(keys, 'num_experts_per_tok'),
    normalized=hf.flag(keys, 'norm_topk_prob', normalized), shared=shared)
  return hf.rms_decoder(keys, mlp_dim=hf.size(keys, width), experts=experts, **fields)


def _encode(
  config: DecoderConfig, number: str = 'num_experts', **keys: Any
) -> dict[str, Any]:
  if (experts := config.experts) is None:
    raise ValueError('experts=None')
  return hf.rms_config(config, **{
    number: experts.num_experts, 'num_experts_per_tok': experts.top_k,
    'norm_topk_prob': experts.normalized, 'attention_bias': 'qkv' in config.biases, **keys})


def _decode_olmoe(keys: hf.Keys) -> DecoderConfig:
  hf.refuse(keys, 'clip_qkv')
  keys = hf.with_defaults(keys, {'rms_norm_eps': 1e-5})
  return _decode(keys, 'intermediate_size', query_key_norm='width')


def _decode_qwen2(keys: hf.Keys) -> DecoderConfig:
  shared = SharedExpertConfig(mlp_dim=hf.size(keys, 'shared_expert_intermediate_size'), gated=True)
  return _decode(keys, shared=shared, biases=('qkv',) if hf.flag(keys, 'qkv_bias', True) else ())


def _encode_qwen2(config: DecoderConfig) -> dict[str, Any]:
  shared = config.experts and config.experts.shared
  return _encode(
    config, moe_intermediate_size=config.mlp_dim, qkv_bias='qkv' in config.biases,
    shared_expert_intermediate_size=shared.mlp_dim if shared else None)


MIXTRAL = hf.Format(
  'mixtral', 'MixtralForCausalLM',
  _names('block_sparse_moe', {'gate': 'w1', 'up': 'w3', 'down': 'w2'}),
  lambda keys: _decode(
    hf.with_defaults(keys, {'rms_norm_eps': 1e-5, 'norm_topk_prob': True}), 'intermediate_size',
    **llama.window(keys)),
  lambda config: _encode(config, 'num_local_experts', sliding_window=config.window))
OLMOE = hf.Format(
  'olmoe', 'OlmoeForCausalLM', _names('mlp') | llama.QUERY_KEY_NORMS, _decode_olmoe, _encode)
QWEN2 = hf.Format(
  'qwen2_moe', 'Qwen2MoeForCausalLM', encode=_encode_qwen2, decode=_decode_qwen2,
  names=_names('mlp') | {
    'layers/mlp/shared_gate/kernel': _LAYER + 'mlp.shared_expert_gate.weight',
    **{f'layers/mlp/shared/{ours}/kernel': f'{_LAYER}mlp.shared_expert.{theirs}.weight'
       for ours, theirs in _PROJECTIONS.items()}})
QWEN3 = hf.Format(
  'qwen3_moe', 'Qwen3MoeForCausalLM', _names('mlp') | llama.QUERY_KEY_NORMS,
  lambda keys: _decode(keys, query_key_norm='head'),
  lambda config: _encode(config, moe_intermediate_size=config.mlp_dim))
