// Which words of two sentences stand for one another: the fewest changes that make one sentence of the other.

/**
 * Align two lists of tokens.
 * @returns {[number|null, number|null][]} pairs of indices in order; null: the other sentence has no such word.
 */
export function align(first, second) {
  const costs = changeCosts(first, second);
  const pairs = [];
  let [i, j] = [first.length, second.length];
  while (i > 0 || j > 0) {
    const cost = costs[i][j];
    if (i > 0 && j > 0 && cost === costs[i - 1][j - 1] + changed(first[i - 1], second[j - 1])) {
      pairs.push([(i -= 1), (j -= 1)]);
    } else if (i > 0 && cost === costs[i - 1][j] + 1) {
      pairs.push([(i -= 1), null]);
    } else {
      pairs.push([null, (j -= 1)]);
    }
  }
  return pairs.reverse();
}

/** Return the least number of changes between every two beginnings (Wagner and Fischer, 1974). */
function changeCosts(first, second) {
  const costs = Array.from({ length: first.length + 1 }, (_, i) => [i]);
  for (let j = 1; j <= second.length; j += 1) costs[0][j] = j;
  for (let i = 1; i <= first.length; i += 1) {
    for (let j = 1; j <= second.length; j += 1) {
      const swapped = costs[i - 1][j - 1] + changed(first[i - 1], second[j - 1]);
      costs[i][j] = Math.min(swapped, costs[i - 1][j] + 1, costs[i][j - 1] + 1);
    }
  }
  return costs;
}

function changed(one, other) {
  return one === other ? 0 : 1;
}
