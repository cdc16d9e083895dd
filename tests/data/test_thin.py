from jaxllm.data import batches, records
from jaxllm.data.documents import SourceConfig
from jaxllm.data.records import DataConfig
from jaxllm.data.tokenizers import TokenizerConfig


def test_text_to_batch(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('To be, or not to be, that is the question.\n' * 200, encoding='utf-8')
  data = DataConfig(sources=(SourceConfig(location=str(path)),), context_length=16, validation=None)
  for tok in (TokenizerConfig(kind='bytes'), TokenizerConfig(vocab_size=300),
              TokenizerConfig(model_type='char')):
    d = data.replace(add_bos=tok.kind != 'bytes')
    manifest = records.prepare(d, tok, tmp_path / 'out')
    assert manifest == records.load_manifest(tmp_path / 'out')
    assert records.prepare(d, tok, tmp_path / 'out') == manifest
    b = batches.make_batches(tmp_path / 'out', 'train', 4, 0)
    assert b.batch_at(0)['tokens'].shape == (4, 16)
    assert len(list(batches.prefetch(b, 0, 9))) == 9
    print(manifest.train, manifest.vocab_size)
