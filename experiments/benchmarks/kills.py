"""Kill and stop runs at random moments, go on, and compare them with one that was left alone.

  python experiments/benchmarks/kills.py [--count=20] [--signals=10] [--processes=1,2]
      [--minutes=60] [--output=runs/kills.json]
  python experiments/benchmarks/kills.py --hosts=1,2,4,1
  python experiments/benchmarks/kills.py --goodput=5

For each number of processes runs are killed `count` times in all, KILLS_A_RUN times each (all
processes by SIGKILL, at a random moment after its first new step, half of them while a checkpoint
is being written), started again each time, and at last left to finish. No committed step may be
lost, none may be found damaged, and losses and the final state must be those of a run that was
never killed, bit for bit. Then `signals` times SIGTERM goes to one process: all must save the last
step and end with the exit code 75. What does not fit into the minutes, which the numbers of
processes share, is left out; the table says how many there were, and the JSON is written after each
run.

So that a kill is cheap, processes are forked from one that has imported everything, and take their
compiled programs from a cache: 1.5 seconds on a quiet core.

--hosts stops a run by SIGTERM and goes on with another number of processes, each of which writes
down the records that it reads: over the steps that count, each record must be read once.

--goodput kills a run once a minute for so many minutes, with a loop that starts it again, and
compares the steps in its checkpoints with those of a run that is left alone for the same time.
"""

import collections
import concurrent.futures
import contextlib
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
import subprocess
import sys
import tempfile
import time

import starts
from absl import app, flags

COUNT = flags.DEFINE_integer('count', 20, 'Kills with each number of processes.')
HOSTS = flags.DEFINE_list('hosts', [], 'Numbers of processes of a run, one after the other.')
GOODPUT = flags.DEFINE_float('goodput', 0, 'Minutes of a run that is killed once a minute.')
flags.FLAGS.set_default('processes', ['1', '2'])
flags.FLAGS.set_default('signals', 10)
flags.FLAGS.set_default('output', 'runs/kills.json')
SAVE_EVERY, KILLS_A_RUN = 4, 50
TURN = [0]  # Which start of a run the processes belong to that are forked next.


def main(_) -> None:
  with tempfile.TemporaryDirectory() as directory:
    base = pathlib.Path(directory)
    if GOODPUT.value:
      found = goodput(base, GOODPUT.value)
    else:
      starts.import_all(cache=base / 'compiled')
      found = hosts(base, [*map(int, HOSTS.value)]) if HOSTS.value else kills(base)
    write(found)
  print(f'wrote {starts.OUTPUT.value}')


def write(found: dict) -> None:
  path = pathlib.Path(starts.OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(found, indent=2) + '\n')


def kills(base: pathlib.Path) -> dict:
  """Kill and stop runs with each number of processes, and print the table."""
  rows, pick = {}, random.Random(starts.SEED.value)
  numbers = [*map(int, starts.PROCESSES.value)]
  print(f'{"processes":>9} {"kills":>6} {"in a save":>9} {"s/kill":>6} {"steps lost":>10} '
        f'{"damaged":>7} {"runs":>5} {"equal":>6} {"SIGTERMs":>8} {"saved, 75":>9} {"s p50":>6} '
        f'{"s p99":>6} {"ms/save":>8}')
  end = time.monotonic() + 60 * starts.MINUTES.value
  for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
    row = rows[number] = collections.Counter(), [], []
    seen, seconds, failures = row
    deadline = time.monotonic() + (end - time.monotonic()) / left
    place = base / str(number)
    place.mkdir()
    whole = left_alone(place, number)
    for killed in range(0, COUNT.value, KILLS_A_RUN):
      if time.monotonic() < deadline:
        run = place / f'run-{killed}'
        failures += kill(place, run, number, min(KILLS_A_RUN, COUNT.value - killed), pick, seen,
                         deadline)
        compare(whole, run, seen, failures)
        shutil.rmtree(run)
        write(rows)
    deadline = time.monotonic() + max(300, (end - time.monotonic()) / left)
    for _ in starts.in_time(starts.SIGNALS.value, deadline):
      seconds.append(stop(place, number, pick, seen, failures))
      write(rows)
    blocked = blocked_ms(place, number)
    seconds.sort()
    late = seconds[round(0.99 * (len(seconds) - 1))] if seconds else 0
    print(f'{number:>9} {seen["kills"]:>6} {seen["mid_save"]:>9} '
          f'{seen["seconds"] / max(1, seen["kills"]):>6.2f} {seen["lost"]:>10} '
          f'{seen["damaged"]:>7} {seen["runs"]:>5} {seen["equal"]:>6} {len(seconds):>8} '
          f'{seen["saved"]:>9} {statistics.median(seconds or [0]):>6.2f} {late:>6.2f} '
          f'{blocked:>8.1f}', flush=True)
    for line in failures:
      print(f'  {line}')
  return rows


