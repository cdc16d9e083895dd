"""Redaction of personal data: each found piece becomes a mark of its type, such as [EMAIL]."""

import functools
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Mapping


def luhn(number: str) -> bool:
  """Return whether the check digit of a card's number is right (ISO/IEC 7812)."""
  digits = [int(digit) for digit in re.sub(r'\D', '', number)[::-1]]
  doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[1::2]]
  return len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def iban(number: str) -> bool:
  """Return whether the check digits of an account's number are right (ISO 13616)."""
  text = re.sub(r'\s', '', number)
  return int(''.join(str(int(sign, 36)) for sign in text[4:] + text[:4])) % 97 == 1


def public_address(text: str) -> bool:
  """Return whether this is an address of the internet, which those of no network are not."""
  try:
    return ipaddress.ip_address(text).is_global
  except ValueError:
    return False


KINDS: Mapping[str, tuple[str, Callable[[str], bool]]] = {
  # The formats of AWS, GitHub, GitLab, Google, Hugging Face, OpenAI, PyPI, Slack, Stripe; JWT; PEM.
  'key': (r'(?:AKIA|ASIA)[0-9A-Z]{16}\b|gh[pousr]_\w{36,255}|github_pat_\w{40,100}'
    r'|glpat-[\w-]{20,}|AIza[\w-]{35}|hf_[A-Za-z]{30,40}\b|sk-[\w-]{32,200}'
    r'|pypi-[\w-]{50,250}|xox[abeoprs]-[\w-]{10,200}|[sr]k_(?:live|test)_\w{16,100}'
    r'|eyJ[\w-]{10,2000}\.eyJ[\w-]{10,2000}\.[\w-]{10,2000}'
    r'|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[\w+/=\s]{1,9999}-----END [A-Z ]{0,20}'
    r'PRIVATE KEY-----', bool),
  # But not a@2x.png, a picture.
  'email': (r"\w[\w.+%'-]{0,63}@(?!\dx\.)(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}"
    r'[^\W\d_]{2,24}\b', bool),
  'iban': (r'[A-Z]{2}\d\d(?: ?[A-Z\d]{4}){2,7}(?: ?[A-Z\d]{1,3})?\b', iban),
  'card': (r'(?:3[47]\d\d([ -]?)\d{6}\1\d{5}|(?:4\d|5[1-5]|2[2-7]|6\d|3[5-9])\d\d([ -]?)'
    r'(?:\d{4}\2){2}\d{4})\b(?!-?\d)', luhn),
  'ip': (r'(?:\d{1,3}\.){3}\d{1,3}\b(?!\.\d)'
    r'|(?<!:)[23][\da-fA-F]{3}:(?:[\da-fA-F]{0,4}:){1,6}[\da-fA-F]{1,4}\b(?!:)',
    public_address),
  # With the code of a country, or as in North America.
  'phone': (r'\+[1-9]\d{0,2}+(?:[ .-]?\(?\d{1,4}+\)?){2,6}+\b'
    r'|(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])[2-9]\d\d[.-]\d{4}\b',
    lambda text: 8 <= sum(map(str.isdigit, text)) <= 15),
}
"""Name -> (what it looks like, whether that is one)."""
# Beside a mark nothing begins or ends, so that a second run finds nothing that the first did not.
_BEFORE = r'(?<![\w+%-])(?<!\d\.)' + ''.join(rf'(?<!\[{name.upper()}\])' for name in KINDS)
_AFTER = rf'(?!\[(?:{"|".join(map(str.upper, KINDS))})\])'
_PATTERNS = {name: re.compile(f'{_BEFORE}(?:{pattern}){_AFTER}')
             for name, (pattern, _) in KINDS.items()}


def redact(
  text: str, mark: Callable[[str, str], str] = lambda name, found: f'[{name.upper()}]'
) -> tuple[str, Counter[str]]:
  """Return the text with marks in the place of personal data, and how many of each type there were.

  Card and account numbers count where their check digits are right, addresses where they are those
  of the internet, telephone numbers with the code of a country or as North America writes them.
  """
  found: Counter[str] = Counter()
  for name, pattern in _PATTERNS.items():
    text = pattern.sub(functools.partial(_mark, name, found, mark), text)
  return text, found


def masked(text: str) -> tuple[str, Counter[str]]:
  """Return the same with nothing left of personal data but its shape, for people to look at."""
  return redact(text, lambda _, found: re.sub(r'[^\W\d]', 'x', re.sub(r'\d', '0', found)))


def _mark(
  name: str, found: Counter[str], mark: Callable[[str, str], str], match: re.Match[str]
) -> str:
  if not KINDS[name][1](match[0]):
    return match[0]
  found[name] += 1
  return mark(name, match[0])
