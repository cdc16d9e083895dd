"""The training loop: text in; checkpoints, metrics, samples, a report out; the same call resumes.

- `train` is a whole run: set up (`start`), loop, finish.
- `_loop` takes the steps, and reads their metrics one step late so that devices never wait.
- `_finish` proves the run from its checkpoint: held-out scores, samples, report.
"""

import importlib
import json
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from jaxllm import distributed, sharding, storage
from jaxllm.checkpoints import reading
from jaxllm.checkpoints import store as store_lib
from jaxllm.checkpoints.bundle import Bundle
from jaxllm.data import parallel
from jaxllm.data.batches import Batches, records_before
from jaxllm.experiment import Experiment
from jaxllm.models import decoder
from jaxllm.optim import privacy
from jaxllm.training import cost, passed_over, pretrained, report, scoring, start, workdir
from jaxllm.training import dataset as dataset_lib
from jaxllm.training import goodput as goodput_lib
from jaxllm.training import metrics as metrics_lib
from jaxllm.training import state as state_lib
from jaxllm.training import step as step_lib
from jaxllm.training.faults import Faults
from jaxllm.training.metrics import MetricLogger
from jaxllm.training.scoring import Measurement, Selection
from jaxllm.training.start import Run, placed
from jaxllm.training.state import TrainState
from jaxllm.training.stopping import stop_requests


class TrainingStopped(RuntimeError):
  """Training cannot go on; the message gives the reason and the fix."""

  exit_code = 1


class _TooManySkipped(Exception):
  """Too many steps in a row were not applied; its arguments are the reason, the first, the last."""


def train(
  experiment: Experiment, path: str | os.PathLike[str], devices: list[jax.Device] | None = None,
  profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any]:
  """Train a model, or go on where an interrupted run stopped.

  Args:
    path: its working directory. Afterwards it holds `config.json`, `tokenizer/`, `data.json`,
      `environment.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `samples.jsonl`,
      `summary.json` and `report.html`.
    devices: the devices to use; all by default.
    profile_steps: the first and the last of the steps that are traced into `profile/`, for xprof.

  Returns:
    The content of `summary.json`: `step`, `num_steps`, `complete`, and when complete the validation
    scores, the parameter count, tokens, seconds and the goodput.

  Raises:
    ValueError: the config does not fit the data, the devices, or the run that is already there.
    TrainingStopped: too many steps in a row were not finite or spiked, again and again.
    checkpoints.store.CheckpointError: a checkpoint could not be written or read.
  """
  goodput = goodput_lib.Goodput(experiment.training.watchdog_seconds)
  needed = {*experiment.training.writers, *(['dp_accounting'] if experiment.privacy else [])}
  for name in needed - {'tensorboard'}:
    importlib.import_module(name)  # Where it is missing, nothing is computed.
  distributed.agree(workdir.same_everywhere(experiment, path))
  mesh = sharding.make_mesh(experiment.mesh, devices)
  dataset_lib.check_batch(experiment, mesh)
  begun = workdir.begun_as(storage.path(path, '--workdir='))
  if experiment.reads_models:
    experiment = pretrained.resolve(experiment, begun)
  directory = workdir.open_workdir(experiment, path)
  # The records hold log-probabilities of a reference model, computed in resumed runs too.
  if experiment.reads_models and (
      not workdir.has_begun(directory) or experiment.objective_record.reference):
    pretrained.check_start(experiment)
  begun_with = workdir.begun_with(directory)
  # Until here the directory is read, by all; from here on it is written to.
  distributed.barrier('the workdir is read')
  with workdir.held(directory):
    run = Run(
      experiment=experiment,
      path=directory,
      mesh=mesh,
      tx=state_lib.make_optimizer(experiment),
      dataset=dataset_lib.open_dataset(experiment, begun_with, mesh),
      begun=begun,
      store=store_lib.open_store(directory / store_lib.DIRECTORY, experiment.checkpoint),
      goodput=goodput,
      profile_steps=profile_steps,
    )
    goodput.resume(metrics_lib.read(directory / 'metrics.jsonl'),
                   store_lib.latest_step(run.store) or 0)
    try:
      return _to_the_end(run)
    finally:
      store_lib.close(run.store)
      goodput.close()