def left_alone(base: pathlib.Path, number: int) -> pathlib.Path:
  """Return a run that nothing disturbs, of as many steps as those that are killed."""
  config = write_config(base, number, 8 * min(KILLS_A_RUN, COUNT.value) + 20)
  if any(codes := starts.wait(begin(base, config, base / 'whole', number))):
    raise SystemExit(f'the run that is left alone ended with {codes}: {starts.said(base, codes)}')
  return base / 'whole'


def kill(
  base: pathlib.Path, run: pathlib.Path, number: int, count: int, pick: random.Random,
  seen: collections.Counter, deadline: float,
) -> list[str]:
  """Kill a run again and again, and let it finish; return what went wrong."""
  config = write_config(base, number, 8 * min(KILLS_A_RUN, COUNT.value) + 20)
  for _ in starts.in_time(count, deadline):
    before, since = newest(run), time.monotonic()
    children = begin(base, config, run, number)
    if not reach(run, before + 1 + pick.randrange(6), children):
      return [f'ended by itself after step {before}: {starts.said(base, starts.wait(children))}']
    if pick.random() < 0.5:  # In the middle of a save.
      limit = time.monotonic() + 5
      while not unfinished(run) and time.monotonic() < limit:
        time.sleep(0.0005)
      time.sleep(pick.uniform(0, 0.01))
    else:
      time.sleep(pick.uniform(0, 0.1))
    for child in children:
      os.kill(child, signal.SIGKILL)
    starts.wait(children)
    seen.update(kills=1, mid_save=bool(unfinished(run)), lost=newest(run) < before,
                seconds=time.monotonic() - since)
  codes = starts.wait(begin(base, config, run, number))
  return [f'ended with {codes}: {starts.said(base, codes)}'] if any(codes) else []


def compare(
  whole: pathlib.Path, run: pathlib.Path, seen: collections.Counter, failures: list[str]
) -> None:
  """Count whether two runs have the same losses, and the same arrays in their last checkpoint."""
  # In other processes: this one, which is forked, may not begin to use JAX.
  with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('fork')) as pool:
    digests = [*pool.map(digest, [one / 'checkpoints' / str(newest(one)) for one in (run, whole)])]
  same = newest(run) == newest(whole), losses(run) == losses(whole), digests[0] == digests[1]
  if not all(same):
    failures.append(f'{run.name}: the same last step, losses, state: {same}')
  seen.update(runs=1, equal=all(same), damaged=len([*run.glob('checkpoints/*.damaged*')]))


def stop(
  base: pathlib.Path, number: int, pick: random.Random, seen: collections.Counter,
  failures: list[str],
) -> float:
  """Send SIGTERM to a process of a run, and return after how many seconds all have ended."""
  told = base / 'told'
  shutil.rmtree(told, ignore_errors=True)
  children = begin(base, write_config(base, number, 10**6), told, number)
  reach(told, 1 + pick.randrange(20), children)
  time.sleep(pick.uniform(0, 0.5))
  os.kill(pick.choice(children), signal.SIGTERM)
  since = time.monotonic()
  codes = starts.wait(children)
  seconds = time.monotonic() - since
  good = codes == [75] * number and newest(told) == last_step(told)
  seen.update(saved=good)
  if not good:
    failures.append(f'SIGTERM: {codes}, saved {newest(told)}, last step {last_step(told)}: '
                    f'{starts.said(base, codes)}')
  return seconds


def blocked_ms(base: pathlib.Path, number: int) -> float:
  """Return how long a save blocks the loop that does not wait for the save before it."""
  every, calm = 200, base / 'calm'
  starts.wait(begin(base, write_config(base, number, 5 * every, every), calm, number))
  spent = {one['step']: one['goodput/checkpoints_seconds'] for one in records(calm)
           if 'goodput/checkpoints_seconds' in one}
  return 1000 * spent[5 * every - 1] / 4


