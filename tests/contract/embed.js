// Calls a server with nothing but the .proto file; prints what came back as JSON.
const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');
const [target, ...includeDirs] = process.argv.slice(2);

const definition = loader.loadSync('bilm_api/v1/embed.proto', { includeDirs, enums: String, longs: Number, defaults: true });
const { EmbedService } = grpc.loadPackageDefinition(definition).bilm_api.v1;
const client = new EmbedService(target, grpc.credentials.createInsecure());
const options = { layers: 'LAYERS_TOP', pooling: 'POOLING_NONE', dataType: 'DATA_TYPE_FLOAT32' };
const floats = (tensor) => Array.from({ length: tensor.data.length / 4 }, (_, i) => tensor.data.readFloatLE(4 * i));

const unary = (method, request) =>
  new Promise((resolve, reject) => client[method](request, (error, reply) => (error ? reject(error) : resolve(reply))));

const stream = (messages) =>
  new Promise((resolve, reject) => {
    const call = client.EmbedStream();
    const replies = [];
    call.on('data', (reply) => replies.push(reply));
    call.on('error', reject);
    call.on('end', () => resolve(replies));
    messages.forEach((message) => call.write(message));
    call.end();
  });

(async () => {
  const sentence = { tokens: { tokens: ['héllo', 'wörld'] } };
  const model = await unary('GetModel', {});
  const reply = await unary('Embed', { options, sentences: [sentence, { tokens: { tokens: [''] } }] });
  const replies = await stream([{ start: { options } }, { item: { id: 7, sentence } }]);
  const refused = await unary('Embed', { options }).catch((error) => error.code);
  console.log(
    JSON.stringify({
      name: model.name,
      width: model.width,
      tokens: reply.results[0].embedding.tokens,
      shape: reply.results[0].embedding.tensor.shape,
      vectors: floats(reply.results[0].embedding.tensor),
      error: reply.results[1].error.code,
      streamed: floats(replies[0].rows.embedding.tensor),
      id: replies[0].id,
      refused,
    })
  );
  client.close();
})();
