"""Configs of small models for each family, with sizes that no two axes share by accident.

Each entry: class of transformers, and its arguments.
"""

RMS = {
  'vocab_size': 101, 'hidden_size': 48, 'intermediate_size': 68, 'num_hidden_layers': 3,
  'num_attention_heads': 6, 'num_key_value_heads': 2, 'max_position_embeddings': 96,
}
SPECIAL = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 0}
GEMMA = RMS | {'head_dim': 12, 'num_hidden_layers': 4}

MODELS = {
  'gpt2': ('GPT2', {
    'vocab_size': 103, 'n_positions': 96, 'n_embd': 40, 'n_layer': 3, 'n_head': 5}),
  'gpt2_untied': ('GPT2', {
    'vocab_size': 128, 'n_positions': 96, 'n_embd': 36, 'n_layer': 2, 'n_head': 3, 'n_inner': 52,
    'activation_function': 'relu', 'tie_word_embeddings': False, 'scale_attn_weights': False}),
  'llama': ('Llama', RMS),
  'llama_one_head': ('Llama', RMS | {
    'num_attention_heads': 4, 'num_key_value_heads': 1, 'tie_word_embeddings': True,
    'attention_bias': True, 'mlp_bias': True, 'vocab_size': 131}),
  'llama_linear': ('Llama', RMS | {'rope_parameters': {
    'rope_type': 'linear', 'factor': 3.0, 'rope_theta': 5000.0}}),
  'llama3': ('Llama', RMS | {'head_dim': 14, 'rope_parameters': {
    'rope_type': 'llama3', 'factor': 8.0, 'rope_theta': 50000.0, 'low_freq_factor': 1.0,
    'high_freq_factor': 4.0, 'original_max_position_embeddings': 32}}),
  'llama_yarn': ('Llama', RMS | {'rope_parameters': {
    'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 10000.0, 'beta_fast': 16.0,
    'original_max_position_embeddings': 24}}),
  'smollm3': ('SmolLM3', RMS | {'num_hidden_layers': 5}),
  'mistral': ('Mistral', RMS | {'sliding_window': 7}),
  'mistral_global': ('Mistral', RMS | {'sliding_window': None, 'head_dim': 10}),
  'qwen2': ('Qwen2', RMS),
  'qwen2_window': ('Qwen2', RMS | {
    'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1,
    'tie_word_embeddings': True}),
  'qwen3': ('Qwen3', RMS | {'head_dim': 18}),
  'gemma': ('Gemma', GEMMA | {'num_key_value_heads': 1}),
  'gemma2': ('Gemma2', GEMMA | {
    'sliding_window': 6, 'query_pre_attn_scalar': 20, 'num_hidden_layers': 5}),
  'gemma3': ('Gemma3Text', GEMMA | {
    'sliding_window': 6, 'query_pre_attn_scalar': 24, 'num_hidden_layers': 7,
    'rope_parameters': {
      'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4}}}),
  'phi3': ('Phi3', RMS | {'sliding_window': 9, 'pad_token_id': 0}),
  'phi3_longrope': ('Phi3', RMS | {
    'partial_rotary_factor': 0.5, 'original_max_position_embeddings': 48,
    'rope_parameters': {
      'rope_type': 'longrope', 'rope_theta': 10000.0, 'partial_rotary_factor': 0.5,
      'original_max_position_embeddings': 48, 'factor': 2.0,
      'short_factor': [1.0, 1.5], 'long_factor': [2.0, 7.0]}}),
  'olmo2': ('Olmo2', RMS),
  'mixtral': ('Mixtral', RMS | {'num_local_experts': 5, 'sliding_window': 9}),
  'olmoe': ('Olmoe', RMS | {'num_experts': 6, 'num_experts_per_tok': 3}),
  'qwen2_moe': ('Qwen2Moe', RMS | {
    'num_experts': 5, 'num_experts_per_tok': 3, 'moe_intermediate_size': 20,
    'shared_expert_intermediate_size': 28}),
  'qwen3_moe': ('Qwen3Moe', RMS | {
    'num_experts': 7, 'num_experts_per_tok': 2, 'moe_intermediate_size': 20, 'head_dim': 10,
    'norm_topk_prob': True}),
  'neox': ('GPTNeoX', {
    'vocab_size': 109, 'hidden_size': 48, 'intermediate_size': 60, 'num_hidden_layers': 3,
    'num_attention_heads': 6, 'max_position_embeddings': 96}),
  'neox_sequential': ('GPTNeoX', {
    'vocab_size': 109, 'hidden_size': 48, 'intermediate_size': 60, 'num_hidden_layers': 2,
    'num_attention_heads': 3, 'max_position_embeddings': 96, 'use_parallel_residual': False,
    'attention_bias': False, 'hidden_act': 'gelu_new', 'rotary_pct': 0.5}),
}


def make(name, seed=0):
  """Return a model of transformers, float32, in evaluation mode, every parameter random."""
  import torch
  import transformers

  family, arguments = MODELS[name]
  config = getattr(transformers, f'{family}Config')(**SPECIAL | arguments)
  torch.set_num_threads(1)  # These models are too small for more.
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
  with torch.no_grad():
    for parameter in model.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))
      else:
        parameter.copy_(torch.randn_like(parameter) * 1.2 * parameter.shape[-1] ** -0.5)
  return model.eval()
