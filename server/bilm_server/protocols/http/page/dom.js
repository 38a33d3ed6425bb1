// Elements without markup in strings: whatever a text contains, it stays text.

/**
 * Return a new element.
 * @param {string} name of the element.
 * @param {Object<string, unknown>} attributes by name; true: without a value; false, null or undefined: left out.
 * @param {...(Node|string)} children of it.
 */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== false && value !== null && value !== undefined) {
      made.setAttribute(key, value === true ? '' : String(value));
    }
  }
  made.append(...children);
  return made;
}

/** Return a token or a text as an element that keeps its own direction. */
export function word(text, attributes = {}) {
  return element('bdi', attributes, text);
}

/** Return text that only screen readers have. */
export function spoken(text) {
  return element('span', { class: 'spoken' }, text);
}

/** Return the element of the page that has an id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Return why the server refuses something, as a sentence. */
export function refusalText(message, code) {
  return code ? `Refused (${code}): ${message}.` : message;
}

/** Return a number of things in words: the singular for 1. */
export function counted(count, one, many = `${one}s`) {
  return `${count.toLocaleString('en')} ${count === 1 ? one : many}`;
}
