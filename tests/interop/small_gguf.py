"""Small models as GGUF files, written as llama.cpp's converter writes them."""

import dataclasses

import numpy as np
import small

from jaxllm.interop.gguf import _MIXTRAL, _PRE, ARCHITECTURES, _names
from jaxllm.models.positions import RotaryPositions

KEYS = {
  'hidden_size': 'embedding_length', 'intermediate_size': 'feed_forward_length',
  'num_hidden_layers': 'block_count', 'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv', 'max_position_embeddings': 'context_length',
  'head_dim': 'attention.key_length', 'sliding_window': 'attention.sliding_window',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon', 'rope_theta': 'rope.freq_base',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}
# Wide enough for blocks of 32.
SIZES = {'embed_dim': 64, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 16, 'mlp_dim': 96,
         'vocab_size': 260, 'num_layers': 3}
# What transformers takes for granted in these families, whatever the file says.
GEMMA = {'embedding_scale': 8.0, 'head_dim': 256, 'attention_scale': 256**-0.5}
CHANGES = {
  'gemma': {'embedding_scale': 8.0},
  'gemma2': GEMMA,
  'gemma3': GEMMA | {'num_layers': 7, 'positions': RotaryPositions(base=1e6)},
}


def config(kind):
  name = {'gemma3': 'gemma3_text', 'qwen2moe': 'qwen2_moe', 'qwen3moe': 'qwen3_moe'}.get(kind, kind)
  return small.CONFIGS[name].replace(**SIZES | CHANGES.get(kind, {}))


def interleave(array, heads):
  """Reorder rows i, i + P of each head as pairs 2i, 2i + 1."""
  halves = array.reshape(heads, 2, -1, *array.shape[1:])
  return halves.swapaxes(1, 2).reshape(array.shape)


def write(path, directory, kind, quantization='F32', vocabulary=None, extra=None, parts_of=0):
  """Write a GGUF file of a small model; its Hugging Face directory is left in `directory`.

  `extra` maps further keys of the architecture to their values; `parts_of` tensors go into each of
  several files.
  """
  import gguf

  made = config(kind)
  # Mixtral is a Llama with experts.
  kind = 'llama' if kind == 'mixtral' else kind
  architecture = ARCHITECTURES[kind]
  if kind == 'llama' and made.experts:
    architecture = dataclasses.replace(architecture, model_type='mixtral', norms=_PRE | _MIXTRAL)
  from jaxllm.interop import huggingface
  huggingface.save(directory, made, small.variables(made), small.files(),
                          model_type=architecture.model_type)
  source = huggingface.open_model(directory)
  writer = gguf.GGUFWriter(path, kind, split_max_tensors=parts_of)
  for theirs, ours in KEYS.items():
    value = source.keys.get(theirs)
    if isinstance(value, float):
      writer.add_float32(f'{kind}.{ours}', value)
    elif value is not None:
      writer.add_uint32(f'{kind}.{ours}', value)
  scaling = source.keys.get('rope_scaling')
  if scaling:
    writer.add_string(f'{kind}.rope.scaling.type', scaling['rope_type'])
    writer.add_float32(f'{kind}.rope.scaling.factor', scaling['factor'])
  for name, value in (extra or {}).items():
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
    add(f'{kind}.{name}', value)
  (vocabulary or byte_vocabulary)(writer)
  names = {theirs: ours for ours, theirs in _names(architecture, made.num_layers).items()}
  arrays = {name: np.array(tensor.array()) for name, tensor in source.tensors.items()}
  if made.experts:
    number = made.experts.num_experts
    writer.add_uint32(f'{kind}.expert_count', number)
    writer.add_uint32(f'{kind}.expert_used_count', made.experts.top_k)
    for name in [name for name in names if '{}' in name and name.format(0) in arrays]:
      arrays[name] = np.stack([arrays.pop(name.format(i)) for i in range(number)])
  for name, array in arrays.items():
    if name.endswith('shared_expert_gate.weight'):
      array = array[0]
    if architecture.norms_plus_one and 'norm' in name:
      array = array + np.float32(1)
    if architecture.interleaved and '.q_proj.' in name:
      array = interleave(array, made.num_heads)
    if architecture.interleaved and '.k_proj.' in name:
      array = interleave(array, made.kv_heads)
    kept = 'F32' if array.ndim == 1 else quantization
    quantized = gguf.GGMLQuantizationType[kept]
    writer.add_tensor(names[name], gguf.quantize(array, quantized), raw_dtype=quantized)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return made


def byte_vocabulary(writer):
  """GPT-2's kind: 256 bytes, two merges, two control tokens."""
  import tokenizers as library

  tokens = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  tokens += ['th', 'the', '<|end|>', '<|start|>']
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('smollm')
  writer.add_token_list(tokens)
  writer.add_token_types([1] * 258 + [3, 3])
  writer.add_token_merges(['t h', 'th e'])
  writer.add_bos_token_id(259)
  writer.add_eos_token_id(258)
  writer.add_add_bos_token(True)
  writer.add_chat_template('{{ messages[0].content }}<|end|>')
