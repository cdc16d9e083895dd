"""The train step: one pure function, jitted once, over any mesh.

Loss sums and token counts are added over microbatches and devices and divided once, so that
accumulation, packing and sharding never change the loss. A step whose loss, gradient, parameters or
optimizer state are not finite, or whose loss spikes, changes nothing but its counters.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxllm import sharding
from jaxllm.experiment import Experiment, SpikeConfig
from jaxllm.models.decoder import Decoder
from jaxllm.objectives.next_token import Batch, Sums, average, scan_sum
from jaxllm.optim import optimizers, privacy
from jaxllm.training import examples
from jaxllm.training import state as train_state
from jaxllm.training.state import TrainState

SUMS = ('loss_sum', 'weight_sum', 'cross_entropy_sum', 'correct_sum')
"""Sums of every loss; the averages of others are metrics by their own names."""
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
Loss = Callable[[Any, Any, Batch, jax.Array | None], Sums]


def make_train_step(experiment: Experiment, tx: optax.GradientTransformation, mesh: Mesh) -> Step:
  """Return the jitted step `(state, batch) -> (state, metrics)`; it donates the state.

  Args:
    tx: from `state.make_optimizer`.
    mesh: from `sharding.make_mesh`.

  Returns:
    A function of the state and a batch of (B, T) arrays (`tokens`, `targets`, `weights`,
    `segment_ids`, `positions`; see `examples` for those of other objectives). The metrics are
    float32 scalars: `loss` (nats per token), `objective` (the minimised loss), `accuracy`, `tokens`
    (with weight; examples, where a whole answer is judged), `tokens_read` (prompts included),
    `grad_norm`, `param_norm`, `learning_rate`, `applied` (1 or 0), `skipped`, `skipped_in_a_row`,
    and the averages of the objective's other sums.
  """
  abstract = train_state.abstract_state(experiment, tx, mesh)
  state_sharding = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  pure_step = make_pure_step(experiment, tx)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    with sharding.active(sharding.Placement(mesh, experiment.mesh)):
      return pure_step(state, batch)

  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(state_sharding, None),  # A batch lies where `sharding.put_batch` has put it.
    out_shardings=(state_sharding, sharding.replicated(mesh)),
  )


def abstract_batch(experiment: Experiment, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shapes, dtypes and shardings of a training batch without allocating."""
  encoding = examples.of(experiment)
  empty = encoding.decode(np.zeros(0, encoding.dtype(experiment)))
  where = sharding.batch_shardings(empty, sharding.batch_sharding(mesh, experiment.mesh))
  return {
    name: jax.ShapeDtypeStruct(
      (experiment.training.batch_size, array.shape[1]), array.dtype, sharding=where[name])
    for name, array in empty.items()}


def make_pure_step(experiment: Experiment, tx: optax.GradientTransformation) -> Step:
  """Return the same step as a pure function without jit, mesh or donation."""
  schedule = train_state.make_schedule(experiment)

  @jax.named_scope('optimizer')
  def update(grads: Any, state: TrainState) -> tuple[Any, Any]:
    params = _float32(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    if experiment.training.param_dtype == 'bfloat16':
      leaves, structure = jax.tree.flatten(params)
      # No step has this number: the key is that of nothing else.
      key = jax.random.fold_in(jax.random.key(experiment.seed), 2**32 - 1)
      keys = jax.random.split(jax.random.fold_in(key, state.step), len(leaves))
      params = jax.tree.unflatten(structure, map(optimizers.stochastic_round, leaves, keys))
    return params, opt_state

  def pure_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(experiment.seed), state.step)
    grads, sums = accumulate_gradients(experiment, state, batch, key)
    count = sums['weight_sum']
    parts = count if experiment.privacy is None else jnp.float32(experiment.training.batch_size)
    grads = jax.tree.map(lambda grad: average(grad, parts), grads)
    loss = average(sums['cross_entropy_sum'], count)
    grad_norm = optax.global_norm(grads)
    held = state
    state = train_state.moments_in(experiment, jax.memory.Space.Device, held)
    params, opt_state = update(grads, state)
    applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    applied &= ~_is_spike(experiment.training.spike, state, loss)
    # What would be kept, too: a step from a finite gradient can be too large.
    applied &= jnp.isfinite(optax.global_norm(_float32(params)))
    for leaf in jax.tree.leaves(opt_state):
      applied &= jnp.isfinite(leaf).all()
    if sharding.platform() == 'tpu' and experiment.optimizer.name != 'muon':
      # Made again now that the old state may be overwritten, so that no second one is held beside
      # it; muon's matrix products would cost more than that saves.
      held, applied = jax.lax.optimization_barrier((held, applied))
      state = train_state.moments_in(experiment, jax.memory.Space.Device, held)
      params, opt_state = update(grads, state)
    new_state = _next_state(experiment, state, params, opt_state, loss, applied)
    return train_state.moments_in(experiment, jax.memory.Space.Host, new_state), {
      'loss': loss,
      'objective': average(sums['loss_sum'], count),
      'accuracy': average(sums['correct_sum'], count),
      'tokens': sums['weight_sum'],
      'tokens_read': sum(
        jnp.sum(array > 0, dtype=jnp.float32) for name, array in batch.items()
        if name.endswith('segment_ids')),
      'grad_norm': grad_norm,
      'param_norm': optax.global_norm(_float32(new_state.params)),
      # The optimizer counts the steps that it applied.
      'learning_rate': jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
      'applied': applied.astype(jnp.float32),
      'skipped': new_state.skipped.astype(jnp.float32),
      'skipped_in_a_row': new_state.skipped_in_a_row.astype(jnp.float32),
    } | {name.removesuffix('_sum'): average(value, count) for name, value in sums.items()
         if name not in SUMS}

  return pure_step


