// The page: reads what is typed, calls the server, and shows what came back.

import { byId, counted, element, refusalText } from './dom.js';
import { EXAMPLES } from './examples.js';
import { Server } from './server.js';
import { wordsOf } from './vectors.js';
import {
  cellPlace, cellText, layerButtons, legend, mapView, modelFacts, nearestView, pairsView, tokensView,
} from './views.js';

const MAX_SENTENCES = 50;
const FIRST_LAYER = '1'; // knows most about meaning in context

const server = new Server(() => byId('token').value.trim());
const state = {
  models: [],
  sentences: [], // of the latest response
  words: [], // of them, in the chosen layer
  layer: FIRST_LAYER,
  chosen: null, // one of the words
  running: null, // AbortController of the call that is under way
};

// ---- calls ----

/** Embed the text that is typed; a call that is under way ends. */
async function embed(wanted = '') {
  state.running?.abort();
  const running = new AbortController();
  state.running = running;
  report('', '');
  byId('results').setAttribute('aria-busy', 'true');
  try {
    await loadModels();
    const { texts, cut } = typedSentences();
    if (!texts.length) return report('There is no sentence: type one.', '');
    report('', 'Waiting for the server…');
    const begun = performance.now();
    const found = await server.embed(byId('model').value, texts, running.signal);
    if (state.running !== running) return undefined;
    take(found.sentences, wanted);
    report('', `${answered(found, performance.now() - begun)}${cut}`);
  } catch (error) {
    if (state.running === running) failed(error);
  } finally {
    if (state.running === running) byId('results').removeAttribute('aria-busy');
  }
  return undefined;
}

/** Ask for the models, unless they are known. */
async function loadModels() {
  if (state.models.length) return;
  state.models = await server.models();
  const options = state.models.map(({ id }) => element('option', { value: id }, id));
  byId('model').replaceChildren(...options);
  byId('model-choice').hidden = options.length < 2;
  showModel();
}

function showModel() {
  const model = state.models.find(({ id }) => id === byId('model').value);
  byId('facts').replaceChildren(...(model ? modelFacts(model) : []));
  byId('about').hidden = !model;
}

/** Return the lines that have more than white space, as many as may be sent, and a sentence about those that may not. */
function typedSentences() {
  const lines = byId('text').value.split('\n').map((line) => line.trim()).filter(Boolean);
  const model = state.models.find(({ id }) => id === byId('model').value);
  const limit = Math.min(MAX_SENTENCES, model?.limits?.max_sentences_per_request ?? MAX_SENTENCES);
  const texts = lines.slice(0, limit);
  return { texts, cut: lines.length > limit ? ` Only the first ${limit} of ${lines.length} sentences were sent.` : '' };
}

/** Return who answered, and how fast, in words. */
function answered({ sentences, usage }, elapsedMs) {
  const failures = sentences.filter(({ error }) => error).length;
  const ms = (seconds) => `${(seconds * 1000).toFixed(1)} ms`;
  return [
    `${counted(sentences.length, 'sentence')}, ${counted(usage.tokens, 'token')}`,
    failures ? `, ${failures} refused` : '',
    `. Computed in ${ms(usage.inference_seconds)}, queued for ${ms(usage.queue_seconds)},`,
    ` response after ${elapsedMs.toFixed(0)} ms. Model ${byId('model').value}, version ${usage.model_version}.`,
  ].join('');
}

function failed(error) {
  const hints = {
    UNAUTHENTICATED: ' Enter a token under "Access token".',
    MODEL_NOT_FOUND: ' The list of models is read again with the next call.',
  };
  const again = error.retryMs ? ` It may be tried again in ${(error.retryMs / 1000).toFixed(1)} s.` : '';
  const before = state.sentences.length ? ' What is shown is the response before.' : '';
  report(`${refusalText(error.message, error.code)}${hints[error.code] ?? ''}${again}${before}`, '');
  if (error.code === 'UNAUTHENTICATED') byId('access').open = true;
  if (error.code === 'MODEL_NOT_FOUND') state.models = [];
  if (error.code === 'MODEL_LOADING') retryAfter(error.retryMs || 1000);
}

/** Embed again when the model may have been loaded, unless another call comes before. */
function retryAfter(delayMs) {
  const before = state.running;
  setTimeout(() => {
    if (state.running === before) embed();
  }, delayMs);
}

