"""Precision and recall of the cleaning step 'redact' on a labelled synthetic set.

Command:  python experiments/benchmarks/redaction.py
Hardware: any, seconds
Expected: a table by type of data; docs/guides/data.md has the figures

Every sentence holds one piece of one type, or one that only looks like it. The pieces are of forms
in which people write them, some of which the step does not know: telephone numbers without the code
of a country, addresses whose signs are spelled out, keys without a known beginning.
"""

import json
import pathlib
import random
import string

from absl import app, flags

from jaxllm.data import redaction

SENTENCES = flags.DEFINE_integer('sentences', 500, 'Sentences with each type, and as many without.')
OUT = flags.DEFINE_string('out', None, 'A file for the figures as JSON.')

FRAMES = ('Please use {} for it.', 'It is {}, as before.', '({})', 'contact: {}', '"{}"', '{}\n',
          'We had {} in the list of 2024', 'value={};', '- {}', 'See {}.')
# Lengths of the accounts' numbers of some countries, the check digits and letters included.
COUNTRIES = {'DE': 22, 'GB': 22, 'FR': 27, 'ES': 24, 'NL': 18, 'IT': 27, 'PL': 28, 'NO': 15}


def digits(rng: random.Random, count: int, first: str = string.digits) -> str:
  """Return so many digits."""
  return rng.choice(first) + ''.join(rng.choices(string.digits, k=count - 1))


def grouped(text: str, sizes: list[int], separator: str) -> str:
  """Return the text in groups."""
  ends = [sum(sizes[:i + 1]) for i in range(len(sizes))]
  return separator.join(text[end - size:end] for size, end in zip(sizes, ends, strict=True))


def email(rng: random.Random) -> str:
  """Return an address; one in twenty is spelled out."""
  name = rng.choice(['jane.doe', 'j_smith', 'info', 'müller', 'a', "o'neil", 'x+tag', 'Max-Weber'])
  host = rng.choice(['example.com', 'mail.example.co.uk', 'uni-bonn.de', 'x.io', 'bücher.example',
                     '例え.jp', 'sub.dept.example.museum'])
  if rng.random() < 0.05:
    return f'{name} (at) {host}'
  return f'{name}{rng.choice(["", str(rng.randrange(99))])}@{host}'


def phone(rng: random.Random) -> str:
  """Return a number: international, of North America, or of elsewhere without its country."""
  a, b, c = digits(rng, 3, '23456789'), digits(rng, 3, '23456789'), digits(rng, 4)
  return rng.choice([
    f'+1 {a} {b} {c}', f'+1-{a}-{b}-{c}', f'+1{a}{b}{c}', f'({a}) {b}-{c}', f'{a}-{b}-{c}',
    f'{a}.{b}.{c}', f'1-{a}-{b}-{c}', f'+44 20 {digits(rng, 4)} {digits(rng, 4)}',
    f'+49 (0) {digits(rng, 3, "123456789")} {digits(rng, 6)}', f'+33 {digits(rng, 1, "16")} '
    + grouped(digits(rng, 8), [2] * 4, ' '), f'+86 1{digits(rng, 2)} {digits(rng, 4)} '
    f'{digits(rng, 4)}', f'00{digits(rng, 2, "3456")} {digits(rng, 9)}', f'0{a} {digits(rng, 7)}'])


def ip(rng: random.Random) -> str:
  """Return an address of the internet."""
  if rng.random() < 0.3:
    groups = [f'{rng.randrange(1, 2**16):x}' for _ in range(4)]
    return rng.choice([f'2001:4860:{":".join(groups)}:1:2', f'2a00:1450:{groups[0]}::{groups[1]}'])
  parts = [rng.choice([8, 23, 52, 91, 142, 185, 212]), *rng.choices(range(1, 255), k=3)]
  return '.'.join(map(str, parts))


def card(rng: random.Random, right: bool = True) -> str:
  """Return the number of a card with right or wrong check digit."""
  prefix, sizes = rng.choice([('4', [4] * 4), ('52', [4] * 4), ('2221', [4] * 4), ('6011', [4] * 4),
                              ('37', [4, 6, 5])])
  body = (prefix + digits(rng, 16))[:sum(sizes) - 1]
  check = next(d for d in string.digits if redaction.luhn(body + d))
  number = body + (check if right else str((int(check) + rng.randrange(1, 10)) % 10))
  return grouped(number, sizes, rng.choice(['', ' ', '-']))


