"""The playground in a real browser, in front of a real server."""

import base64
import dataclasses
import json

import browser
import pytest
from http_server import NAME, running, shared

from jaxllm.data import tokenizers
from jaxllm.data.tokenizers import TokenizerConfig

pytestmark = [
  pytest.mark.browser,
  pytest.mark.skipif(browser.CHROMIUM is None, reason='needs Chromium'),
]
KEY = 'a-key-of-this-test'
IDLE = 'document.getElementById("stop").hidden'
ANSWER = '[...document.querySelectorAll(".answer")].at(-1)'
FIGURES = 'document.getElementById("figures").textContent'
ERROR = 'document.querySelector("#error p").textContent'


@pytest.fixture(scope='module')
def server():
  with running(*shared()) as started:
    yield started


@pytest.fixture(scope='module')
def tab():
  with browser.chromium() as page:
    yield page


@pytest.fixture
def page(tab, server):
  tab.errors.clear()
  tab.open(server.url)
  tab.wait(f'document.getElementById("model").textContent === "{NAME}"')
  return tab


def set_fields(page, **values):
  for name, value in values.items():
    page.js(f'document.getElementById("{name}").value = {json.dumps(value)};'
            f'document.getElementById("{name}").dispatchEvent(new Event("input"))')


def ask(page, text):
  page.type('#input', text)
  page.press('Enter', modifiers=2)
  page.wait(f'{IDLE} && {FIGURES}.includes("ended")')


def spans(page):
  """Return the text of the answer's tokens, beyond a prompt."""
  return page.js(f'[...{ANSWER}.querySelectorAll(".token")].map(e => e.textContent)')


def test_chat_shows_what_the_api_says(page, server):
  set_fields(page, temperature=0.7, top_k=50, min_p=0.01, repetition_penalty=1.1, seed=5,
             max_tokens=40, system='Be brief.')
  ask(page, 'Hello <b>you</b>')
  messages = [{'role': 'system', 'content': 'Be brief.'},
              {'role': 'user', 'content': 'Hello <b>you</b>'}]
  fields = {'temperature': 0.7, 'top_k': 50, 'min_p': 0.01, 'repetition_penalty': 1.1, 'seed': 5,
            'max_tokens': 40}
  want = server.chat(messages=messages, logprobs=True, **fields).json()
  text = want['choices'][0]['message']['content']
  assert len(text) > 20 and page.js(f'{ANSWER}.textContent') == ''.join(spans(page)) == text
  assert f'{len(want["choices"][0]["logprobs"]["content"])} tokens' in page.js(FIGURES)
  assert page.js('document.querySelector(".user p").textContent') == 'Hello <b>you</b>'
  assert page.js('document.querySelector("#log b, #log img")') is None
  # The conversation goes on with what was said.
  ask(page, 'More')
  messages += [{'role': 'assistant', 'content': text}, {'role': 'user', 'content': 'More'}]
  want = server.chat(messages=messages, **fields).json()
  assert page.js(f'{ANSWER}.textContent') == want['choices'][0]['message']['content']
  page.click('#clear')
  assert page.js('document.getElementById("log").textContent') == ''
  assert page.errors == []


def test_completion_shows_what_the_api_says(page, server):
  page.click('#modes label:nth-of-type(2)')
  set_fields(page, seed=7, max_tokens=50, stops='\\n\nzz')
  ask(page, 'To be\nor')
  fields = {'temperature': 1.0, 'seed': 7, 'max_tokens': 50, 'stop': ['\n', 'zz']}
  want = server.complete(prompt='To be\nor', **fields).json()['choices'][0]['text']
  shown = page.js(f'{ANSWER}.textContent')
  assert len(want) > 5 and shown.startswith(f'To be\nor{want}')
  assert ''.join(spans(page)).startswith(want)
  page.click('.below button')
  assert page.js('document.getElementById("input").value') == f'To be\nor{want}'
  assert page.errors == []


