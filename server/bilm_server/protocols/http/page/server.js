// The two calls that the page makes: /v1/models and /v1/embed. Paths are relative, so that a proxy may add a prefix.

/** Why a call has no result, in the server's words where it has any. */
export class CallError extends Error {
  /**
   * @param {string} message in words.
   * @param {string} code the server's reason; '' without one.
   * @param {number} retryMs when to try again; 0: no time is known.
   */
  constructor(message, code = '', retryMs = 0) {
    super(message);
    this.code = code;
    this.retryMs = retryMs;
  }
}

/** The server that the page came from. */
export class Server {
  /** @param {() => string} readToken returns the token of a call, '' for none. */
  constructor(readToken) {
    this.readToken = readToken;
  }

  /** Return the models' descriptions. */
  async models() {
    const response = await this.call('v1/models', {});
    return (await response.json()).data;
  }

  /**
   * Return the vectors of texts in all layers.
   * @param {string} model its name.
   * @param {string[]} texts each a sentence.
   * @param {AbortSignal} signal ends the call.
   * @returns {Promise<{sentences: object[], usage: object}>} one sentence for each text: `text`, and either `error` or
   *   `tokens` and `vectors`, Float32Array of [layers, tokens, width], with `shape`.
   */
  async embed(model, texts, signal) {
    const body = JSON.stringify({ model, options: { layers: 'all' }, sentences: texts.map((text) => ({ text })) });
    const headers = { 'content-type': 'application/json', accept: 'application/octet-stream' };
    const response = await this.call('v1/embed', { method: 'POST', body, headers, signal });
    return parse(await response.arrayBuffer(), texts);
  }

  async call(path, options) {
    const token = this.readToken();
    const headers = { ...options.headers, ...(token ? { authorization: `Bearer ${token}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: 'no-store', credentials: 'omit' });
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new CallError(`The server can't be reached (${error.message}).`);
    }
    if (!response.ok) throw await refusal(response);
    return response;
  }
}

async function refusal(response) {
  const retryMs = Number(response.headers.get('retry-after-ms')) || 0;
  const found = await response.json().catch(() => null);
  if (!found?.error) return new CallError(`The server answered with status ${response.status}.`, '', retryMs);
  return new CallError(found.error.message, found.error.code, retryMs);
}

/** Read a response of raw tensors: the header's length, the header, the tensors. */
function parse(buffer, texts) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const sentences = header.results.map(({ embedding, error }, index) => {
    if (error) return { text: texts[index], error };
    const { shape, offset, length: bytes } = embedding.tensor;
    const vectors = new Float32Array(buffer, 4 + length + offset, bytes / Float32Array.BYTES_PER_ELEMENT);
    return { text: texts[index], tokens: embedding.tokens, truncated: embedding.truncated, shape, vectors };
  });
  return { sentences, usage: header.usage };
}