def iban(rng: random.Random, right: bool = True) -> str:
  """Return the number of an account with right or wrong check digits."""
  country = rng.choice(list(COUNTRIES))
  rest = digits(rng, COUNTRIES[country] - 4)
  rest = f'WEST{rest[4:]}' if country == 'GB' else rest
  check = next(f'{n:02}' for n in range(2, 99) if redaction.iban(f'{country}{n:02}{rest}'))
  number = country + (check if right else f'{(int(check) + 1) % 97:02}') + rest
  sizes = [4] * (len(number) // 4) + ([len(number) % 4] if len(number) % 4 else [])
  return grouped(number, sizes, rng.choice(['', ' ']))


def key(rng: random.Random) -> str:
  """Return a key; one in seven has no known beginning."""
  def signs(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return ''.join(rng.choices(alphabet, k=count))
  return rng.choice([
    f'AKIA{signs(16, string.ascii_uppercase + "234567")}', f'ghp_{signs(36)}', f'AIza{signs(35)}',
    f'hf_{signs(34, string.ascii_letters)}', f'sk-proj-{signs(48)}', f'sk_live_{signs(24)}',
    f'xoxb-{digits(rng, 12)}-{signs(24)}', f'eyJ{signs(20)}.eyJ{signs(40)}.{signs(43)}', signs(40),
    f'-----BEGIN PRIVATE KEY-----\n{signs(64)}\n{signs(64)}\n-----END PRIVATE KEY-----',
    f'glpat-{signs(20)}', f'github_pat_{signs(22)}_{signs(59)}', f'secret {signs(32)}',
    f'pypi-AgEIcHlwaS5vcmc{signs(120)}'])


TYPES = {'email': email, 'phone': phone, 'ip': ip, 'card': card, 'iban': iban, 'key': key}


def nothing(rng: random.Random) -> str:
  """Return what is none of these, but looks like one."""
  return rng.choice([
    f'2{digits(rng, 3)}-{digits(rng, 2)}-{digits(rng, 2)}', f'v{digits(rng, 1)}.{digits(rng, 2)}.3',
    f'192.168.{rng.randrange(256)}.{rng.randrange(256)}', '127.0.0.1', 'fe80::1', '12:30:45',
    f'10.{rng.randrange(256)}.0.{rng.randrange(256)}', card(rng, False), iban(rng, False),
    f'ISBN 978-{digits(rng, 1)}-{digits(rng, 2)}-{digits(rng, 6)}-{digits(rng, 1)}',
    f'{rng.randrange(10**9):,}.{digits(rng, 2)}', f'{digits(rng, 2)},{digits(rng, 4)} +- 0.5',
    f'order {digits(rng, 10)}', f'{digits(rng, 5)}-{digits(rng, 4)}', '@decorator',
    'user@localhost', 'std::vector<int>', f'#{digits(rng, 6)}', '3+4 5678 9012',
    f'{digits(rng, 4)} {digits(rng, 4)}',
    f'{rng.getrandbits(128):032x}', f'commit {rng.getrandbits(160):040x}', 'GB2024 MODEL 1234',
    f'x = {digits(rng, 3)}-{digits(rng, 3)}', 'https://example.com/a@2x.png?v=1.2.3', '1.2.3.4.5'])


def main(_) -> None:
  """Print and write the table."""
  rng = random.Random(0)
  labelled = [(kind, make(rng)) for kind, make in TYPES.items() for _ in range(SENTENCES.value)]
  labelled += [(None, nothing(rng)) for _ in range(SENTENCES.value * len(TYPES))]
  counts = {kind: {'right': 0, 'wrong': 0, 'missed': 0} for kind in TYPES}
  for label, piece in labelled:
    before, _, after = (frame := rng.choice(FRAMES)).partition('{}')
    redacted, found = redaction.redact(frame.replace('{}', piece))
    right = label is not None and redacted == f'{before}[{label.upper()}]{after}'
    for kind, number in found.items():
      counts[kind]['wrong'] += number if kind != label or not right else 0
    if label:
      counts[label]['right' if right else 'missed'] += 1
  table = {kind: {'precision': count['right'] / max(count['right'] + count['wrong'], 1),
                  'recall': count['right'] / (count['right'] + count['missed']), **count}
           for kind, count in counts.items()}
  print(f'{"type":8}{"precision":>10}{"recall":>8}{"right":>7}{"wrong":>7}{"missed":>8}')
  for kind, row in table.items():
    print(f'{kind:8}{row["precision"]:10.3f}{row["recall"]:8.3f}{row["right"]:7}{row["wrong"]:7}'
          f'{row["missed"]:8}')
  if OUT.value:
    pathlib.Path(OUT.value).write_text(json.dumps(table))


if __name__ == '__main__':
  app.run(main)