def accumulate_gradients(
  experiment: Experiment, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[Any, dict[str, jax.Array]]:
  """Return the gradient of the summed loss and the sums of `make_sums` over the microbatches; with
  `privacy` the noisy sum of the gradients of rows.
  """
  microbatches = experiment.training.microbatches
  sums_of = make_sums(experiment)

  def loss_fn(params: Any, part: Batch, dropout_key: jax.Array) -> tuple[jax.Array, Any]:
    with jax.named_scope('loss'):  # Its gradient is transpose(jvp(loss)) in a trace.
      variables = train_state.variables(experiment, params, state.frozen, dropout_key)
      sums = sums_of(variables, state.frozen, part, dropout_key)
    return sums['loss_sum'], sums

  def grad_fn(*args: Any) -> tuple[Any, Any]:
    grads, sums = jax.grad(loss_fn, has_aux=True)(*args)
    return _float32(grads), sums

  private = experiment.privacy
  if private is not None:
    grad_fn = privacy.clipped_sum(grad_fn, private)

  def gradients(part: Batch, index: jax.Array) -> Any:
    return grad_fn(state.params, part, jax.random.fold_in(key, index))

  if microbatches == 1:
    grads, sums = grad_fn(state.params, batch, key)
  else:
    # Part i takes rows i, i + M, ...: every device keeps its own rows in every part.
    length = max(x.shape[1] for x in batch.values())
    parts = {name: _split_rows(x, microbatches, x.shape[1] == length) for name, x in batch.items()}
    grads, sums = scan_sum(gradients, parts, jnp.arange(microbatches))
  if private is not None:
    grads = privacy.add_noise(grads, private, jax.random.fold_in(key, microbatches))
  return grads, sums


def make_sums(experiment: Experiment) -> Loss:
  """Return the loss that the run minimises.

  Returns:
    A function of the model's variables, the frozen parameters, a batch, and the key of dropout
    (None: none). It gives float32 scalars: `loss_sum`, `weight_sum` (tokens or examples),
    `cross_entropy_sum` (the loss itself where it is none), `correct_sum` and the objective's own.
  """
  config, of = experiment.objective, experiment.objective_record

  def sums(variables: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> Sums:
    others = {}
    if of.reference and 'lora' in variables:  # Without its adapters the model is the reference.
      others['reference'] = {'params': variables['params']}
    if of.teacher:
      others['teacher'] = {'params': frozen[train_state.TEACHER]}
    loss_sum, weight_sum, more = of.loss(
      config, Decoder(experiment.decoder), variables, batch, key, **others)
    return {**more, 'loss_sum': loss_sum, 'weight_sum': weight_sum}

  return sums


def _float32(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def _split_rows(x_BT: jax.Array, parts: int, per_token: bool) -> jax.Array:
  rows, length = x_BT.shape
  x = x_BT.reshape(rows // parts, parts, length).swapaxes(0, 1)
  return sharding.constrain(x, None, 'batch', 'length' if per_token else None)


def _is_spike(config: SpikeConfig | None, state: TrainState, loss: jax.Array) -> jax.Array:
  if config is None:
    return jnp.zeros((), bool)
  limit = state.loss_mean + config.deviations * jnp.sqrt(state.loss_variance)
  return (state.step - state.skipped >= config.window_steps) & (loss > limit)


def _next_state(
  experiment: Experiment, state: TrainState, params: Any, opt_state: Any, loss: jax.Array,
  applied: jax.Array,
) -> TrainState:
  training = experiment.training
  window = training.spike.window_steps if training.spike else 100
  # Early on the plain mean of all losses, later an exponential one over `window` steps.
  weight = 1.0 / jnp.minimum(state.step - state.skipped + 1, window).astype(jnp.float32)
  deviation = loss - state.loss_mean
  ema, decay = None, training.ema_decay
  if decay is not None:
    ema = jax.tree.map(
      lambda old, new: decay * old + (1 - decay) * new, state.ema, _float32(params))
  changed = state.replace(
    params=params,
    opt_state=opt_state,
    ema=ema,
    loss_mean=state.loss_mean + weight * deviation,
    loss_variance=(1 - weight) * (state.loss_variance + weight * deviation**2),
  )
  kept = jax.tree.map(
    lambda new, old: jnp.where(applied, new, old),
    changed.replace(frozen={}), state.replace(frozen={})).replace(frozen=state.frozen)
  skipped = 1 - applied.astype(jnp.int32)
  return kept.replace(
    step=state.step + 1,
    skipped=state.skipped + skipped,
    skipped_in_a_row=(state.skipped_in_a_row + 1) * skipped,
  )
