// What the page shows of a response: tokens, neighbours, two sentences side by side, the map.

import { align } from './alignment.js';
import { counted, element, refusalText, spoken, word } from './dom.js';
import { cosine, isSame, layerChoices, nearest, unitVector } from './vectors.js';

const MAX_TOKENS_SHOWN = 400;
const MAX_MAP_WORDS = 64;
const MAX_PAIR_TOKENS = 64;
const MAX_CARDS = 6;
const NEIGHBOURS = 5;
const REACH = 4; // words of a sentence that stand before and behind the one that is meant
const MAX_TEXT = 80; // characters of a text that is shown beside its error
const STEPS = 11; // of the colour scale; the first one is for what is below 0

/** Return the number of a word's colour. */
function step(value) {
  return value < 0 ? 0 : Math.min(STEPS - 1, 1 + Math.floor(value * 10));
}

/** Return a cosine as a cell of the map has it: `.83`, `−.12`, `1`. */
function short(value) {
  return value.toFixed(2).replace(/^-0\.00$/, '0.00').replace('-', '−').replace('0.', '.').replace('1.00', '1');
}

function cosineCell(value, text = value.toFixed(2).replace('-', '−')) {
  return element('td', { class: `cosine s${step(value)}` }, text);
}

function note(text) {
  return element('p', { class: 'hint' }, text);
}

/** Return a region that scrolls by itself, by keyboard as well. */
function scrolling(labelledBy, child) {
  const attributes = { class: 'scroll', tabindex: 0, role: 'region', 'aria-labelledby': labelledBy };
  return element('div', attributes, child);
}

/** Return the radio buttons that choose a layer. */
export function layerButtons(layerCount, chosen) {
  return layerChoices(layerCount).map(({ value, label }) => {
    const input = element('input', { type: 'radio', name: 'layer', value, checked: value === chosen });
    return element('label', {}, input, element('span', {}, label));
  });
}

/** Return the facts of a model that the server gives, as terms and descriptions. */
export function modelFacts(model) {
  const facts = [
    ['Name', model.id],
    ['Version', model.version],
    ['Layers × width', model.layer_count && model.width && `${model.layer_count} × ${model.width}`],
    ['Parameters', model.parameter_count?.toLocaleString('en')],
    ['Tokenizer', model.tokenizer],
    ['Precision', model.precision],
    ['Computed by', model.backend],
    ['Server', model.server_version && `bilm-serve ${model.server_version}`],
  ];
  const known = facts.filter(([, fact]) => fact);
  return known.flatMap(([name, fact]) => [element('dt', {}, name), element('dd', {}, String(fact))]);
}

/** Return the sentences as their tokens, one of which can be chosen; a refused one with the server's reason. */
export function tokensView(sentences, chosen) {
  let left = MAX_TOKENS_SHOWN;
  const items = sentences.map((each, sentence) => {
    if (each.error) return element('li', {}, refused(each));
    if (!each.tokens.length) return element('li', {}, note('The server finds no token in this sentence.'));
    const shown = each.tokens.slice(0, left);
    left -= shown.length;
    const chips = shown.map((token, index) => chip(token, `${sentence}:${index}`, isAt(chosen, sentence, index)));
    const cut = each.truncated ? [note('The server cut this sentence or one of its tokens.')] : [];
    return element('li', {}, element('div', { class: 'chips', dir: 'auto' }, ...chips), ...cut);
  });
  const group = element('fieldset', { class: 'words' }, element('legend', { class: 'spoken' }, 'Word'));
  group.append(element('ol', {}, ...items));
  const count = sentences.reduce((sum, each) => sum + (each.tokens?.length ?? 0), 0);
  return count > MAX_TOKENS_SHOWN
    ? [group, note(`The first ${MAX_TOKENS_SHOWN} of ${counted(count, 'token')} are shown.`)]
    : [group];
}

function chip(token, value, checked) {
  return element('label', {}, element('input', { type: 'radio', name: 'word', value, checked }), word(token));
}

function refused({ text, error }) {
  const shown = [...text].length > MAX_TEXT ? `${[...text].slice(0, MAX_TEXT).join('')}…` : text;
  const reason = element('span', { class: 'problem' }, refusalText(error.message, error.code));
  return element('p', {}, word(shown, { class: 'refused' }), ' ', reason);
}

function isAt(chosen, sentence, index) {
  return chosen?.sentence === sentence && chosen.index === index;
}

/** Return a card for the chosen word, and for each other place where the same word stands. */
export function nearestView(sentences, words, chosen) {
  if (!chosen) return [note('No word is chosen.')];
  const elsewhere = words.filter((each) => each !== chosen && isSame(each, chosen));
  const shown = [chosen, ...elsewhere].slice(0, MAX_CARDS);
  const cards = element('div', { class: 'cards' }, ...shown.map((each) => card(sentences, words, each)));
  const rest = 1 + elsewhere.length - shown.length;
  return rest > 0 ? [cards, note(`The word stands at ${counted(rest, 'further place')}.`)] : [cards];
}

function card(sentences, words, chosen) {
  const caption = element('caption', {}, `${chosen.sentence + 1}. `, excerpt(sentences, chosen));
  const found = nearest(words, chosen, NEIGHBOURS);
  if (!found.length) return element('div', {}, element('table', {}, caption), note('There is no other sentence.'));
  const rows = found.map(({ word: other, cosine: value }) => {
    const place = element('td', {}, `${other.sentence + 1}. `, excerpt(sentences, other));
    return element('tr', {}, cosineCell(value), place);
  });
  const heads = ['Cosine', 'Word in its sentence'].map((name) => element('th', { scope: 'col' }, name));
  return element('table', {}, caption, element('thead', {}, element('tr', {}, ...heads)), element('tbody', {}, ...rows));
}