/** Show a problem, or what has happened; screen readers read either. */
function report(problem, status) {
  byId('problem').textContent = problem;
  byId('status').textContent = status;
}

// ---- views ----

/** Show a response; choose the wanted word, or the one that was chosen before, if it is still there. */
function take(sentences, wanted) {
  state.sentences = sentences;
  byId('results').hidden = false;
  const layerCount = sentences.find(({ shape }) => shape)?.shape[0];
  if (layerCount) showLayers(layerCount);
  const before = state.chosen;
  state.words = wordsOf(sentences, state.layer);
  state.chosen = state.words.find(({ token }) => token === wanted)
    ?? state.words.find((each) => before && each.sentence === before.sentence && each.token === before.token)
    ?? state.words[0] ?? null;
  byId('tokens').replaceChildren(...tokensView(sentences, state.chosen));
  showPairChoice();
  showWords();
}

function showLayers(layerCount) {
  if (Number(state.layer) >= layerCount) state.layer = String(layerCount - 1);
  const fieldset = byId('layers');
  fieldset.replaceChildren(fieldset.querySelector('legend'), ...layerButtons(layerCount, state.layer));
  fieldset.hidden = false;
}

/** Offer the sentences that have tokens; the choice stays where it can. */
function showPairChoice() {
  const places = state.sentences.flatMap(({ tokens }, place) => (tokens?.length ? [String(place)] : []));
  for (const [number, id] of ['first', 'second'].entries()) {
    const select = byId(id);
    select.replaceChildren(...places.map((place) => element('option', { value: place }, String(Number(place) + 1))));
    select.value = places[number] ?? '';
  }
  byId('pair-choice').hidden = places.length < 2;
  showPairs();
}

function showPairs() {
  const [first, second] = ['first', 'second'].map((id) => state.sentences[byId(id).value]);
  byId('pairs').replaceChildren(...pairsView(first, second));
}

function showWords() {
  byId('nearest').replaceChildren(...nearestView(state.sentences, state.words, state.chosen));
  byId('map').replaceChildren(...mapView(state.words, state.chosen));
  byId('cell').textContent = '';
}

/** Choose a word by its place; the views of it follow. */
function choose(sentence, index) {
  state.chosen = state.words.find((each) => each.sentence === sentence && each.index === index) ?? null;
  byId('nearest').replaceChildren(...nearestView(state.sentences, state.words, state.chosen));
  byId('map').querySelectorAll('tbody tr').forEach((row, at) => {
    row.classList.toggle('chosen', state.words[at] === state.chosen);
  });
}

function chooseLayer(layer) {
  state.layer = layer;
  const { sentence, index } = state.chosen ?? {};
  state.words = wordsOf(state.sentences, layer);
  state.chosen = state.words.find((each) => each.sentence === sentence && each.index === index) ?? null;
  showWords();
}

// ---- events ----

function listen() {
  byId('form').addEventListener('submit', (event) => {
    event.preventDefault();
    embed();
  });
  byId('text').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      embed();
    }
  });
  byId('model').addEventListener('change', () => {
    showModel();
    embed();
  });
  byId('layers').addEventListener('change', (event) => chooseLayer(event.target.value));
  byId('tokens').addEventListener('change', (event) => choose(...event.target.value.split(':').map(Number)));
  for (const id of ['first', 'second']) byId(id).addEventListener('change', showPairs);
  listenToMap();
}

function listenToMap() {
  const map = byId('map');
  map.addEventListener('pointerover', (event) => {
    byId('cell').textContent = cellText(event.target, state.words);
  });
  map.addEventListener('click', (event) => {
    const place = cellPlace(event.target);
    if (!place) return;
    const { sentence, index } = state.words[place[0]];
    choose(sentence, index);
    const chip = document.querySelector(`input[name="word"][value="${sentence}:${index}"]`);
    if (chip) chip.checked = true;
  });
}

function showExample({ text, word }) {
  byId('text').value = text.join('\n');
  embed(word);
}

function start() {
  for (const example of EXAMPLES) {
    const button = element('button', { type: 'button' }, example.label);
    button.addEventListener('click', () => showExample(example));
    document.querySelector('.examples').append(button);
  }
  byId('legend').append(...legend());
  listen();
  showExample(EXAMPLES[0]);
}

start();
