"""Files of jaxllm that a training run enters: what there is to know to follow it.

Command:  python experiments/benchmarks/files_entered.py
Hardware: any, seconds
Expected: the files until the first step is finished, with records to be made and with records that
          are there, and those of the whole run; imports are not counted
"""

import json
import pathlib
import sys
import tempfile
import threading
from typing import Any

import jaxllm
from jaxllm.training import evaluation, loop, metrics  # noqa: F401 (all imported before)

PACKAGE = pathlib.Path(jaxllm.__file__).parent


def entered(experiment: jaxllm.Experiment, workdir: pathlib.Path) -> tuple[set[str], set[str]]:
  """Train, and return the files entered until the first step is finished, and all of them."""
  found: dict[str, None] = {}
  first: set[str] = set()

  def note(frame: Any, event: str, _: Any) -> None:
    name = frame.f_code.co_filename
    if event == 'call' and name.startswith(str(PACKAGE)):
      found.setdefault(str(pathlib.Path(name).relative_to(PACKAGE)))
      if frame.f_code is metrics.MetricLogger.log_step.__code__ and not first:
        first.update(found)

  threading.setprofile(note)
  sys.setprofile(note)
  try:
    loop.train(experiment, workdir)
  finally:
    sys.setprofile(None)
    threading.setprofile(None)  # type: ignore[arg-type]
  return first, set(found)


def main() -> None:
  """Train two tiny runs on the same records."""
  with tempfile.TemporaryDirectory() as directory:
    base = pathlib.Path(directory)
    (base / 'text.txt').write_text('To be, or not to be. ' * 2000)
    experiment = jaxllm.Experiment(
      name='tiny', records_dir=str(base / 'records'),
      tokenizer=jaxllm.TokenizerConfig(kind='bytes'),
      model=jaxllm.DecoderConfig(vocab_size=258, embed_dim=16, num_layers=2, num_heads=2,
                                 mlp_dim=32, max_length=32),
      data=jaxllm.DataConfig(sources=(jaxllm.SourceConfig(location=str(base / 'text.txt')),),
                             context_length=32),
      training=jaxllm.TrainingConfig(num_steps=2, batch_size=8))
    fresh, whole = entered(experiment, base / 'fresh')
    prepared, _ = entered(experiment, base / 'prepared')
  print('\n'.join(sorted(fresh)))
  print(json.dumps({'first_step': len(fresh), 'first_step_with_records': len(prepared),
                    'whole_run': len(whole)}))


if __name__ == '__main__':
  main()
