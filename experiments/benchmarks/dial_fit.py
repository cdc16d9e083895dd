"""Fit the rules of experiments/dial.py to small runs, and check its prediction on unseen ones.

  python experiments/benchmarks/dial_fit.py [--directory=runs/dial] [--stages=rules,law,checks]

- rules: learning rates and batches at three pairs of depth and tokens; a paraboloid over their
  logarithms gives BATCH and RATE, with which the dial goes on.
- law: runs of several depths and numbers of tokens, by these rules. Of the FORMS that held-out bits
  per byte may have over parameters and tokens, that one is taken which best tells each run from the
  others. Fits to results with other noise, and with other exponents of before, give the 90%
  intervals of PREDICTED.
- checks: runs that no fit has seen, one of them the dial's own d4.

A run that is finished is not done again; what is not finished is left out of the fits. The
constants are printed as they stand in dial.py. All runs together are half an hour of one core.
"""

import json
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from absl import app, flags
from scipy.optimize import least_squares

import jaxllm

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import dial  # noqa: E402

DIRECTORY = flags.DEFINE_string('directory', 'runs/dial', 'Where the runs go.')
STAGES = flags.DEFINE_list('stages', ['rules', 'law', 'checks'], 'Which runs are done.')
OUTPUT = flags.DEFINE_string('output', 'runs/dial.json', 'Where the JSON goes.')

# Depth and millions of tokens -> batches and learning rates.
RULES = {
  (2, 0.25): ((2, 4, 8), (0.01, 0.02, 0.04)),
  (2, 1): ((4, 8, 16), (0.005, 0.01, 0.02, 0.04)),
  (4, 0.5): ((4, 8), (0.005, 0.01, 0.02)),
}
LAW = ((2, 0.5), (2, 1), (2, 2), (2, 4), (3, 0.5), (3, 1), (3, 2), (4, 0.5), (4, 1), (5, 0.5))
CHECKS = ((4, 2.134528), (6, 0.6), (5, 1))
RESAMPLES = 400
# What small runs alone do not tell: exponents a and b are taken to be those of Hoffmann et al.,
# equation 10, give or take SPREAD; the NOISE of a run weighs them against the runs.
EXPONENTS, SPREAD, NOISE = np.array([0.34, 0.28]), 0.1, 0.007


class Result(NamedTuple):
  """What a run gave."""

  depth: int
  parameters: int
  tokens: int
  batch: int
  rate: float
  bits: float


def main(_) -> None:
  rules = measure('rules', [(*size, batch, rate) for size, (batches, rates) in RULES.items()
                            for batch in batches for rate in rates])
  if len(rules) > 12:
    fit_rules(rules)
  law, checks = (
    measure(stage, [(*size, *dial.batch_and_rate(size[0], size[1] * 1e6)) for size in sizes])
    for stage, sizes in (('law', LAW), ('checks', CHECKS)))
  fits = fit_law(law)
  print('\nPREDICTED = {')
  for depth in dial.DEPTHS:
    tokens = dial.tokens_of(depth)
    low, bits, high = predict(fits, tokens / dial.TOKENS_PER_PARAMETER, tokens)
    print(f'  {depth}: ({bits:.2f}, {low:.2f}, {high:.2f}),')
  print('}\n\nunseen          parameters     tokens  measured  predicted')
  for one in checks:
    low, bits, high = predict(fits, one.parameters, one.tokens)
    print(f'd{one.depth} {one.parameters:20,} {one.tokens:11,} {one.bits:9.3f} {bits:10.3f} '
          f'[{low:.3f}, {high:.3f}] {100 * (bits / one.bits - 1):+.1f}%'
          f'{"" if low <= one.bits <= high else "  OUTSIDE"}')
  found = {'rules': rules, 'law': law, 'checks': checks,
           'form': fits[0], 'fits': fits[1].tolist()}
  pathlib.Path(OUTPUT.value).write_text(json.dumps(found, indent=1) + '\n')


def measure(stage: str, runs: list) -> list[Result]:
  """Do the runs of a stage; return those that are finished."""
  found = []
  for depth, millions, batch, rate in runs:
    path = pathlib.Path(DIRECTORY.value) / f'd{depth}_{millions}M_b{batch}_lr{rate:.4g}'
    if not (path / 'summary.json').exists() and stage in STAGES.value:
      jaxllm.train(dial.make(depth, millions * 1e6, batch, rate), path)
    if (path / 'summary.json').exists():
      one = json.loads((path / 'summary.json').read_text())
      found.append(Result(depth, one['parameters'], one['train_tokens'], batch, rate,
                          one['validation']['bits_per_byte']))
      print(stage, *found[-1])
  return found


