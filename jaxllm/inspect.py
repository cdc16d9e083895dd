"""Look inside a model: attention, logit lens, loss by token, parameters, embedding neighbours.

    seen = inspect.look(model, 'To be, or not to be')
    print(seen.losses(), seen.lens())
    seen.plot_attention(layer=0)

Tables print as text, and show as HTML in a notebook; figures need matplotlib, the extra `plots`.
"""

import dataclasses
import functools
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import mistakes, sharding
from jaxllm.adapters.quantization import dequantize_tree
from jaxllm.evaluation import tables
from jaxllm.model import Model
from jaxllm.models import decoder
from jaxllm.models.attention import INTERMEDIATES
from jaxllm.models.decoder import Decoder, DecoderConfig
from jaxllm.models.log_probs import target_log_probs, top_log_probs
from jaxllm.sharding import MeshConfig

# Figures name the tokens of a text up to this length.
_MAX_LABELS = 48
_VISIBLE = str.maketrans({' ': '\N{OPEN BOX}', '\n': '\N{PILCROW SIGN}'})


class Table(NamedTuple):
  """A table of texts and numbers, the first column of texts.

  Attributes:
    columns: their names.
    rows: one cell for each column.
  """

  columns: Sequence[str]
  rows: Sequence[Sequence[Any]]

  def __str__(self) -> str:
    return tables.aligned([self.columns, *self._texts()], left=(0,))

  def _texts(self) -> list[list[str]]:
    return [[cell if isinstance(cell, str) else f'{cell:,}' if isinstance(cell, int)
             else f'{cell:.3f}' for cell in row] for row in self.rows]

  def _repr_html_(self) -> str:
    return '<table>' + ''.join(
      f'<tr>{"".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)}</tr>'
      for tag, row in [('th', self.columns), *(('td', row) for row in self._texts())]) + '</table>'


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
  """What a model computes on one text of T tokens, in NumPy arrays.

  Attributes:
    ids: token ids.
    logits_TV: float32, of the token that follows each.
    attention_LNTT: what each token attends to, in each layer and head; a row sums to 1.
    residual_LTD: the residual stream after each layer.
  """

  model: Model
  ids: tuple[int, ...]
  logits_TV: np.ndarray  # noqa: N815
  attention_LNTT: np.ndarray  # noqa: N815
  residual_LTD: np.ndarray  # noqa: N815

  @property
  def tokens(self) -> list[str]:
    """The text of each token."""
    return [token_text(self.model, i) for i in self.ids]

  @functools.cached_property
  def losses_T(self) -> np.ndarray:  # noqa: N802
    """The loss of each token in nats; NaN for the first one, which nothing predicts."""
    log_probs = target_log_probs(jnp.array(self.logits_TV[:-1]), jnp.array(self.ids[1:], int))
    return np.concatenate([[np.nan], -np.asarray(log_probs)])

  def losses(self) -> Table:
    """Return the loss of each token."""
    return Table(('token', 'nats'), [*zip(map(repr, self.tokens), self.losses_T, strict=True)])

  def losses_html(self) -> str:
    """Return the text as HTML, each token the darker the more it costs; a guess is 1."""
    share_T = np.nan_to_num(self.losses_T) / math.log(self.model.config.vocab_size)
    spans = [
      f'<span title="{loss:.2f} nats" style="background: rgb(207 79 23 / {min(share, 1):.0%})">'
      f'{html.escape(token)}</span>'
      for token, loss, share in zip(self.tokens, self.losses_T, share_T, strict=True)]
    return f'<p style="white-space: pre-wrap; line-height: 1.9">{"".join(spans)}</p>'

  def lens_logits(self, layer: int) -> np.ndarray:
    """Return the logits_TV that the model would give if a layer were its last.

    Reference:
      nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """
    logits_TV = _read(self.model.decoder, self.model.variables, self.residual_LTD[layer])
    return np.asarray(logits_TV[:, : self.model.config.vocab_size])

  @functools.cached_property
  def _best(self) -> tuple[np.ndarray, np.ndarray]:
    """The most probable next tokens (L, T) after each layer, and their probabilities."""
    best = [top_log_probs(jnp.array(self.lens_logits(layer)), 1)
            for layer in range(len(self.residual_LTD))]
    ids_LT1, log_probs_LT1 = map(np.stack, zip(*best, strict=True))
    return ids_LT1[..., 0], np.exp(log_probs_LT1[..., 0])

  def lens(self) -> Table:
    """Return the most probable next token after each layer, and its probability."""
    ids_LT, probs_LT = self._best
    texts_LT = [[f'{token_text(self.model, i)!r} {prob:.0%}' for i, prob in zip(*row, strict=True)]
                for row in zip(ids_LT, probs_LT, strict=True)]
    return Table(['token', *(f'layer {layer}' for layer in range(len(ids_LT)))],
                 [*zip(map(repr, self.tokens), *texts_LT, strict=True)])

  def plot_lens(self) -> Any:
    """Return a figure of `lens`, the last layer on top, coloured by probability."""
    ids_LT, probs_LT = self._best
    figure, ((axes,),) = _subplots(1, 1, 1 + 0.7 * len(self.ids), 1 + 0.35 * len(ids_LT))
    axes.imshow(probs_LT, origin='lower', aspect='auto', cmap='Blues', vmin=0, vmax=1)
    for place, i in np.ndenumerate(ids_LT):
      axes.text(*place[::-1], token_text(self.model, i).translate(_VISIBLE), ha='center',
                va='center', fontsize=8, parse_math=False,
                color='white' if probs_LT[place] > 0.6 else 'black')
    axes.set(yticks=range(len(ids_LT)), ylabel='layer')
    self._label(axes.xaxis)
    return figure

  def plot_attention(self, layer: int = -1, heads: Sequence[int] | None = None) -> Any:
    """Return a figure of the attention of a layer, a panel for each head.

    Args:
      layer: from 0; negative ones count from the last.
      heads: which; None: all.
    """
    heads = range(self.attention_LNTT.shape[1]) if heads is None else heads
    columns, side = min(len(heads), 4), min(1.5 + 0.12 * len(self.ids), 5)
    rows = -(-len(heads) // columns)
    figure, panels = _subplots(rows, columns, side * columns, side * rows)
    for axes, head in zip(panels.flat, heads, strict=False):
      axes.imshow(self.attention_LNTT[layer, head], cmap='Blues', vmin=0, vmax=1)
      axes.set_title(f'layer {layer % len(self.attention_LNTT)}, head {head}', fontsize=9)
      self._label(axes.xaxis)
      self._label(axes.yaxis)
    for axes in panels.flat[len(heads) :]:
      axes.axis('off')
    return figure

  def _label(self, axis: Any) -> None:
    if len(self.ids) <= _MAX_LABELS:
      axis.set_ticks(range(len(self.ids)), [token.translate(_VISIBLE) for token in self.tokens],
                     fontsize=7, parse_math=False, rotation=90 if axis.axis_name == 'x' else 0)


def look(model: Model, text: str | Sequence[int]) -> Seen:
  """Run a model on a text, or on token ids, and keep what its layers compute.

  Raises:
    ValueError: there is no token, there are more than the context holds, or an id is unknown.
  """
  ids = model.encode_prompt(text) if isinstance(text, str) else text
  # A fused kernel keeps its weights to itself.
  plain = Decoder(model.config.replace(attention='xla'), model.placement)
  logits_BTV, layers = _look(plain, model.variables, model.batch(ids))
  weights_LBTNT, residual_LBTD = layers['attention']['weights'][0], layers['residual'][0]
  return Seen(
    model, tuple(map(int, ids)), np.asarray(logits_BTV[0, :, : model.config.vocab_size]),
    np.asarray(weights_LBTNT[:, 0].swapaxes(1, 2), np.float32), np.asarray(residual_LBTD[:, 0]))


@functools.partial(jax.jit, static_argnums=0)
def _look(module: Decoder, variables: Any, tokens_BT: jax.Array) -> tuple[Any, Any]:
  logits_BTV, state = module.apply(variables, tokens_BT, mutable=[INTERMEDIATES])
  return logits_BTV, state[INTERMEDIATES]['layers'][0]


@functools.partial(jax.jit, static_argnums=0)
def _read(module: Decoder, variables: Any, residual_TD: jax.Array) -> Any:
  return module.apply(
    variables, residual_TD, method=lambda module, x: module.logits(module.final_norm(x)))


def parameters(
  model: Model | DecoderConfig, mesh: MeshConfig | Mapping[str, Any] | None = None
) -> Table:
  """Return name, shape, logical axes and number of each parameter; the last row adds up.

  The padding of the vocabulary is in the shapes, not in the numbers.

  Args:
    model: a model or its config.
    mesh: how devices, which need not be there, are to split them, as in {'fsdp': 4, 'tensor': 2};
      -1 counts as 1. Then also the mesh axes of each, and the numbers that lie on each device.

  Raises:
    ValueError: there is no such mesh axis, or it does not divide a parameter.
  """
  config = model if isinstance(model, DecoderConfig) else model.config
  split = mesh if isinstance(mesh, MeshConfig) else MeshConfig(**{'data': 1, **(mesh or {})})
  devices = math.prod(max(getattr(split, axis), 1) for axis in sharding.MESH_AXES)
  shapes, axes = decoder.abstract(config)
  counts = decoder.parameter_counts(config)
  abstract: Any = sharding.abstract_mesh(split, devices)
  places = sharding.shardings(axes, shapes, abstract, split)
  rows: list[tuple[Any, ...]] = []
  for (path, leaf), names, count, place in zip(
      jax.tree_util.tree_leaves_with_path(shapes),
      jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple)),
      jax.tree.leaves(counts), jax.tree.leaves(places), strict=True):
    used = [axis for axis in jax.tree.leaves(tuple(place.spec)) if getattr(split, axis) > 1]
    rows.append((
      '/'.join(entry.key for entry in path[1:]), ' x '.join(map(str, leaf.shape)), ', '.join(names),
      count, ', '.join(used) or 'copied', math.prod(place.shard_shape(leaf.shape))))
  rows.append(('total', '', '', sum(row[3] for row in rows), '', sum(row[5] for row in rows)))
  columns = ('parameter', 'shape', 'axes', 'number', 'split over', 'on a device')
  shown = len(columns) if mesh else 4
  return Table(columns[:shown], [row[:shown] for row in rows])