def _to_the_end(run: Run) -> dict[str, Any]:
  """Run, going back where steps or a checkpoint turn out to be bad; return what `train` does."""
  while True:
    try:
      return _run(run)
    except _TooManySkipped as error:
      _go_back(run, error)
    except store_lib.DamagedError as error:
      store_lib.quarantine(run.store, error)
    except jax.errors.JaxRuntimeError as error:
      said = str(error).partition('\n')[0]
      if 'out of memory' not in said.lower():
        raise
      raise TrainingStopped(
        f'the devices ran out of memory ({said}); raise config.training.microbatches, or set '
        'config.objective.chunk_size or config.model.remat. The plan of the run:\n'
        + cost.page(_estimate(run))) from error


def _run(run: Run) -> dict[str, Any]:
  num_steps = run.experiment.training.num_steps
  latest = store_lib.latest_step(run.store) or 0
  if latest > num_steps:
    raise ValueError(f'the run in --workdir={run.path} has taken {latest} steps, more than '
                     f'config.training.num_steps={num_steps}; raise it, or change --workdir')
  if run.profile_steps and run.profile_steps[1] > num_steps:
    raise ValueError(f'--profile_steps={":".join(map(str, run.profile_steps))}: the run ends with '
                     f'step {num_steps}, config.training.num_steps; name steps up to that')
  selected = scoring.restore_selection(run.experiment, run.path, latest)
  distributed.agree({
    'the fingerprint of the records': run.dataset.manifest.fingerprint,
    'the step to go on from': latest, 'what was measured': selected.history,
    'the best step': store_lib.best_step(run.store.directory),
    'what is passed over': passed_over.read(run.path),
    'whether there is a summary': (run.path / 'summary.json').exists()})
  if latest >= num_steps or selected.exhausted:
    summary = storage.read_json(run.path / 'summary.json', needed=True)
    if summary.get('step') == latest:
      logging.info('The run in %s is complete: %d steps.', run.path, latest)
      return summary
    frozen, _ = start.load_frozen(run, latest)
    start.accept(run, latest, selected)
    return _finish(run, latest, frozen)
  batches = passed_over.batches(run.path, latest, run.experiment, run.dataset)
  for line in run.dataset.mixture(batches.phases, num_steps, batches.passed):
    logging.info(line)
  measurements = scoring.make_measurements(run.experiment, run.dataset, run.mesh)
  run.goodput.expect_start()
  state, bundle = start.initial_state(run, latest)
  start.accept(run, latest, selected)
  step, frozen, selected = _loop(run, state, bundle, selected, measurements, batches)
  if step < num_steps and not selected.exhausted:
    logging.info('Stopped at step %d of %d and saved; the same command goes on.', step, num_steps)
    return {'step': step, 'num_steps': num_steps, 'complete': False}
  return _finish(run, step, frozen)


