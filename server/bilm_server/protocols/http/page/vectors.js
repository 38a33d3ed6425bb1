// The arithmetic: layers, cosines, neighbours. Shapes: L layers, T tokens, D width.

export const AVERAGE = 'average';

/** Return the layers that a model offers, with labels. */
export function layerChoices(layerCount) {
  const names = new Map([[0, 'characters'], [layerCount - 1, 'top']]);
  const layers = Array.from({ length: layerCount }, (_, layer) => ({
    value: String(layer),
    label: names.has(layer) ? `${layer} (${names.get(layer)})` : String(layer),
  }));
  return [...layers, { value: AVERAGE, label: 'average' }];
}

/**
 * Return the words of all sentences, in their order.
 * @param {object[]} sentences as `Server.embed` returns them.
 * @param {string} layer its number, or AVERAGE.
 * @returns {{sentence: number, index: number, token: string, unit: Float32Array}[]} `unit` is the vector, scaled to
 *   length 1; a vector of zeros stays.
 */
export function wordsOf(sentences, layer) {
  return sentences.flatMap((each, sentence) =>
    (each.tokens ?? []).map((token, index) => ({ sentence, index, token, unit: unitVector(each, layer, index) })));
}

/** Return one token's vector [D], scaled to length 1. */
export function unitVector({ shape, vectors }, layer, index) {
  const [L, T, D] = shape;
  const sum = new Float32Array(D);
  const layers = layer === AVERAGE ? Array.from({ length: L }, (_, each) => each) : [Number(layer)];
  for (const each of layers) {
    const start = (each * T + index) * D;
    for (let d = 0; d < D; d += 1) sum[d] += vectors[start + d];
  }
  const length = Math.sqrt(dot(sum, sum)) || 1;
  return sum.map((value) => value / length);
}

/** Return the cosine of two vectors of length 1. */
export function cosine(one, other) {
  return Math.max(-1, Math.min(1, dot(one, other)));
}

function dot(one, other) {
  let sum = 0;
  for (let d = 0; d < one.length; d += 1) sum += one[d] * other[d];
  return sum;
}

/** Return the words of other sentences that are nearest to a word, with their cosines, nearest first. */
export function nearest(words, chosen, count) {
  return words
    .filter((each) => each.sentence !== chosen.sentence)
    .map((each) => ({ word: each, cosine: cosine(chosen.unit, each.unit) }))
    .sort((one, other) => other.cosine - one.cosine)
    .slice(0, count);
}

/** Return whether two words are the same but for upper and lower case. */
export function isSame(one, other) {
  return one.token.toLowerCase() === other.token.toLowerCase();
}
