"""`DecoderConfig`: everything that tells one decoder-only transformer from another, as data."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pydantic

from jaxllm.config import Config
from jaxllm.models.linear import InitializerConfig
from jaxllm.models.norms import NormConfig
from jaxllm.models.positions import LearnedPositions, LongRopeScaling, RotaryPositions, rotary_dim

LayerKind = Literal['global', 'local', 'global_nope']
BiasPlace = Literal['qkv', 'attention_out', 'mlp', 'head']
PositiveInt = Annotated[int, pydantic.Field(gt=0, le=2**31)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0)]
Rate = Annotated[float, pydantic.Field(ge=0, lt=1)]


class SharedExpertConfig(Config):
  """An MLP beside the experts, for every token."""

  mlp_dim: PositiveInt
  """Its hidden width."""
  gated: bool = False
  """Multiply its output by the sigmoid of a projection of the token (Qwen 2)."""


class ExpertsConfig(Config):
  """A mixture of experts: each token goes to a few of many MLPs of the width `mlp_dim`.

  Reference:
    Shazeer et al., arXiv 1701.06538; Jiang et al., "Mixtral of Experts", arXiv 2401.04088.
  """

  num_experts: PositiveInt
  """Experts of a layer (E)."""
  top_k: PositiveInt
  """Experts that a token goes to."""
  scores: Literal['softmax', 'sigmoid'] = 'softmax'
  """Of the router's logits. 'sigmoid' chooses by the score plus a bias of each expert, which moves
  by `optimizer.balance_rate` towards equal loads: DeepSeek-V3, arXiv 2412.19437, section 2.1.2."""
  normalized: bool = True
  """Whether the weights of the chosen experts, their scores, are made to sum to 1."""
  weight_scale: PositiveFloat = 1.0
  """Factor of these weights."""
  shared: SharedExpertConfig | None = None
  """An MLP that every token goes through besides; None: none."""
  capacity_factor: PositiveFloat | None = None
  """Train with at most this many times the mean load for each expert, on each device; tokens beyond
  go without it. None: no token is dropped, and no capacity is wasted."""
  balance_loss: Annotated[float, pydantic.Field(ge=0)] = 0.01
  """Factor of the load-balance loss, 1 at equal loads: Fedus et al., arXiv 2101.03961, equation 4.
  It is a mean over the layers, of a microbatch each."""
  z_loss: Annotated[float, pydantic.Field(ge=0)] = 0.001
  """Factor of the squared log-partition of the router's logits, a mean over tokens and layers: Zoph
  et al., "ST-MoE", arXiv 2202.08906, equation 5."""


# Tensors of a layer: its input; queries, keys and values as attention takes them; what the heads
# return; what attention adds; what widens the MLP, or each expert; what the MLP adds.
RematName = Literal[
  'block_input', 'query_key_value', 'attention', 'attention_out', 'mlp_up', 'mlp_out']


class RematConfig(Config):
  """The tensors of a layer that the backward pass finds again; it recomputes all others."""

  save: tuple[RematName, ...] = ()
  """Kept where they are."""
  offload: tuple[RematName, ...] = ()
  """Kept in the host's memory."""

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'RematConfig':
    if both := [name for name in self.save if name in self.offload]:
      raise ValueError(f'save and offload both name {both[0]!r}; leave it out of one of them')
    return self


class SplashBlocks(Config):
  """How many tokens the splash kernel takes at a time, forward and backward: multiples of 128.

  A length is padded to whole blocks.
  """

  query: PositiveInt = 512
  """Queries of a block."""
  key: PositiveInt = 512
  """Keys and values of a block, which are loaded together."""
  key_compute: PositiveInt | None = None
  """Of these, how many one matrix product takes; None: all."""