def _loop(
  run: Run, state: TrainState, bundle: Bundle, selected: Selection,
  measurements: Sequence[Measurement], batches: Batches,
) -> tuple[int, Any, Selection]:
  """Take steps to the end or a signal; return (last saved step, frozen parameters, selection)."""
  experiment = run.experiment
  first, last = int(state.step), experiment.training.num_steps
  train_step = step_lib.make_train_step(experiment, run.tx, run.mesh)
  batch_sharding = sharding.batch_sharding(run.mesh, experiment.mesh)
  _announce(run, last)
  faults = Faults(experiment, run.path)
  saved = step = first
  waiting, saved_at = None, time.monotonic()
  with stop_requests(first, last) as stopping, metrics_lib.open_logger(
    run.path, experiment, run.mesh, first, run.goodput
  ) as log, goodput_lib.tracing(run.path, run.profile_steps) as trace:

    def save() -> None:
      nonlocal saved, saved_at
      log.log_scores(step, _promise(run, step))
      with log.pause('checkpoints'):
        log.upload()  # First, so that no step of a checkpoint is without its metrics.
        faults.before_save(step)
        store_lib.save(run.store, step, state.replace(frozen={}),
                       placed(bundle, batches.phases, step))
        saved, saved_at = step, time.monotonic()

    for host_batch in log.wait_for(
        parallel.map_ahead(batches.batch_at, range(first, last),
                           given_up=stopping.is_asked_alone)):
      trace(step + 1, waiting)
      host_batch = faults.before_step(step + 1, host_batch)
      with jax.profiler.StepTraceAnnotation('train', step_num=step + 1):
        state, metrics = train_step(state, sharding.put_batch(host_batch, batch_sharding))
      log.pending = metrics['loss']
      # The metrics of the step before: those of this one are still being computed.
      _record(run, log, step, waiting)
      step, waiting = step + 1, metrics
      store_lib.check(run.store)
      measuring = [one for one in measurements if _due(step, one.every_steps, last)]
      saving = _due(step, experiment.checkpoint.every_steps, last) or _is_late(
        experiment, step, saved_at)
      sampling = step < last and step % (experiment.evaluation.sample_every_steps or last) == 0
      stop = stopping.due(step)
      if measuring or saving or sampling or stop:
        skipping, waiting = not _record(run, log, step, waiting), None
        if skipping and step < last:  # Whether the state is good shows when a step is applied.
          measuring, saving, sampling = [], False, False
        if skipping and stop:
          break
      if measuring:
        selected = _measure(
          run, log, measuring, state, placed(bundle, batches.phases, step), selected, step)
        stop = stop or selected.exhausted
      if sampling:
        with log.pause('samples'):
          _sample(run, _evaluated(experiment, state), step)
      if saving or stop:
        save()
      if stop:
        break
    else:  # The steps are done, or the run was stopped while it waited for a batch.
      if step > saved and _record(run, log, step, waiting):
        save()
    with log.pause('checkpoints'):
      store_lib.wait(run.store)
    log.log_goodput(step)
  return saved, state.frozen, selected


def _announce(run: Run, last: int) -> None:
  """Say what a step needs, before it is compiled, and what the run promises."""
  estimated = _estimate(run)
  logging.info('Training %s parameters on %d x %s; estimated: %s; the first step compiles.',
               f'{estimated["parameters"]:,}', run.mesh.size, estimated['device'],
               cost.line(estimated))
  for problem in estimated['problems']:
    logging.warning('It may not fit: %s', problem)
  for name, value in _promise(run, last).items():
    logging.info('After %d steps %s will be %.4g.', last, name, value)


def _estimate(run: Run) -> cost.Plan:
  return cost.estimate(run.experiment, run.mesh, cost.local_chip(run.mesh))


def _measure(
  run: Run, log: MetricLogger, measuring: Sequence[Measurement], state: TrainState,
  bundle: Bundle, selected: Selection, step: int,
) -> Selection:
  """Take and log the measurements that are due; save the state if it is the best so far."""
  with log.pause('evaluation'):
    scores = scoring.take(measuring, _evaluated(run.experiment, state))
  log.log_scores(step, scores)
  selected = selected.add(step, scores)
  if selected.best and selected.best[0] == step:
    log.log_goodput(step)
    with log.pause('checkpoints'):
      log.upload()
      store_lib.save_best(run.store, step, state.replace(frozen={}), bundle, selected.facts)
  return selected


def _evaluated(experiment: Experiment, state: TrainState) -> Any:
  return state_lib.variables(experiment, state_lib.evaluation_params(state), state.frozen)


def _sample(run: Run, variables: Any, step: int) -> None:
  """Continue the prompts, and add that to those of earlier steps in samples.jsonl."""
  path = run.path / 'samples.jsonl'
  samples = scoring.continue_prompts(
    run.experiment, run.dataset.tokenizer, variables, run.mesh, step)
  if samples and jax.process_index() == 0:
    earlier = [one for one in metrics_lib.read_lines(path) if one.get('step') in range(step)]
    with metrics_lib.spared(str(path), set()):
      storage.write_file(path, ''.join(
        json.dumps(one, ensure_ascii=False) + '\n' for one in [*earlier, *samples]))


def _promise(run: Run, step: int) -> dict[str, float]:
  """Return what differential privacy promises after `step` steps; nothing without it."""
  experiment = run.experiment
  return {} if experiment.privacy is None else {
    f'privacy/{name}': value for name, value in privacy.epsilon(
      experiment.privacy, step, experiment.training.batch_size,
      run.dataset.manifest.train.records).items()}


