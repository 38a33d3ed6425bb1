// What OpenAI's client for JavaScript gets of a server, as JSON on standard output. Read from standard input in the
// folder that has the package: node --input-type=module - URL KEY MODEL

import OpenAI from "openai";

const [url, key, model] = process.argv.slice(2);
const texts = ["The bank by the river was steep .", "Ünïcödé wörds", "a"];
const settings = { baseURL: url, maxRetries: 0, timeout: 60_000 };
const client = new OpenAI({ ...settings, apiKey: key });
const stranger = new OpenAI({ ...settings, apiKey: "a-key-of-nobody-here" });

const vectors = (response) => response.data.map((item) => item.embedding);
const create = (fields) => client.embeddings.create({ model, input: texts, ...fields });

const attempts = {
  empty: () => create({ input: ["a", ""] }),
  integers: () => create({ input: [[1, 2, 3]] }),
  model: () => create({ model: "another" }),
  dimensions: () => create({ dimensions: 3 }),
  key: () => stranger.embeddings.create({ model, input: "a" }),
};
const errors = {};
for (const [name, call] of Object.entries(attempts)) {
  try {
    await call();
  } catch (error) {
    errors[name] = [error.constructor.name, error.code, error.message];
  }
}

const byDefault = await create({});
const models = [];
for await (const each of client.models.list()) models.push(each.id);
console.log(
  JSON.stringify({
    default: vectors(byDefault),
    base64: vectors(await create({ encoding_format: "base64" })),
    float: vectors(await create({ encoding_format: "float" })),
    average: vectors(await create({ layers: "average", pooling: "max" })),
    tokens: byDefault.usage.prompt_tokens,
    models,
    model: (await client.models.retrieve(model)).id,
    errors,
  }),
);