function excerpt(sentences, { sentence, index }) {
  const { tokens } = sentences[sentence];
  const [begin, end] = [Math.max(0, index - REACH), Math.min(tokens.length, index + REACH + 1)];
  const parts = begin > 0 ? ['…'] : [];
  for (let each = begin; each < end; each += 1) {
    parts.push(' ', each === index ? element('mark', {}, tokens[each]) : word(tokens[each]));
  }
  return element('span', { dir: 'auto' }, ...parts, ...(end < tokens.length ? ['\u00a0…'] : []));
}

/** Return two sentences, word for word, with the cosine of each pair in every layer. */
export function pairsView(first, second) {
  if (!first || !second) return [note('There are no two sentences.')];
  const [L] = first.shape;
  const choices = layerChoices(L);
  const heads = ['First', 'Second', ...choices.map(({ label }) => label)];
  const cut = Math.max(first.tokens.length, second.tokens.length) > MAX_PAIR_TOKENS;
  const [mine, others] = [first, second].map((each) => each.tokens.slice(0, MAX_PAIR_TOKENS));
  const rows = align(mine, others).map(([i, j]) => {
    const differ = i === null || j === null || mine[i] !== others[j];
    const cells = choices.map(({ value }) =>
      (i === null || j === null
        ? element('td', { class: 'cosine' }, '–')
        : cosineCell(cosine(unitVector(first, value, i), unitVector(second, value, j)))));
    return element('tr', { class: differ && 'differ' }, pairHead(mine, i), pairHead(others, j), ...cells);
  });
  const head = element('tr', {}, ...heads.map((name) => element('th', { scope: 'col' }, name)));
  const table = element('table', { class: 'pairs' }, element('thead', {}, head), element('tbody', {}, ...rows));
  const notes = cut ? [note(`The first ${MAX_PAIR_TOKENS} tokens of each are shown.`)] : [];
  const about = note('The cosine of the words of a line, in each layer. Words that differ are marked.');
  return [about, ...notes, scrolling('pairs-title', table)];
}

function pairHead(tokens, index) {
  return element('th', { scope: 'row' }, index === null ? '–' : word(tokens[index]));
}

/** Return the colours with the cosine at which each begins. */
export function legend() {
  const labels = Array.from({ length: STEPS - 1 }, (_, each) => (each === 0 ? '0' : `.${each}`));
  const colours = ['< 0', ...labels].map((label, each) => element('span', { class: `cosine s${each}` }, label));
  return [element('span', { class: 'name' }, 'Cosine from'), ...colours];
}

/** Return the cosine of every word with every other as a table; the words behind the first ones are left out. */
export function mapView(words, chosen) {
  if (!words.length) return [note('There are no words.')];
  const shown = words.slice(0, MAX_MAP_WORDS);
  const table = element('table', { class: 'map' }, element('caption', { class: 'spoken' }, 'Cosine of each two words'));
  table.append(element('thead', {}, sentenceHeads(shown), element('tr', {}, ...columnHeads(shown))));
  table.append(element('tbody', {}, ...shown.map((row, at) => mapRow(shown, row, at, chosen))));
  const notes = words.length > shown.length ? [note(`The first ${MAX_MAP_WORDS} of ${words.length} tokens are shown.`)] : [];
  return [...notes, scrolling('map-title', table)];
}

/** Return the heads of the columns that belong to one sentence each. */
function sentenceHeads(words) {
  const row = element('tr', {}, element('td', {}));
  for (const sentence of new Set(words.map((each) => each.sentence))) {
    const span = words.filter((each) => each.sentence === sentence).length;
    const number = element('span', {}, String(sentence + 1));
    row.append(element('th', { scope: 'colgroup', colspan: span, class: 'begins' }, spoken('Sentence '), number));
  }
  return row;
}

function columnHeads(words) {
  const heads = words.map((each, at) =>
    element('th', { scope: 'col', class: begins(words, at) && 'begins' }, element('span', {}, word(each.token))));
  return [element('td', {}), ...heads];
}

function mapRow(words, row, at, chosen) {
  const number = spoken(`, sentence ${row.sentence + 1}`);
  const cells = words.map((each, column) => {
    const cell = cosineCell(cosine(row.unit, each.unit), short(cosine(row.unit, each.unit)));
    if (begins(words, column)) cell.classList.add('begins');
    return cell;
  });
  const classes = [begins(words, at) && 'begins', row === chosen && 'chosen'].filter(Boolean).join(' ');
  return element('tr', { class: classes || null }, element('th', { scope: 'row' }, word(row.token), number), ...cells);
}

function begins(words, at) {
  return at === 0 || words[at].sentence !== words[at - 1].sentence;
}

/** Return what a cell of the map says, in words; '' for what is no such cell. */
export function cellText(cell, words) {
  const [row, column] = cellPlace(cell) ?? [];
  if (row === undefined) return '';
  const named = (each) => `${each.token} (sentence ${each.sentence + 1})`;
  return `${named(words[row])} and ${named(words[column])}: ${cosine(words[row].unit, words[column].unit).toFixed(2)}`;
}

/** Return the numbers of the two words that a cell of the map stands for; null for what is no such cell. */
export function cellPlace(cell) {
  if (!cell?.matches?.('.map tbody td')) return null;
  return [cell.parentElement.sectionRowIndex, cell.cellIndex - 1];
}