def _is_late(experiment: Experiment, step: int, since: float) -> bool:
  """Return whether `checkpoint.every_seconds` have passed, by the clock of process 0."""
  seconds = experiment.checkpoint.every_seconds
  # To compare clocks takes the devices' time, so that several processes do it now and then.
  if seconds is None or (
      jax.process_count() > 1 and step % experiment.training.log_every_steps):
    return False
  return bool(multihost_utils.broadcast_one_to_all(time.monotonic() - since >= seconds))


def _due(step: int, every: int, last: int) -> bool:
  return step % every == 0 or step == last


def _record(
  run: Run, log: MetricLogger, step: int, metrics: dict[str, jax.Array] | None
) -> bool:
  """Log the metrics of a step; return whether it was applied, or none is given."""
  if metrics is None:
    return True
  scalars = log.fetch(metrics)
  log.log_step(step, scalars)
  if scalars['applied']:
    store_lib.confirm(run.store, step)
    return True
  training, skipped = run.experiment.training, round(scalars['skipped_in_a_row'])
  ruined = step == training.num_steps and not math.isfinite(scalars['loss'])
  if skipped > training.max_skipped_steps or ruined:
    first = step - skipped + 1
    raise _TooManySkipped(
      f'steps {first} to {step} were not applied: their loss, gradient or update was not finite, '
      f'or the loss spiked (last loss {scalars["loss"]:.4g}, gradient norm '
      f'{scalars["grad_norm"]:.4g})', first, step)
  return False


def _go_back(run: Run, error: _TooManySkipped) -> None:
  """Go back to the last good checkpoint, to pass over the batches that led to skipped steps.

  The step before the first of them is suspected too: its update was applied before it showed.
  """
  (reason, first, last), training = error.args, run.experiment.training
  passed, target = passed_over.read(run.path), store_lib.go_back(run.store)
  if len(passed) >= training.max_rollbacks:
    raise TrainingStopped(
      f'{reason}. The run has gone back {len(passed)} times (config.training.max_rollbacks='
      f'{training.max_rollbacks}); its last good checkpoint is step {target or "none"}. Lower '
      'config.optimizer.learning_rate, lengthen config.schedule.warmup_steps, or look at the data '
      'of these steps')
  run.goodput.lose([record for record in metrics_lib.read(run.path / 'metrics.jsonl')
                    if record['step'] <= target])
  batches = passed_over.batches(run.path, target, run.experiment, run.dataset, alone=True)
  passed_over.add(run.path, batches, run.dataset.tokenizer,
                  range(max(first - 2, target), last), target, reason)


def _finish(run: Run, step: int, frozen: Any) -> dict[str, Any]:
  """Prove the run from its checkpoint alone: scores on all held-out text, samples, the report."""
  logging.info('Measuring step %d on all held-out text, and sampling from it.', step)
  experiment = run.experiment
  phases = passed_over.phases(run.path, step, experiment, run.dataset)
  summary: dict[str, Any] = {
    'step': step,
    'num_steps': experiment.training.num_steps,
    'complete': True,
    'parameters': decoder.parameter_count(experiment.decoder),
    'train_tokens': round(sum(
      count * tokens / records for count, records, tokens in run.dataset.read_before(
        phases, records_before(phases, step)))),
    'seconds': run.goodput.elapsed,
  }
  if experiment.finetune.lora is not None:
    summary['trained_parameters'] = state_lib.trained_count(experiment)
  best = store_lib.best_step(run.store.directory)
  if best is not None:
    summary['best_step'] = best
  with run.goodput.spend('evaluation'):
    params, _ = reading.restore_params(
      run.store.directory / str(step if best is None else best),
      state_lib.evaluation_params(state_lib.abstract_state(experiment, run.tx, run.mesh)))
    variables = state_lib.variables(experiment, params, frozen)
    if run.dataset.manifest.validation is not None:
      measure = scoring.make_held_out(experiment, run.dataset, run.mesh, max_batches=None)
      summary['validation'] = measure(variables)
  with run.goodput.spend('samples'):
    _sample(run, variables, step)
  summary |= _promise(run, step)
  summary['goodput'] = run.goodput.scalars()
  if jax.process_index() == 0:
    storage.write_json(run.path / 'summary.json', summary)
    report.write_report(run.path)
  distributed.barrier('the summary is written')
  return summary | storage.read_json(run.path / 'summary.json')  # Times are those of process 0.