def hosts(base: pathlib.Path, numbers: list[int]) -> dict:
  """Change the number of processes of a run, and count how often each record is read."""
  from jaxllm.data import batches

  size = max(numbers)
  config = write_config(base, size, 10**6)
  begin_watching(batches, base)
  run, steps, epoch = base / 'run', [0], 0
  for turn, number in enumerate(numbers):
    children = begin(base, config, run, number, turn)
    last = turn == len(numbers) - 1
    if last:
      epoch = json.loads((run / 'data.json').read_text())['train']['records'] // size
    reach(run, epoch if last else steps[-1] + 5, children)
    os.kill(children[0], signal.SIGTERM)
    if (codes := starts.wait(children)) != [75] * number:
      raise SystemExit(f'{number} processes ended with {codes}: {starts.said(base, codes)}')
    steps.append(newest(run))
    print(f'{number} process{"es"[:2 * (number > 1)]}: steps {steps[-2] + 1} to {steps[-1]}',
          flush=True)
  read, content = collections.Counter(), collections.Counter()
  for line in (base / 'read.jsonl').read_text().splitlines():
    one = json.loads(line)
    if steps[one['turn']] < one['step'] <= min(steps[one['turn'] + 1], epoch):
      read.update(one['places'])
      content.update(one['content'])
  once = set(read) == set(range(epoch * size)) and {*read.values(), *content.values()} == {1}
  print(f'{epoch} steps, {len(read)} places in the order of the records, {len(content)} different '
        f'records: {"each read once" if once else "NOT each read once"}')
  return {'processes': numbers, 'steps': steps, 'records': len(content), 'once': once}


def begin_watching(batches, base: pathlib.Path) -> None:
  """Let each process that is forked from now on write down which records it reads."""
  batch_at = batches.Batches.batch_at

  def watched(self, step: int) -> dict:
    places = self.places(step)
    found = [hashlib.sha256(self.stored.rows[number]).hexdigest()[:16]
             for number in self.numbers(step)]
    with (base / 'read.jsonl').open('a') as file:
      file.write(json.dumps({'turn': TURN[0], 'step': step + 1, 'places': places,
                             'content': found}) + '\n')
    return batch_at(self, step)

  batches.Batches.batch_at = watched


def goodput(base: pathlib.Path, minutes: float) -> dict:
  """Return how many steps a run keeps that is killed once a minute, beside one that is not.

  They have every other minute of the machine, so that what else it does is the same for both.
  """
  os.environ |= {**starts.CPU, 'JAX_COMPILATION_CACHE_DIR': str(base / 'compiled')}
  config = write_config(base, 1, 10**6, 500)

  def start(name: str) -> subprocess.Popen:
    with (base / f'{name}.txt').open('w') as file:
      return subprocess.Popen(
        [sys.executable, '-m', 'jaxllm.train', f'--config={config}', f'--workdir={base / name}'],
        stdout=file, stderr=file)

  def let(child: subprocess.Popen, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
      raise SystemExit(f'a run has ended with {child.wait(seconds)}')

  let(warm_up := start('warm-up'), 30)  # What is compiled is in the cache then.
  warm_up.kill()
  alone = start('alone')
  alone.send_signal(signal.SIGSTOP)
  for minute in range(round(minutes)):
    alone.send_signal(signal.SIGCONT)
    let(alone, 60)
    alone.send_signal(signal.SIGSTOP)
    killed = start('killed')
    let(killed, 60)
    killed.kill()
    killed.wait()
    kept = {name: newest(base / name) for name in ('alone', 'killed')}
    print(f'{minute + 1} minutes: {kept["alone"]} steps left alone, {kept["killed"]} killed; '
          f'goodput {kept["killed"] / kept["alone"]:.3f}', flush=True)
  alone.kill()
  return kept


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


def begin(
  base: pathlib.Path, config: pathlib.Path, run: pathlib.Path, number: int, turn: int = 0
) -> list[int]:
  arguments = [f'--config={config}', f'--workdir={run}']
  if number > 1:
    with starts.socket.socket() as free:
      free.bind(('localhost', 0))
      arguments += [f'--coordinator=localhost:{free.getsockname()[1]}',
                    f'--num_processes={number}']
  TURN[0] = turn
  return [starts.fork(base, [*arguments, *([f'--process_id={one}'] if number > 1 else [])], one)
          for one in range(number)]


def reach(run: pathlib.Path, step: int, children: list[int]) -> bool:
  """Wait until a step is written by this start; return whether that happened."""
  since, deadline = time.time(), time.monotonic() + starts.LIMIT_SECONDS
  while not any(one['step'] >= step and one['time'] >= since for one in records(run, 4000)):
    ended = os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is not None or time.monotonic() > deadline:
      return False
    time.sleep(0.01)
  return True


def records(run: pathlib.Path, last_bytes: int | None = None) -> list[dict]:
  """Return the whole records of metrics.jsonl, or of its end."""
  try:
    lines = (run / 'metrics.jsonl').read_bytes()[-(last_bytes or 0):].split(b'\n')
  except OSError:
    return []
  return [json.loads(line) for line in lines[last_bytes is not None:-1]]


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
