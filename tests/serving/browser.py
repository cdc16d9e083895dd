"""Headless Chromium, driven through its debugging pipe."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
import time

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
                None)
_FLAGS = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
          '--no-first-run', '--disable-background-networking', '--disable-extensions',
          '--remote-debugging-pipe', '--hide-scrollbars']


class Page:
  """One tab. What the page logs as errors, exceptions included, is in `errors`."""

  def __init__(self, write, read):
    self._write, self._read, self._buffer = write, read, b''
    self._numbers, self._session = itertools.count(1), None
    self.errors = []
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log', 'Network'):
      self.call(f'{domain}.enable')

  def call(self, method, **parameters):
    """Return the result of a command of the protocol."""
    number = next(self._numbers)
    message = {'id': number, 'method': method, 'params': parameters}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._message()
      if answer.get('id') == number:
        assert 'error' not in answer, (method, answer)
        return answer['result']

  def _message(self):
    while b'\0' not in self._buffer:
      part = os.read(self._read, 1 << 20)
      assert part, 'the browser went away'
      self._buffer += part
    text, _, self._buffer = self._buffer.partition(b'\0')
    message = json.loads(text)
    if message.get('method') == 'Runtime.exceptionThrown':
      self.errors.append(message['params']['exceptionDetails'].get('exception', {}).get(
        'description', message['params']['exceptionDetails']['text']))
    if message.get('method') == 'Log.entryAdded' and message['params']['entry']['level'] == 'error':
      entry = message['params']['entry']
      self.errors.append(f'{entry["text"]} {entry.get("url", "")}')
    return message

  def js(self, expression):
    """Return the value of an expression, awaited."""
    result = self.call('Runtime.evaluate', expression=expression, awaitPromise=True,
                       returnByValue=True, userGesture=True)
    assert 'exceptionDetails' not in result, result
    return result['result'].get('value')

  def wait(self, condition, seconds=20):
    """Wait until an expression is true."""
    end = time.monotonic() + seconds
    while not self.js(f'Boolean({condition})'):
      assert time.monotonic() < end, f'{condition}: {self.js("document.body.innerText")}'
      time.sleep(0.03)

  def open(self, url, width=1280, height=800, scheme='light', touch=False):
    """Load a page in a window of a size."""
    self.call('Emulation.setDeviceMetricsOverride', width=width, height=height,
              deviceScaleFactor=1, mobile=touch)
    self.call('Emulation.setTouchEmulationEnabled', enabled=touch)
    self.call('Emulation.setEmulatedMedia', features=[
      {'name': 'prefers-color-scheme', 'value': scheme}])
    self.call('Page.navigate', url=url)
    self.wait('document.readyState === "complete" && location.href !== "about:blank"')

  def type(self, selector, text):
    """Put a text into a field as a hand does."""
    self.js(f'document.querySelector({json.dumps(selector)}).focus()')
    self.js(f'document.querySelector({json.dumps(selector)}).select()')
    if text:
      self.call('Input.insertText', text=text)
    else:
      self.press('Delete')

  def press(self, key, code=0, text='', modifiers=0):
    """Press a key."""
    keys = {'Enter': (13, '\r'), 'Tab': (9, ''), 'Escape': (27, ''), 'ArrowRight': (39, ''),
            'ArrowLeft': (37, ''), 'End': (35, ''), 'Home': (36, ''), 'Delete': (46, ''),
            ' ': (32, ' ')}
    code, text = keys.get(key, (code, text))
    for kind in ('keyDown', 'keyUp'):
      self.call('Input.dispatchKeyEvent', type=kind, key=key, windowsVirtualKeyCode=code,
                modifiers=modifiers, **({'text': text} if text and kind == 'keyDown' else {}))

  def place(self, selector):
    """Return the middle of an element's first line, brought into view."""
    return self.js(
      f'(() => {{ const found = document.querySelector({json.dumps(selector)});'
      'found.scrollIntoViewIfNeeded(); const [r] = found.getClientRects();'
      'return [r.left + r.width / 2, r.top + r.height / 2] })()')

  def click(self, selector):
    """Click an element where it is on the screen."""
    x, y = self.place(selector)
    for kind in ('mousePressed', 'mouseReleased'):
      self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

  def hover(self, selector):
    """Move the mouse over an element."""
    x, y = self.place(selector)
    self.call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

  def tap(self, selector):
    """Tap an element with a finger."""
    x, y = self.place(selector)
    self.call('Input.dispatchTouchEvent', type='touchStart', touchPoints=[{'x': x, 'y': y}])
    self.call('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])

  def screenshot(self, path):
    """Write what is seen as PNG."""
    data = self.call('Page.captureScreenshot', format='png')['data']
    with open(path, 'wb') as file:
      file.write(base64.b64decode(data))


@contextlib.contextmanager
def chromium():
  """Give a tab of a fresh browser, which ends with the context."""
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    log = os.path.join(profile, 'log')
    pid = os.posix_spawn(
      CHROMIUM, [CHROMIUM, *_FLAGS, f'--user-data-dir={profile}/profile'], os.environ,
      file_actions=[
        (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
        # Above the two that the browser wants, so that neither overwrites the other.
        (os.POSIX_SPAWN_DUP2, to_read, 100), (os.POSIX_SPAWN_DUP2, from_write, 101),
        (os.POSIX_SPAWN_DUP2, 100, 3), (os.POSIX_SPAWN_DUP2, 101, 4),
      ], setpgroup=0)
    os.close(to_read)
    os.close(from_write)
    try:
      yield Page(to_write, from_read)
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)
      os.waitpid(pid, 0)
      os.close(to_write)
      os.close(from_read)
