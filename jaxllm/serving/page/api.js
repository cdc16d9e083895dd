// What the page asks of the server: JSON answers, streams, and errors as sentences.

let key = sessionStorage.getItem('jaxllm-key') ?? '';

export class Refusal extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

export function setKey(value) {
  key = value.trim();
  if (key) sessionStorage.setItem('jaxllm-key', key);
  else sessionStorage.removeItem('jaxllm-key');
}

export function currentKey() {
  return key;
}

/** Return the answer to a GET as an object. */
export async function get(path) {
  const response = await send(path, {});
  return response.json();
}

/** Yield the parts of a streamed answer. */
export async function* stream(path, body, signal) {
  const response = await send(path, {
    method: 'POST', signal, body: JSON.stringify({ ...body, stream: true }),
    headers: { 'content-type': 'application/json' },
  });
  for await (const data of events(response.body)) {
    if (data === '[DONE]') return;
    const part = JSON.parse(data);
    if (part.error) throw new Refusal(sentence(500, part.error), part.error.code);
    yield part;
  }
  throw new Refusal('The connection ended before the answer was complete. Try again.');
}

async function send(path, options) {
  const headers = { ...options.headers };
  if (key) {
    // A header holds Latin letters at most; such a key is wrong in any case.
    if (!/^[!-~]+$/.test(key)) {
      throw new Refusal('The API key holds a character that no key has. Enter it again in the settings.', 'invalid_api_key');
    }
    headers.authorization = `Bearer ${key}`;
  }
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refusal('The server cannot be reached. Check that it is running, then try again.');
  }
  if (response.ok) return response;
  const content = await response.json().catch(() => ({}));
  throw new Refusal(sentence(response.status, content.error ?? {}), content.error?.code);
}

/** Yield the data of server-sent events, however the bytes are cut. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        if (error.name === 'AbortError') throw error;
        throw new Refusal('The connection broke before the answer was complete. Try again.');
      });
      if (done) return;
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      for (const line of lines) if (line.startsWith('data:')) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function sentence(status, { message = '', code }) {
  const said = message && message.replace(/[.\s]*$/, '.');
  if (status === 401) {
    return key ? 'The server does not accept this API key. Correct it in the settings.'
      : 'The server wants an API key. Enter it in the settings.';
  }
  if (code === 'context_length_exceeded') {
    return `The text is too long for the model: ${said} Shorten it, or lower “Max tokens”.`;
  }
  if (status === 429) return `The server is busy: ${said || 'too many requests.'} Try again in a moment.`;
  if (status === 503) return `The server cannot answer now: ${said || 'it is starting or stopping.'}`;
  if (status >= 500) return `The server failed: ${said || 'it gave no reason.'}`;
  return `The server refused the request: ${said || `it answered ${status}.`}`;
}