def test_alternatives_of_a_token(page, server):
  set_fields(page, seed=5, max_tokens=20)
  ask(page, 'Hello')
  content = server.chat(messages=[{'role': 'user', 'content': 'Hello'}], temperature=1.0, seed=5,
                        max_tokens=20, logprobs=True, top_logprobs=5
                        ).json()['choices'][0]['logprobs']['content']
  detail = '[...document.querySelectorAll("#detail:not([hidden]) tr")].map(e => e.className)'
  for index in (0, 3):
    page.js(f'{ANSWER}.querySelectorAll(".token")[{index}].id = "it"')
    page.hover('#it')
    rows = page.js(detail)
    assert rows.count('chosen') == page.js('document.getElementById("it").tokens.length') >= 1
    assert len(rows) >= 5
    page.js('document.getElementById("it").id = ""')
  grouped = page.js(
    f'[...{ANSWER}.querySelectorAll(".token")].flatMap(e => e.tokens).map(t => t.logprob)')
  assert grouped == pytest.approx([item['logprob'] for item in content])
  # By keyboard: one stop of the tab key, then the arrows.
  page.js(f'{ANSWER}.querySelector(".token").focus()')
  page.press('ArrowRight')
  focused = f'[...{ANSWER}.querySelectorAll(".token")].indexOf(document.activeElement)'
  assert page.js(focused) == 1 and page.js(detail)
  assert page.js('document.querySelectorAll(".token[tabindex=\\"0\\"]").length') == 1
  page.press('End')
  assert page.js(focused) == len(spans(page)) - 1
  page.press('Escape')
  page.hover('#input')
  assert page.js(focused) == -1 and page.js(detail) == []
  page.click('#shade')
  assert page.js('document.querySelector("#log.shaded")') is None
  assert page.errors == []


def test_stop_keeps_what_came_and_frees_the_slot(page, server):
  def runs_on(seed):
    answer = server.chat(messages=[{'role': 'user', 'content': 'Go on'}], temperature=1.0,
                         seed=seed, max_tokens=300).json()
    return answer['choices'][0]['finish_reason'] == 'length'

  set_fields(page, seed=next(filter(runs_on, range(100))), max_tokens=300)
  page.type('#input', 'Go on')
  page.js('''new Promise(done => {
    new MutationObserver((_, watcher) => {
      if (!document.querySelector('.token')) return;
      document.getElementById('stop').click();
      watcher.disconnect();
      done();
    }).observe(document.getElementById('log'), {childList: true, subtree: true});
    document.getElementById('send').click();
  })''')
  page.wait(f'{IDLE} && {FIGURES}.includes("stopped by you")')
  assert 0 < len(spans(page)) < 250
  server.wait_until_idle()
  assert page.errors == []


def test_what_is_wrong_is_said_in_a_sentence(page):
  set_fields(page, temperature=7)
  page.type('#input', 'x')
  page.click('#send')
  assert page.js(ERROR) == 'Temperature must be a number from 0 to 2.'
  assert page.js('document.activeElement.id') == 'temperature'
  set_fields(page, temperature=1, stops='a\nb\nc\nd\ne')
  page.click('#send')
  assert '5 texts to stop at' in page.js(ERROR)
  # The server's own words, and the message is given back.
  set_fields(page, stops='')
  page.type('#input', 'x' * 600)
  page.click('#send')
  page.wait('!document.getElementById("error").hidden')
  assert page.js(ERROR).startswith('The text is too long for the model: messages: ')
  assert page.js('document.getElementById("input").value.length') == 600
  assert page.js('document.getElementById("log").textContent') == ''
  page.click('#error button')
  assert page.js('document.getElementById("error").hidden')
  page.call('Network.emulateNetworkConditions', offline=True, latency=0, downloadThroughput=-1,
            uploadThroughput=-1)
  page.click('#send')
  page.wait('!document.getElementById("error").hidden')
  page.call('Network.emulateNetworkConditions', offline=False, latency=0, downloadThroughput=-1,
            uploadThroughput=-1)
  assert page.js(ERROR).startswith('The server cannot be reached.')