class DecoderConfig(Config):
  """A decoder-only transformer: sizes, switches, and how it is run.

  The defaults are Llama's; `jaxllm.models.families` has published ones.
  """

  vocab_size: PositiveInt
  """Tokens in the vocabulary."""
  vocab_multiple: PositiveInt = 128
  """The tables are padded to a multiple of this, so that they divide over a mesh; padded ids are
  never predicted and do not count as parameters."""
  embed_dim: PositiveInt
  """Width of the residual stream (D)."""
  num_layers: PositiveInt
  """Blocks of attention and MLP (L)."""
  num_heads: PositiveInt
  """Query heads (N)."""
  num_kv_heads: PositiveInt | None = None
  """Key and value heads (K), each shared by N / K query heads; None: as many as query heads."""
  head_dim: PositiveInt | None = None
  """Dimensions per head (H); None: embed_dim / num_heads."""
  mlp_dim: PositiveInt
  """Hidden width of the MLP (F), or of each expert."""
  experts: ExpertsConfig | None = None
  """Experts in place of the MLP; None: one MLP."""
  max_length: PositiveInt
  """Longest context in tokens."""

  positions: (
    Annotated[LearnedPositions | RotaryPositions, pydantic.Field(discriminator='kind')] | None
  ) = RotaryPositions()
  """Learned or rotary positions, by `kind`; None: no positions at all."""
  local_positions: RotaryPositions | None = None
  """Rotary positions of local layers; None: those of the other layers."""
  layer_pattern: tuple[LayerKind, ...] = ('global',)
  """Kinds of the layers, repeated over depth: 'global' sees everything before, 'local' the last
  `window` tokens, 'global_nope' everything, without rotation."""
  window: PositiveInt | None = None
  """Tokens that a local layer sees, the current one included."""

  norm: NormConfig = NormConfig()
  """Normalisation used throughout."""
  norm_placement: Literal['pre', 'post', 'sandwich'] = 'pre'
  """Norms on the input of attention and MLP ('pre'), on their output ('post', OLMo 2), or both
  ('sandwich', Gemma 2)."""
  residual: Literal['sequential', 'parallel'] = 'sequential'
  """Whether the MLP reads what attention wrote, or the same input ('parallel', GPT-NeoX)."""
  activation: Literal['gelu', 'gelu_tanh', 'silu', 'relu'] = 'silu'
  """Activation of the MLP; 'gelu' is exact, 'gelu_tanh' the approximation of GPT-2."""
  gated: bool = True
  """Multiply the activation by a second projection (SwiGLU, GeGLU)."""
  biases: tuple[BiasPlace, ...] = ()
  """Which projections have a bias: 'qkv', 'attention_out', 'mlp', 'head'."""
  tied_head: bool = False
  """Whether the token embedding also predicts."""
  query_key_norm: Literal['head', 'width'] | None = None
  """Normalise queries and keys per head (Qwen 3), over all heads (OLMo 2), or not (None)."""
  attention_scale: PositiveFloat | None = None
  """Factor of the attention logits; None: head_dim ** -0.5."""
  attention_softcap: PositiveFloat | None = None
  """Attention logits x become cap * tanh(x / cap); None: off."""
  logit_softcap: PositiveFloat | None = None
  """The same for the final logits."""
  embedding_scale: PositiveFloat | None = None
  """Factor of the token embedding (Gemma: sqrt(embed_dim)); None: 1."""
  dropout_rate: Rate = 0.0
  """Dropout of the embeddings and of what attention and MLP add."""
  attention_dropout_rate: Rate = 0.0
  """Dropout of the attention probabilities."""
  initializer: InitializerConfig = InitializerConfig()
  """How parameters start."""

  dtype: Literal['float32', 'bfloat16'] = 'float32'
  """Dtype of activations and matrix products; parameters, norms, softmax and logits are float32."""
  attention: Literal['xla', 'cudnn', 'splash'] = 'xla'
  """Attention over whole sequences: 'xla' runs everywhere; 'cudnn' is fused, on NVIDIA GPUs ('xla'
  elsewhere); 'splash' is fused, on TPUs (interpreted, slowly, elsewhere)."""
  splash_blocks: SplashBlocks | None = None
  """Block sizes of 'splash'; None: the largest of 512, 256 and 128 that divides the length."""
  decode_attention: Literal['xla', 'paged'] = 'xla'
  """Attention of a decode step to the cache: 'xla' reads as far as the longest row is filled;
  'paged' each row by itself, on TPUs, where the cache is bfloat16 with a multiple of 128 positions
  ('xla' elsewhere)."""
  scan_layers: bool = True
  """Run layers by a scan (compiles fast) or unrolled; parameters and results are the same."""
  remat: Annotated[
    Annotated[Literal['none', 'full', 'offload', 'dots', 'dots_no_batch'], pydantic.Tag('policy')]
    | Annotated[RematConfig, pydantic.Tag('names')],
    pydantic.Discriminator(lambda value: 'policy' if isinstance(value, str) else 'names'),
  ] = 'none'
  """What the backward pass recomputes: nothing, everything but layer inputs, the same with these in
  the host's memory, everything but matrix products, everything but products with weights (and what
  attention returns); or everything but the tensors that are named, as in {"save": ["mlp_up"],
  "offload": ["block_input"]}."""

  @property
  def kv_heads(self) -> int:
    """K."""
    return self.num_kv_heads or self.num_heads

  @property
  def head_size(self) -> int:
    """H."""
    return self.head_dim or self.embed_dim // self.num_heads

  @property
  def padded_vocab_size(self) -> int:
    """V: rows of the embedding table."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  @property
  def query_scale(self) -> float:
    """Factor of the attention logits."""
    return self.attention_scale or self.head_size**-0.5

  @property
  def layer_kinds(self) -> tuple[LayerKind, ...]:
    """The kind of each of the L layers."""
    pattern = itertools.cycle(self.layer_pattern)
    return tuple(itertools.islice(pattern, self.num_layers))

  def flops_per_token(self, context_length: int) -> float:
    """Return the floating-point operations of matrix products per token of a forward pass.

    A multiply-add counts as two; of the experts those count that a token goes to. Attention counts
    what a causal (and windowed) mask leaves visible, averaged over the positions of a full context;
    a training step takes three times as much.

    Args:
      context_length: T, tokens per sequence.
    """
    heads_dim = self.num_heads * self.head_size
    attention_weights = 2 * self.embed_dim * (heads_dim + self.kv_heads * self.head_size)
    mlp_dim, mlp_weights = self.mlp_dim, 0
    if experts := self.experts:
      shared = experts.shared
      mlp_dim = experts.top_k * mlp_dim + (shared.mlp_dim if shared else 0)
      mlp_weights = (experts.num_experts + bool(shared and shared.gated)) * self.embed_dim
    mlp_weights += (3 if self.gated else 2) * self.embed_dim * mlp_dim
    weights = self.num_layers * (attention_weights + mlp_weights)
    weights += self.embed_dim * self.vocab_size
    visible = 0.0
    for kind in self.layer_kinds:
      window = min(self.window_of(kind) or context_length, context_length)
      visible += window - window * (window - 1) / (2 * context_length)
    return 2.0 * weights + 4.0 * heads_dim * visible

  def window_of(self, kind: LayerKind) -> int | None:
    """Return how many tokens a layer of `kind` sees, itself included; None: all before it."""
    return self.window if kind == 'local' else None

  @property
  def windows(self) -> tuple[int | None, ...]:
    """What `window_of` says of the kinds of layers, each once."""
    return tuple(dict.fromkeys(map(self.window_of, self.layer_kinds)))

  def stddev(self, inputs: int, residual: bool = False) -> float:
    """Return the initial deviation of a kernel that sums `inputs` numbers (into the residual)."""
    stddev = self.initializer.stddev or inputs**-0.5
    if residual and self.initializer.scale_residual:
      stddev /= (2 * self.num_layers) ** 0.5
    return stddev

  @pydantic.model_validator(mode='after')
  def _check(self) -> 'DecoderConfig':
    for is_wrong, message in _problems(self):
      if is_wrong:
        raise ValueError(message)
    return self


def _problems(config: DecoderConfig) -> Iterator[tuple[Any, str]]:
  """Yield conditions that no decoder meets, and what to do about each."""
  name, pattern, kinds = config.attention, config.layer_pattern, config.layer_kinds
  yield not pattern, "layer_pattern=(): name at least one kind, such as ('global',)"
  yield config.head_dim is None and config.embed_dim % config.num_heads, (
    f'num_heads={config.num_heads} does not divide embed_dim={config.embed_dim}; '
    'change one of them, or set head_dim')
  yield config.num_heads % config.kv_heads, (
    f'num_kv_heads={config.num_kv_heads} does not divide num_heads={config.num_heads}; '
    'each key/value head serves the same number of query heads')
  if experts := config.experts:
    yield experts.top_k > experts.num_experts, (
      f'experts.top_k={experts.top_k} is larger than experts.num_experts={experts.num_experts}; '
      'lower the first or raise the second')
    yield 'mlp' in config.biases, (
      f"biases={config.biases} with experts: they have no biases; leave 'mlp' out")
  for field in ('positions', 'local_positions'):
    if isinstance(rotary := getattr(config, field), RotaryPositions):
      yield from _rotary_problems(field, rotary, config.head_size)
  yield config.local_positions and 'local' not in kinds, (
    "local_positions is set but layer_pattern has no 'local' layer; set it to None")
  yield config.local_positions and not isinstance(config.positions, RotaryPositions), (
    'local_positions is set but positions are not rotary; set it to None')
  yield ('local' in kinds) != (config.window is not None), (
    f'window={config.window} with layer_pattern={pattern} over {config.num_layers} layers: local '
    'layers need a window, and a window needs local layers')
  yield config.tied_head and 'head' in config.biases, (
    f"biases={config.biases} with tied_head=True: a tied head has no bias; leave 'head' out")
  for field in {'xla': (), 'splash': ('attention_dropout_rate',),
                'cudnn': ('attention_dropout_rate', 'attention_softcap')}[name]:
    yield getattr(config, field), (
      f"attention='{name}' has no {field}={getattr(config, field)}; turn it off or use 'xla'")
  yield config.decode_attention == 'paged' and (config.window or config.head_size % 128), (
    f"decode_attention='paged' with window={config.window} and head_dim={config.head_size}: it has "
    "no windows and needs a multiple of 128; use 'xla'")
  yield name == 'cudnn' and len(config.windows) > 1, (
    f"attention='cudnn' has one mask for all layers, but layer_pattern={pattern} needs several; "
    "use 'xla'")
  if blocks := config.splash_blocks:
    for field in ('query', 'key', 'key_compute'):
      yield (getattr(blocks, field) or 0) % 128, (
        f'splash_blocks.{field}={getattr(blocks, field)}: a multiple of 128 is needed')
    yield blocks.key % (blocks.key_compute or blocks.key), (
      f'splash_blocks.key_compute={blocks.key_compute} does not divide splash_blocks.key='
      f'{blocks.key}; change one of them')
    yield name != 'splash', (
      f"splash_blocks is set, but attention='{name}'; set it to None, or use 'splash'")
  yield name == 'cudnn' and (config.dtype != 'bfloat16' or config.head_size % 8), (
    f"attention='cudnn' with dtype='{config.dtype}' and head_dim={config.head_size}: it needs "
    "'bfloat16' and a multiple of 8; use 'xla'")


def _rotary_problems(
  name: str, rotary: RotaryPositions, head_size: int
) -> Iterator[tuple[Any, str]]:
  dim, scaling = rotary_dim(rotary, head_size), rotary.scaling
  rotated = f'{name}.fraction={rotary.fraction} of head_dim={head_size} rotates {dim}'
  yield dim < 2 or dim % 2, f'{rotated} dimensions; they must be an even number, at least 2'
  for field in ('short_factors', 'long_factors') if isinstance(scaling, LongRopeScaling) else ():
    count = len(getattr(scaling, field))
    yield count != dim // 2, (
      f'{name}.scaling.{field} has {count} numbers; one for each of the {dim // 2} pairs of '
      'rotated dimensions is needed')
