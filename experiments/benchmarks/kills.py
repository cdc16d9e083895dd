"""Kill and stop runs at random moments, go on, and compare them with one that was left alone.

  python experiments/benchmarks/kills.py [--count=20] [--signals=10] [--processes=1,2]

For each number of processes a run is killed `count` times (all processes by SIGKILL, at a random
moment after its first new step, half of them while a checkpoint is being written), started again
each time, and at last left to finish. No committed step may be lost, and losses and the final state
must be those of a run that was never killed, bit for bit. Then `signals` times SIGTERM goes to one
process: all must save the last step and end with the exit code 75. Processes are forked from one
that has imported everything. Two cores take 6 to 10 seconds for a start.
"""

import concurrent.futures
import hashlib
import json
import logging
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import statistics
import tempfile
import time

import starts
from absl import app, flags

COUNT = flags.DEFINE_integer('count', 20, 'Kills with each number of processes.')
flags.FLAGS.set_default('processes', ['1', '2'])
flags.FLAGS.set_default('signals', 10)
flags.FLAGS.set_default('output', 'runs/kills.json')
SAVE_EVERY = 4


def main(_) -> None:
  starts.import_all()
  rows, pick = {}, random.Random(starts.SEED.value)
  print(f'{"processes":>9} {"kills":>6} {"in a save":>9} {"steps lost":>10} {"losses":>7} '
        f'{"state":>6} {"SIGTERMs":>8} {"saved, 75":>9} {"s p50":>6} {"s p99":>6} {"ms/save":>8}')
  for number in map(int, starts.PROCESSES.value):
    with tempfile.TemporaryDirectory() as base:
      row = measure(pathlib.Path(base), number, pick)
    rows[number] = row
    seconds = sorted(row['seconds']) or [0.0]
    late = seconds[round(0.99 * (len(seconds) - 1))]
    print(f'{number:>9} {row["kills"]:>6} {row["mid_save"]:>9} {row["lost"]:>10} '
          f'{"equal" if row["losses_equal"] else "DIFFER":>7} '
          f'{"equal" if row["state_equal"] else "DIFFER":>6} {len(row["seconds"]):>8} '
          f'{row["saved"]:>9} {statistics.median(seconds):>6.2f} {late:>6.2f} '
          f'{row["blocked_ms"]:>8.1f}', flush=True)
    for line in row['failures']:
      print(f'  {line}')
  path = pathlib.Path(starts.OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(rows, indent=2) + '\n')
  print(f'wrote {path}')


def measure(base: pathlib.Path, number: int, pick: random.Random) -> dict:
  """Return what killing and stopping runs of `number` processes has shown."""
  num_steps = 8 * COUNT.value + 20
  config = write_config(base, number, num_steps)
  whole, failures = base / 'whole', []
  if any(codes := starts.wait(begin(base, config, whole, number))):
    raise SystemExit(f'the run that is left alone ended with {codes}: {starts.said(base, codes)}')
  seen, run = {'kills': 0, 'mid_save': 0, 'lost': 0}, base / 'run'
  while seen['kills'] < COUNT.value:
    before = newest(run)
    children = begin(base, config, run, number)
    if not reach(run, before + 1 + pick.randrange(6), children):
      failures.append(f'ended by itself after step {before}: '
                      f'{starts.said(base, starts.wait(children))}')
      break
    if pick.random() < 0.5:  # In the middle of a save.
      deadline = time.monotonic() + 5
      while not unfinished(run) and time.monotonic() < deadline:
        time.sleep(0.0005)
      time.sleep(pick.uniform(0, 0.01))
    else:
      time.sleep(pick.uniform(0, 0.1))
    for child in children:
      os.kill(child, signal.SIGKILL)
    starts.wait(children)
    seen['kills'] += 1
    seen['mid_save'] += bool(unfinished(run))
    seen['lost'] += newest(run) < before
  if any(codes := starts.wait(begin(base, config, run, number))):
    failures.append(f'ended with {codes}: {starts.said(base, codes)}')
  saved, seconds = 0, []
  for _ in range(starts.SIGNALS.value):
    shutil.rmtree(base / 'told', ignore_errors=True)
    endless = write_config(base, number, 10**6)
    children = begin(base, endless, base / 'told', number)
    reach(base / 'told', 1 + pick.randrange(20), children)
    time.sleep(pick.uniform(0, 0.5))
    os.kill(pick.choice(children), signal.SIGTERM)
    since = time.monotonic()
    codes = starts.wait(children)
    seconds.append(time.monotonic() - since)
    good = codes == [75] * number and newest(base / 'told') == last_step(base / 'told')
    saved += good
    if not good:
      failures.append(f'SIGTERM: {codes}, saved {newest(base / "told")}, last step '
                      f'{last_step(base / "told")}: {starts.said(base, codes)}')
  # In other processes: this one, which is forked, may not begin to use JAX.
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    digests = [*pool.map(digest, [one / 'checkpoints' / str(num_steps) for one in (run, whole)])]
  # Saves that do not wait for the save before them.
  slow, calm = write_config(base, number, 5 * 400, 400), base / 'calm'
  starts.wait(begin(base, slow, calm, number))
  spent = {one['step']: one['goodput/checkpoints_seconds'] for one in records(calm)
           if 'goodput/checkpoints_seconds' in one}
  return {**seen, 'losses_equal': losses(run) == losses(whole), 'state_equal': (
    digests[0] == digests[1]),
    'saved': saved, 'seconds': seconds, 'failures': failures,
    'blocked_ms': 1000 * spent[5 * 400 - 1] / 4}