def neighbours(model: Model, token: str | int, count: int = 10) -> Table:
  """Return the tokens whose embeddings have the largest cosines with that of a token.

  Args:
    token: the text of one token, or its id.
    count: how many neighbours.

  Raises:
    ValueError: the text is not one token, or the id is unknown.
  """
  ids = model.tokenizer.encode(token) if isinstance(token, str) else [token]
  if len(ids) != 1:
    raise ValueError(f'token={token!r} is {len(ids)} tokens: '
                     f'{[token_text(model, i) for i in ids]}; name one of them, or an id')
  model.batch(ids)  # Checks the id.
  embed = dequantize_tree(model.variables['params']['embed'])
  table_VD = np.asarray(embed['embedding'], np.float32)[: model.config.vocab_size]
  table_VD = table_VD / np.maximum(np.linalg.norm(table_VD, axis=1, keepdims=True), 1e-30)
  cosines_V = table_VD @ table_VD[ids[0]]
  nearest = [i for i in np.argsort(-cosines_V, kind='stable').tolist() if i != ids[0]]
  return Table(('token', 'id', 'cosine'), [
    (repr(token_text(model, i)), i, cosines_V[i]) for i in nearest[:count]])


def token_text(model: Model, token_id: int) -> str:
  """Return the text of one token, of a special one its name, U+FFFD for a part of a character."""
  tokenizer = model.tokenizer
  name = next((text for text, i in tokenizer.special_tokens.items() if i == token_id), None)
  known = tokenizer.id_bytes[token_id] if token_id < tokenizer.vocab_size else b''
  return known.decode('utf-8', 'replace') if name is None else name


def _subplots(rows: int, columns: int, width: float, height: float) -> Any:
  """Return a figure, which a notebook shows once, and its panels."""
  pyplot = mistakes.package('matplotlib.pyplot')
  figure, panels = pyplot.subplots(
    rows, columns, figsize=(width, height), squeeze=False, layout='constrained')
  pyplot.close(figure)
  return figure, panels