def test_streams_are_read_however_they_are_cut(page):
  parts = ['data: {"a":"é🙂"}\n\n', 'data: {"error":{"message":"it broke","code":"x"}}\n\n']
  script = '''(async () => {
    const { stream } = await import('./static/api.js');
    const bytes = new TextEncoder().encode(%s), seen = [];
    globalThis.fetch = async () => new Response(new ReadableStream({ start(out) {
      for (const byte of bytes) out.enqueue(new Uint8Array([byte]));
      out.close();
    } }));
    try {
      for await (const part of stream('x', {})) seen.push(part);
    } catch (error) { seen.push(error.message); }
    return seen;
  })()'''
  whole = parts[0] * 2 + 'data: [DONE]\n\n'
  assert page.js(script % json.dumps(whole)) == [{'a': 'é🙂'}] * 2
  assert page.js(script % json.dumps(''.join(parts))) == [
    {'a': 'é🙂'}, 'The server failed: it broke.']
  assert page.js(script % json.dumps(parts[0]))[1].startswith('The connection ended')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_phone(tab, server, scheme):
  tab.errors.clear()
  tab.open(server.url, 360, 740, scheme, touch=True)
  tab.wait(f'document.getElementById("model").textContent === "{NAME}"')
  brightness = tab.js('getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]')
  assert (int(brightness) > 128) == (scheme == 'light')
  assert not tab.js('document.getElementById("settings").checkVisibility()')
  tab.tap('#settings-button')
  assert tab.js('document.getElementById("settings").checkVisibility()')
  assert tab.js('document.getElementById("settings").scrollWidth') <= 360
  set_fields(tab, seed=5, max_tokens=60)
  tab.tap('#settings-close')
  assert not tab.js('document.getElementById("settings").checkVisibility()')
  tab.type('#input', 'Hello')
  tab.tap('#send')
  tab.wait(f'{IDLE} && {FIGURES}.includes("ended")')
  assert tab.js('document.documentElement.scrollWidth') == 360
  # At the left, at the right, and last.
  places = tab.js(f'[...{ANSWER}.querySelectorAll(".token")].map('
                  'e => e.getBoundingClientRect().right)')
  for index in (0, places.index(max(places)), len(places) - 1):
    tab.js(f'{ANSWER}.querySelectorAll(".token")[{index}].id = "at{index}"')
    tab.tap(f'#at{index}')
    box = tab.js('document.getElementById("detail").getBoundingClientRect().toJSON()')
    assert 0 <= box['left'] and box['right'] <= 360 and 0 <= box['top'] and box['bottom'] <= 740
    assert box['width'] > 100
  assert tab.errors == []


def test_a_model_without_template_only_completes(tab):
  model, engine = shared()
  plain = tokenizers.train_or_load(TokenizerConfig(kind='bytes'), [])
  with running(dataclasses.replace(model, tokenizer=plain), engine) as server:
    tab.open(server.url)
    tab.wait(f'document.getElementById("model").textContent === "{NAME}"')
    assert not tab.js('document.getElementById("modes").checkVisibility()')
    set_fields(tab, seed=1, max_tokens=10)
    ask(tab, 'ab')
    want = server.complete(prompt='ab', temperature=1.0, seed=1, max_tokens=10).json()
    assert tab.js(f'{ANSWER}.textContent') == 'ab' + want['choices'][0]['text']


def test_an_api_key_is_asked_for_and_kept_in_the_tab(tab):
  with running(*shared(), keys=[KEY]) as server:
    basic = base64.b64encode(f'x:{KEY}'.encode()).decode()
    tab.call('Network.setExtraHTTPHeaders', headers={'Authorization': f'Basic {basic}'})
    tab.open(server.url)
    tab.wait(f'document.getElementById("model").textContent === "{NAME}"')
    tab.call('Network.setExtraHTTPHeaders', headers={})
    for key, said in (('', 'The server wants an API key.'), ('wrong-key', 'does not accept'),
                      ('schlüssel', 'a character that no key has')):
      tab.js(f'document.getElementById("key").value = "{key}";'
             'document.getElementById("key").dispatchEvent(new Event("change"))')
      tab.wait(f'{ERROR}.includes("{said}")')
    tab.js(f'document.getElementById("key").value = "{KEY}";'
           'document.getElementById("key").dispatchEvent(new Event("change"))')
    tab.wait(f'document.getElementById("model").textContent === "{NAME}"')
    assert tab.js('document.getElementById("error").hidden')
    assert tab.js('Object.values(sessionStorage)') == [KEY]
    assert tab.js('[localStorage.length, document.cookie, location.href]') == [
      0, '', f'{server.url}/']
    set_fields(tab, max_tokens=5, seed=1)
    ask(tab, 'Hello')
    tab.js('sessionStorage.clear()')