def write_config(
  base: pathlib.Path, number: int, num_steps: int, save_every: int = SAVE_EVERY
) -> pathlib.Path:
  path = starts.write_config(base, number, num_steps)
  config = json.loads(path.read_text())
  config['checkpoint'] = {'every_steps': save_every}
  config['model']['dropout_rate'] = 0.1
  path = base / f'config-{num_steps}.json'
  path.write_text(json.dumps(config))
  return path


def begin(base: pathlib.Path, config: pathlib.Path, run: pathlib.Path, number: int) -> list[int]:
  arguments = [f'--config={config}', f'--workdir={run}']
  if number > 1:
    with starts.socket.socket() as free:
      free.bind(('localhost', 0))
      arguments += [f'--coordinator=localhost:{free.getsockname()[1]}',
                    f'--num_processes={number}']
  return [starts.fork(base, [*arguments, *([f'--process_id={one}'] if number > 1 else [])], one)
          for one in range(number)]


def reach(run: pathlib.Path, step: int, children: list[int]) -> bool:
  """Wait until a step is written by this start; return whether that happened."""
  since, deadline = time.time(), time.monotonic() + starts.LIMIT_SECONDS
  while not any(one['step'] >= step and one['time'] >= since for one in records(run)):
    ended = os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is not None or time.monotonic() > deadline:
      return False
    time.sleep(0.01)
  return True


def records(run: pathlib.Path) -> list[dict]:
  from jaxllm.training import metrics

  return metrics.read(run / 'metrics.jsonl')


def losses(run: pathlib.Path) -> dict[int, float]:
  return {one['step']: one['train/loss'] for one in records(run) if 'train/loss' in one}


def last_step(run: pathlib.Path) -> int:
  return max(losses(run), default=0)


def newest(run: pathlib.Path) -> int:
  from jaxllm.checkpoints import store

  return max(store.committed_steps(run / 'checkpoints'), default=0)


def unfinished(run: pathlib.Path) -> list[str]:
  """Return the steps that are being written."""
  try:
    return [path.name for path in (run / 'checkpoints').iterdir()
            if path.is_dir() and not (path / 'commit_success.txt').exists()]
  except OSError:
    return []


def digest(step: pathlib.Path) -> str:
  """Return the SHA-256 of all arrays of a checkpoint."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  logging.getLogger('absl').setLevel(logging.ERROR)
  handler = ocp.PyTreeCheckpointHandler()
  tree = handler.metadata(step / 'state').tree
  restored = handler.restore(step / 'state', args=ocp.args.PyTreeRestore(
    tree, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)))
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
    total.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
  return total.hexdigest()


if __name__ == '__main__':
  app.run(main)
