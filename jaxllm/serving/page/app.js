// The playground: modes, settings, one answer at a time.

import * as api from './api.js';
import { Answer, element, explain } from './tokens.js';

const $ = (id) => document.getElementById(id);
const WORDS = {
  chat: {
    lead: 'Ask something', hint: 'Hover over a word of the answer, or tap it, to see what else could have come.',
    label: 'Message', placeholder: 'Message', button: 'Send', clear: 'New chat',
  },
  completion: {
    lead: 'Write a beginning', hint: 'The model goes on. Hover over a word, or tap it, to see what else could have come.',
    label: 'Beginning', placeholder: 'Once upon a time', button: 'Continue', clear: 'Clear',
  },
};
const NUMBERS = ['temperature', 'top_p', 'min_p', 'repetition_penalty', 'top_k', 'max_tokens', 'seed'];
const MAX_STOPS = 4;

const state = { model: null, mode: 'chat', messages: [], running: null };

// Settings

for (const field of document.querySelectorAll('.slide')) {
  const [number, range] = field.querySelectorAll('input');
  range.value = number.value;
  number.addEventListener('input', () => { range.value = number.value; });
  range.addEventListener('input', () => { number.value = range.value; check(number); });
}

for (const name of NUMBERS) $(name).addEventListener('input', () => check($(name)));

/** Return whether a field holds what it may; say at the field what is wrong. */
function check(input) {
  const { valid } = input.validity;
  const field = input.closest('.field');
  field.querySelector('.bad')?.remove();
  if (!valid) field.append(element('small', 'bad', wrong(input)));
  input.classList.toggle('wrong', !valid);
  input.setAttribute('aria-invalid', String(!valid));
  return valid;
}

/** Return the fields of a request, or throw a sentence that says what is wrong. */
function settings() {
  const fields = {};
  for (const name of NUMBERS) {
    const input = $(name);
    if (!check(input)) {
      showSettings(true);
      input.focus();
      throw new api.Refusal(wrong(input));
    }
    if (input.value !== '') fields[name] = Number(input.value);
  }
  const stop = $('stops').value.split('\n').filter((line) => line !== '')
    .map((line) => line.replace(/\\([nt\\])/g, (_, letter) => ({ n: '\n', t: '\t' })[letter] ?? letter));
  if (stop.length > MAX_STOPS) {
    throw new api.Refusal(`There are ${stop.length} texts to stop at; the server takes up to ${MAX_STOPS}.`);
  }
  if (stop.length) fields.stop = stop;
  return fields;
}

function wrong(input) {
  const name = input.labels[0].textContent;
  const kind = input.step === '1' ? 'a whole number' : 'a number';
  if (!input.max) return `${name} must be ${kind} of at least ${input.min}.`;
  if (input.min === '0.000001') return `${name} must be ${kind} above 0, up to ${input.max}.`;
  return `${name} must be ${kind} from ${input.min} to ${input.max}.`;
}

function showSettings(shown) {
  $('settings').classList.toggle('open', shown);
  $('settings-button').setAttribute('aria-expanded', String(shown));
}

$('settings-button').addEventListener('click', () => {
  showSettings(true);
  $('settings-close').focus();
});
$('settings-close').addEventListener('click', closeSettings);
$('settings').addEventListener('keydown', (event) => {
  if (event.key === 'Escape') closeSettings();
});

function closeSettings() {
  showSettings(false);
  $('settings-button').focus();
}

$('controls').addEventListener('submit', (event) => event.preventDefault());
$('shade').addEventListener('change', shade);

function shade() {
  $('log').classList.toggle('shaded', $('shade').checked);
  $('legend').hidden = !$('shade').checked;
}

$('key').value = api.currentKey();
$('key').addEventListener('change', () => {
  api.setKey($('key').value);
  connect();
});

// Modes

for (const radio of document.querySelectorAll('[name="mode"]')) {
  radio.addEventListener('change', () => setMode(radio.value));
}

function setMode(mode) {
  state.mode = mode;
  const words = WORDS[mode];
  document.querySelector(`[name="mode"][value="${mode}"]`).checked = true;
  document.body.classList.toggle('completion', mode === 'completion');
  document.querySelector('.lead').textContent = words.lead;
  document.querySelector('.hint').textContent = words.hint;
  $('input-label').textContent = words.label;
  $('input').placeholder = words.placeholder;
  $('send').textContent = words.button;
  $('clear').textContent = words.clear;
  forget();
}

function forget() {
  state.messages = [];
  $('log').replaceChildren();
  $('figures').textContent = '';
  $('clear').hidden = true;
  tell(null);
}

$('clear').addEventListener('click', () => {
  forget();
  $('input').focus();
});

// What went wrong

function tell(error) {
  $('error').hidden = !error;
  $('error').querySelector('p').textContent = error ? error.message : '';
}

$('error').querySelector('button').addEventListener('click', () => tell(null));

/** Show an error; one that is none of ours is a fault of this page. */
function report(error) {
  if (error.code === 'invalid_api_key') $('key').classList.add('wrong');
  if (error.code === 'no_chat_template') hideChat();
  tell(error instanceof api.Refusal ? error
    : new Error(`The page failed: ${error.message}. Reload it, then try again.`));
}

// Connection

async function connect() {
  $('key').classList.remove('wrong');
  try {
    const { data: [model] } = await api.get('v1/models');
    const info = await api.get('tokenizer_info');
    state.model = model.id;
    $('model').textContent = model.id;
    $('model').title = model.id;
    if (info.model_max_length) {
      $('max_tokens').max = info.model_max_length - 1;
      if (Number($('max_tokens').value) >= info.model_max_length / 2) {
        $('max_tokens').value = Math.ceil(info.model_max_length / 2);
      }
    }
    if (info.chat_template === null) hideChat();
    tell(null);
  } catch (error) {
    $('model').textContent = 'not connected';
    report(error);
  }
}

