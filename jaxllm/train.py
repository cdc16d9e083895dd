"""Train a model: `python -m jaxllm.train --config=experiments/quickstart.py --workdir=runs/demo`.

The same command goes on where an interrupted run stopped. `--config.a.b=value` changes a field. The
exit code is 0 when the run has finished, 75 when a signal has stopped it and the same command is
wanted again, 124 when `config.training.watchdog_seconds` has ended it; 1 and 2 are errors.

From Python: `jaxllm.train(experiment, 'runs/demo')` does the same, and returns the summary.

With --distributed the same command on every host is one run: processes find each other on Cloud TPU
VMs, in GKE and in SLURM, elsewhere by --coordinator, --num_processes and --process_id.
"""

import sys

from jaxllm import config

FLAGS = config.Flags()
CONFIG = FLAGS.string('config', None, config.FLAG_HELP, required=True)
WORKDIR = FLAGS.string('workdir', None, 'Directory of the run.', required=True)
DRY_RUN = FLAGS.bool('dry_run', False, config.DRY_RUN_HELP)
PROFILE_STEPS = FLAGS.string(
  'profile_steps', None, 'Steps to trace into WORKDIR/profile, as in 10:15; for xprof.')
FLAGS.section('On several hosts')
DISTRIBUTED = FLAGS.bool('distributed', False, 'Connect the processes of a run on several hosts.')
COORDINATOR = FLAGS.string('coordinator', None, 'HOST:PORT of process 0, for --distributed.')
NUM_PROCESSES = FLAGS.integer('num_processes', None, 'How many processes there are.')
PROCESS_ID = FLAGS.integer('process_id', None, 'Which one this is, from 0.')
CONNECT_SECONDS = FLAGS.integer('connect_seconds', 50, 'How long to wait for the other processes.')


def main(_) -> None:  # noqa: D103
  from jaxllm import distributed, storage
  from jaxllm.evaluation import tables
  from jaxllm.training import goodput, loop, metrics

  if DRY_RUN.value:
    from jaxllm.tools import plan

    plan.dry_run(CONFIG.value)
    return
  own = (COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
  wanted = DISTRIBUTED.value or own != (None, None, None)
  with distributed.connected(wanted, *own, CONNECT_SECONDS.value):
    summary = loop.train(
      config.from_flags(CONFIG.value), WORKDIR.value,
      profile_steps=PROFILE_STEPS.value and goodput.parse_steps(PROFILE_STEPS.value))
  if not summary['complete']:
    sys.exit(distributed.SAVED_AND_STOPPED)
  if not distributed.is_first():
    return
  trained = summary.get('trained_parameters')
  print(f'{summary["step"]:,} steps, {summary["parameters"]:,} parameters'
        + (f', {trained:,} of adapters trained' if trained else ''))
  if scores := summary.get('validation'):
    told = {**metrics.HELD_OUT, 'accuracy': 'accuracy'}.items()
    print(', '.join(f'{text} {tables.number(scores[key])}' for key, text in told if key in scores))
  samples = metrics.read_lines(storage.path(WORKDIR.value) / 'samples.jsonl')
  for sample in (one for one in samples if one.get('step') == summary['step']):
    print(f'---\n{sample["prompt"]}{sample["text"]}')
  print(f'report: {storage.path(WORKDIR.value) / "report.html"}')


config.make_callable(__name__, 'jaxllm.training.loop:train')

if __name__ == '__main__':
  config.run_program(main, FLAGS)