def fit_rules(results: list[Result]) -> None:
  """Print the rules of the bowls over batch and learning rate, which have one form."""
  depth, _, tokens, batch, rate, bits = np.array(results).T
  size = np.round(tokens, -4)
  groups = sorted({*zip(depth, size, strict=True)})
  member = np.array([[pair == group for group in groups]
                     for pair in zip(depth, size, strict=True)], float)
  log_t, log_b, log_r = np.log(tokens / 1e6), np.log(batch / 8), np.log(rate)

  def residuals(p: np.ndarray) -> np.ndarray:
    of_rate, of_batch, r, r_b, r_t, r_d, b, b_t = p[len(groups):]
    expected = member @ p[: len(groups)] + np.exp(of_rate) * (
      log_r - r - r_b * log_b - r_t * log_t - r_d * np.log(depth / 2)) ** 2
    return np.log((expected + np.exp(of_batch) * (log_b - b - b_t * log_t) ** 2) / bits)

  start = [*(bits[member[:, i] > 0].min() for i in range(len(groups))),
           -3.5, -4, -4, 0.7, -0.5, 0, 0, 0.3]
  found = least_squares(residuals, start)
  _, _, r, r_b, r_t, r_d, b, b_t = found.x[len(groups):]
  print(f'\nBATCH = ({8 * np.exp(b):.3g}, {b_t:.3f})\n'
        f'RATE = ({np.exp(r):.3g}, {r_b:.3f}, {r_t:.3f}, {r_d:.3f})\n'
        f'residuals of {len(bits)} runs: {100 * np.std(found.fun):.2f}%, at most '
        f'{100 * abs(found.fun).max():.2f}%\n')


def as_sum(p: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  """Hoffmann et al., arXiv 2203.15556, equation 2: E + A / N**a + B / D**b."""
  return p[0] + np.exp(p[1]) * (parameters / 1e6) ** -p[2] + np.exp(p[3]) * (tokens / 1e6) ** -p[4]


def jointly(p: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
  """Kaplan et al., arXiv 2001.08361, equation 1.5, and an E: E + (A / N**(a / b) + B / D)**b."""
  of_parameters = np.exp(p[1]) * (parameters / 1e6) ** (-p[2] / p[4])
  return p[0] + (of_parameters + np.exp(p[3]) / (tokens / 1e6)) ** p[4]


FORMS = {'sum': as_sum, 'joint': jointly}
Fits = tuple[str, np.ndarray]


def fit_law(results: list[Result]) -> Fits:
  """Return the best form, and its fits to resampled results; last stands the noise of a run."""
  _, parameters, tokens, *_, bits = np.array(results).T

  def fit(form: str, bits: np.ndarray, exponents: np.ndarray, kept: np.ndarray) -> least_squares:
    return least_squares(
      lambda p: np.append(
        np.log(FORMS[form](p, parameters[kept], tokens[kept]) / bits[kept]) / NOISE,
        (p[[2, 4]] - exponents) / SPREAD), [1.0, -1.5, 0.35, -1.5, 0.35])

  errors, every = {}, np.arange(len(bits))
  for form in FORMS:
    left_out = [np.log(FORMS[form](fit(form, bits, EXPONENTS, every != i).x, parameters[i],
                                   tokens[i]) / bits[i]) for i in every]
    errors[form] = np.sqrt(np.mean(np.square(left_out)))
    print(f'{form}: each run from the others within {100 * errors[form]:.2f}%')
  form = min(errors, key=errors.__getitem__)
  first = fit(form, bits, EXPONENTS, every)
  residuals = first.fun[: len(bits)] * NOISE
  # About four parameters are free, which makes residuals smaller than noise.
  noise = np.std(residuals) * (len(bits) / (len(bits) - 4)) ** 0.5
  names = zip(('E', 'log A', 'a', 'log B', 'b'), first.x, strict=True)
  print(f'\n{form}: ' + ', '.join(f'{name} = {x:.3f}' for name, x in names)
        + f'; residuals of {len(bits)} runs: {100 * np.std(residuals):.2f}%')
  pick, fits = np.random.default_rng(0), []
  for _ in range(RESAMPLES):
    noises = pick.normal(0, noise, len(bits) + 1)
    again = fit(form, FORMS[form](first.x, parameters, tokens) * np.exp(noises[1:]),
                pick.normal(EXPONENTS, SPREAD), every)
    fits.append(np.append(again.x, noises[0]))
  return form, np.array(fits)


def predict(fits: Fits, parameters: float, tokens: float) -> tuple[float, float, float]:
  """Return the 5% quantile, the median and the 95% quantile of bits per byte."""
  form, samples = fits
  bits = [FORMS[form](p, parameters, tokens) * np.exp(p[5]) for p in samples]
  low, middle, high = np.quantile(bits, [0.05, 0.5, 0.95])
  return float(low), float(middle), float(high)


if __name__ == '__main__':
  app.run(main)
