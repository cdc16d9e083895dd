"""Ways to damage files: flipped, lost, doubled and inserted bytes; other values in JSON."""

import json

ATOMS = (None, True, 0, -1, 2**63, 10**400, 1e308, '', 'a', '<s>', [], [[]], {}, {'a': []},
         '\ud800', [None], {'content': 5}, {'content': ['a']}, 'x' * 5000)
SPECIAL = (b'\0', b'\xff\xfe', b'[' * 5000, b'{"text":' * 3000, b'"' * 1001, b'<!--' * 500,
           b'<![', b'<a "', b'\r\r\n', b'9' * 6000, b'{"a":1,"a":2}', b'NaN', b'\x1c\x85',
           b'*_' * 2000, b'\xf4\x90\x80\x80', b'\\ud800')


def mutate_bytes(rng, content):
  content = bytearray(content)
  for _ in range(rng.choice([1, 1, 2, 5])):
    place, kind = rng.randrange(len(content) + 1), rng.random()
    if kind < 0.4 and content:
      content[place % len(content)] ^= 1 << rng.randrange(8)
    elif kind < 0.6:
      content[place:place + rng.choice([1, 4, 100])] = b''
    elif kind < 0.8:
      content[place:place] = rng.choice(SPECIAL)
    else:
      content[place:place] = content[place // 2:place]
  return bytes(content)


def mutate_tree(rng, value):
  """Replace, drop or double one value somewhere in JSON."""
  if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
    return rng.choice(ATOMS)
  if isinstance(value, dict):
    key = rng.choice([*value])
    if rng.random() < 0.15:
      return {name: item for name, item in value.items() if name != key}
    return {**value, key: mutate_tree(rng, value[key])}
  place = rng.randrange(len(value))
  if rng.random() < 0.2:
    return value[:place] + value[place + 1:]
  return [*value[:place], mutate_tree(rng, value[place]), *value[place + 1:]]


def mutate_json(rng, content):
  if rng.random() < 0.25:
    return mutate_bytes(rng, content)
  tree = json.loads(content)
  for _ in range(rng.choice([1, 1, 2])):
    tree = mutate_tree(rng, tree)
  return json.dumps(tree).encode()
