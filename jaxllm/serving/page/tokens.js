// An answer on the page: its text token by token, and the alternatives of a token.

const SIGNS = { ' ': '␣', '\n': '⏎', '\t': '⇥', '\r': '␍' };
const detail = document.getElementById('detail');

/** Return an element with a class, text or children. */
export function element(name, className, ...content) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

/** Text that grows. Tokens become elements once their text is certain; what follows stays plain. */
export class Answer {
  constructor(parent) {
    this.element = parent;
    this.tail = document.createTextNode('');
    parent.append(this.tail);
    this.chars = [];
    this.shown = 0;
    this.waiting = [];
    this.end = 0;
    this.count = 0;
    this.latest = null;
    this.utf8 = new TextDecoder();
  }

  get text() {
    return this.chars.join('');
  }

  /** Take the next part of a stream: text, and the scores of tokens in either form of the API. */
  add(text, scores) {
    this.chars.push(...text);
    for (const token of scores?.content ? this.fromChat(scores.content) : this.fromText(scores)) {
      this.waiting.push(token);
      this.count += 1;
    }
    this.show(false);
  }

  /** Show what was held back. */
  finish() {
    if (this.latest) this.latest.end = this.chars.length;
    this.show(true);
  }

  fromChat(content) {
    return content.map(({ token, bytes, logprob, top_logprobs: top }) => {
      const piece = bytes ? this.utf8.decode(new Uint8Array(bytes), { stream: true }) : '';
      this.end += [...piece].length;
      const others = top.map((other) => [other.token, other.logprob]);
      if (!others.some(([name]) => name === token)) others.push([token, logprob]);
      return { token, logprob, others, end: this.end };
    });
  }

  fromText(scores) {
    return (scores?.tokens ?? []).map((token, i) => {
      // A token ends where the next one begins.
      if (this.latest) this.latest.end = scores.text_offset[i];
      this.latest = {
        token, logprob: scores.token_logprobs[i],
        others: Object.entries(scores.top_logprobs[i] ?? {}),
      };
      return this.latest;
    });
  }

  show(all) {
    let group = [];
    const certain = (token) => token.end !== undefined && (all || token.end <= this.chars.length);
    while (this.waiting.length > group.length && certain(this.waiting[group.length])) {
      const token = this.waiting[group.length];
      group.push(token);
      // A character may take several tokens: they are one element.
      const end = Math.min(token.end, this.chars.length);
      if (end > this.shown) {
        this.put(this.chars.slice(this.shown, end).join(''), group);
        this.waiting.splice(0, group.length);
        this.shown = end;
        group = [];
      }
    }
    if (all) {
      for (const token of this.waiting.splice(0)) this.put(visible(token.token), [token], 'special');
    }
    this.tail.data = this.chars.slice(this.shown).join('');
  }

  put(text, tokens, className = '') {
    const least = Math.min(...tokens.map((token) => token.logprob));
    const made = element('span', `token ${shade(least)} ${className}`.trim(), text);
    made.tabIndex = this.element.querySelector('.token') ? -1 : 0;
    made.tokens = tokens;
    this.tail.before(made);
  }
}

/** Show the alternatives of tokens inside `root`, by pointer, finger and keyboard. */
export function explain(root) {
  root.addEventListener('mouseover', (event) => open(event.target.closest('.token')));
  root.addEventListener('mouseleave', () => open(document.activeElement?.closest?.('.token')));
  root.addEventListener('focusin', (event) => open(event.target.closest('.token')));
  root.addEventListener('focusout', () => open(null));
  root.addEventListener('scroll', () => open(null));
  root.addEventListener('click', (event) => {
    const token = event.target.closest('.token');
    if (token && getSelection().isCollapsed) focus(token);
  });
  root.addEventListener('keydown', (event) => {
    const token = event.target.closest('.token');
    if (!token) return;
    const all = [...token.parentElement.querySelectorAll('.token')];
    const place = all.indexOf(token);
    const to = {
      ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1,
    }[event.key];
    if (event.key === 'Escape') token.blur();
    else if (to !== undefined) focus(all[Math.min(Math.max(to, 0), all.length - 1)]);
    else return;
    event.preventDefault();
  });
}

function focus(token) {
  for (const other of token.parentElement.querySelectorAll('.token[tabindex="0"]')) other.tabIndex = -1;
  token.tabIndex = 0;
  token.focus();
}

function open(token) {
  document.querySelector('.token.open')?.removeAttribute('aria-describedby');
  document.querySelector('.token.open')?.classList.remove('open');
  detail.hidden = !token;
  if (!token) return;
  token.classList.add('open');
  token.setAttribute('aria-describedby', 'detail');
  detail.replaceChildren(...token.tokens.map(table));
  // Of a token that is broken over lines the widest part.
  const [at] = [...token.getClientRects()].sort((one, other) => other.width - one.width);
  const [width, height, gap] = [detail.offsetWidth, detail.offsetHeight, 8];
  const above = at.top - height - gap;
  detail.style.left = `${Math.max(gap, Math.min(at.left, innerWidth - width - gap))}px`;
  detail.style.top = `${above >= gap ? above : Math.min(at.bottom + gap, innerHeight - height - gap)}px`;
}

function table({ token, others }) {
  const rows = [...others].sort((one, other) => other[1] - one[1]).map(([name, logprob]) => {
    const share = Math.exp(logprob);
    const bar = element('span');
    bar.style.width = percent(share).replace(/[< ]/g, '');
    return element('tr', name === token ? 'chosen' : '', element('th', '', visible(name)),
      element('td', '', element('span', 'bar', bar)), element('td', '', percent(share)));
  });
  return element('table', '', element('tbody', '', ...rows));
}

function percent(share) {
  if (share >= 0.9995) return '100 %';
  return share < 0.001 ? '< 0.1 %' : `${(100 * share).toFixed(1)} %`;
}

function visible(name) {
  return name.replace(/[ \n\t\r]/g, (char) => SIGNS[char]);
}

function shade(logprob) {
  const share = Math.exp(logprob);
  return `p${[0.05, 0.2, 0.5, 0.9].filter((least) => share >= least).length}`;
}
