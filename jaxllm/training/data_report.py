"""One page about records: what was read, cleaned and tokenized, and which texts cost a model."""

import pathlib
from collections import Counter
from typing import Any

import numpy as np

from jaxllm import loading, storage
from jaxllm.data import batches, records, redaction, samples, tokenizers
from jaxllm.data.records import Manifest
from jaxllm.generation import scoring
from jaxllm.training import report

_LEAST_TOKENS, _MOST, _SHOWN = 16, 8, 400


def write(name: str, folder: pathlib.Path, location: str | None = None, count: int = 1000
          ) -> pathlib.Path:
  """Write the page, and its figures as JSON, beside the records in a folder; return its path.

  So many documents are cleaned again, and so many records read by the model at `location`.
  """
  manifest, tokenizer = records.load_manifest(folder), records.load_tokenizer(folder)
  data = manifest.data
  looks, found = samples.rehearse((*data.sources, *data.own_validation), data.cleaning, count)
  cleaning = Counter[str]()
  for source in manifest.sources:
    cleaning.update(source.cleaning)
  fields = {
    'manifest': manifest.model_dump(mode='json'), 'cleaning': cleaning,
    'looked_at': sum(look.counts['documents'] for look in looks),
    'samples': found,
    'tokenizer': samples.measure(
      tokenizer, {look.source.location: look.kept for look in looks}
    ) | samples.usage(tokenizer, batches.open_records(folder, 'train')),
    'losses': location and losses(location, manifest, folder, count)}
  storage.write_json((folder / report.DATA_PAGE).with_suffix('.json'), fields)
  storage.write_file(folder / report.DATA_PAGE, report.render(
    'data_report.html', name=name, **fields))
  return folder / report.DATA_PAGE


def losses(location: str, manifest: Manifest, folder: pathlib.Path, count: int) -> dict[str, Any]:
  """Return the texts of a sample of the training records that cost a model most, and least.

  The sample is even over the records; each run of tokens that sees no other is scored by itself.
  """
  model, stored = loading.load(location), batches.open_records(folder, 'train')
  if not tokenizers.same_vocabulary(model.tokenizer, records.load_tokenizer(folder)):
    raise ValueError(f'--model={location} has another tokenizer than the records; name a run that '
                     'was trained on them')
  numbers = np.unique(np.linspace(0, len(stored.rows) - 1, count).astype(int)).tolist()
  least = min(_LEAST_TOKENS, manifest.context_length)
  runs = [run for run in batches.runs(stored, numbers) if len(run[2]) > least]
  found = scoring.score(model.decoder, model.variables, [ids.tolist() for _, _, ids in runs])
  nats = np.array([-one.log_probs_N.mean() for one in found])
  lineage = records.open_lineage(folder, 'train')

  def shown(place: int) -> dict[str, Any]:
    number, start, ids = runs[place]
    pieces = lineage.pieces(number)
    piece = pieces[np.searchsorted(pieces['start'], start, 'right') - 1]
    text = b''.join(model.tokenizer.id_bytes[i] for i in ids).decode(errors='replace')
    return {
      'nats': float(nats[place]), 'tokens': len(ids) - 1, 'record': number,
      'where': f'{manifest.data.sources[piece["source"]].location}, document {piece["document"]}, '
               f'from token {piece["token"]} on',
      'text': samples.visible(redaction.masked(text)[0])[:_SHOWN]}

  order = np.argsort(nats, kind='stable').tolist()
  return {'model': location, 'records': len(numbers), 'texts': len(runs),
          'median': float(np.median(nats)), 'highest': [*map(shown, order[: -_MOST - 1 : -1])],
          'lowest': [*map(shown, order[:_MOST])]}