function hideChat() {
  $('modes').hidden = true;
  if (state.mode === 'chat') setMode('completion');
}

// An answer

$('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  if (!state.running) ask();
});
$('stop').addEventListener('click', () => state.running?.abort());
$('input').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.isComposing) return;
  // In a chat Enter sends where there are real keys; otherwise it breaks the line.
  const sends = event.ctrlKey || event.metaKey
    || (state.mode === 'chat' && !event.shiftKey && matchMedia('(pointer: fine)').matches);
  if (sends) {
    event.preventDefault();
    $('composer').requestSubmit();
  }
});

if (!CSS.supports('field-sizing', 'content')) {
  $('input').addEventListener('input', () => {
    $('input').style.height = 'auto';
    $('input').style.height = `${$('input').scrollHeight}px`;
  });
}

async function ask() {
  const chat = state.mode === 'chat';
  const text = chat ? $('input').value.trim() : $('input').value;
  tell(null);
  if (!text) {
    $('input').focus();
    return;
  }
  let fields;
  try {
    fields = settings();
    if (!state.model) await connect();
    if (!state.model) return;
  } catch (error) {
    report(error);
    return;
  }
  if (chat) {
    state.messages.push({ role: 'user', content: text });
    $('log').append(element('div', 'turn user', element('p', '', text)));
    $('input').value = '';
  } else {
    $('log').replaceChildren();
  }
  const place = element('div', 'answer waiting');
  if (!chat) place.append(element('span', 'prompt', text));
  const turn = element('div', 'turn', place);
  $('log').append(turn);
  turn.scrollIntoView({ block: 'end' });
  await receive(new Answer(place), turn, request(fields, text), chat);
}

function request(fields, text) {
  const common = { ...fields, model: state.model, stream_options: { include_usage: true } };
  if (state.mode === 'completion') return { ...common, prompt: text, logprobs: 5 };
  const system = $('system').value.trim();
  const first = system ? [{ role: 'system', content: system }] : [];
  return { ...common, messages: [...first, ...state.messages], logprobs: true, top_logprobs: 5 };
}

async function receive(answer, turn, body, chat) {
  const clock = new Clock(answer);
  run(new AbortController());
  let reason = null;
  try {
    const parts = api.stream(chat ? 'v1/chat/completions' : 'v1/completions', body, state.running.signal);
    for await (const part of parts) {
      const [choice] = part.choices;
      if (choice) {
        const text = (chat ? choice.delta.content : choice.text) ?? '';
        const low = nearEnd();
        answer.add(text, choice.logprobs);
        if (text || answer.count) clock.tick();
        reason = choice.finish_reason ?? reason;
        if (low) turn.scrollIntoView({ block: 'end' });
      }
      $('figures').textContent = clock.figures();
    }
  } catch (error) {
    if (error.name === 'AbortError') reason = 'stopped by you';
    else report(error);
  }
  const low = nearEnd();
  answer.finish();
  run(null);
  answer.element.classList.remove('waiting');
  $('figures').textContent = clock.figures(reason);
  end(answer, turn, chat);
  if (low) turn.scrollIntoView({ block: 'end' });
}

/** Keep what came; where nothing did, give the message back. */
function end(answer, turn, chat) {
  if (chat && answer.text) {
    state.messages.push({ role: 'assistant', content: answer.text });
  } else if (!answer.count && !answer.text) {
    turn.remove();
    if (chat) {
      $('log').lastChild.remove();
      $('input').value = state.messages.pop().content;
    }
  } else if (!chat) {
    const more = element('button', 'quiet', 'Add to the beginning');
    more.type = 'button';
    more.addEventListener('click', () => {
      $('input').value += answer.text;
      $('input').focus();
      more.remove();
    });
    turn.append(element('div', 'below', more));
  }
  $('clear').hidden = !$('log').hasChildNodes();
}

function run(controller) {
  state.running = controller;
  $('send').hidden = Boolean(controller);
  $('stop').hidden = !controller;
  $('log').setAttribute('aria-busy', String(Boolean(controller)));
  for (const radio of document.querySelectorAll('[name="mode"]')) radio.disabled = Boolean(controller);
  $('clear').disabled = Boolean(controller);
  // The focus stays where the hand was.
  if (controller && document.activeElement === document.body) $('stop').focus();
  else if (!controller && document.activeElement === document.body) $('input').focus();
}

function nearEnd() {
  const log = $('log');
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

/** Times of one answer. */
class Clock {
  constructor(answer) {
    this.answer = answer;
    this.begun = performance.now();
    this.first = this.last = null;
  }

  tick() {
    this.last = performance.now();
    if (this.first === null) {
      this.first = this.last;
      this.before = this.answer.count;
    }
  }

  figures(reason) {
    const { count } = this.answer;
    const parts = [`${count} ${count === 1 ? 'token' : 'tokens'}`];
    if (this.first !== null) {
      if (this.last > this.first) {
        const speed = (count - this.before) / (this.last - this.first) * 1000;
        parts.push(`${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`);
      }
      parts.push(`first after ${((this.first - this.begun) / 1000).toFixed(2)} s`);
    }
    const reasons = { length: 'ended at max tokens', stop: 'ended by itself' };
    if (reason) parts.push(reasons[reason] ?? reason);
    return parts.join(' · ');
  }
}

explain($('log'));
shade();
setMode('chat');
connect();
