// Calls a server from a browser by gRPC-Web, with nothing but the descriptor set; sends what came back to the page's
// own server as JSON. Bundled by esbuild.
import { createFileRegistry, fromBinary } from '@bufbuild/protobuf';
import { FileDescriptorSetSchema } from '@bufbuild/protobuf/wkt';
import { createClient } from '@connectrpc/connect';
import { createGrpcWebTransport } from '@connectrpc/connect-web';

const floats = (tensor) => Array.from(new Float32Array(tensor.data.slice().buffer));

async function run(baseUrl) {
  const bytes = new Uint8Array(await (await fetch('embed.binpb')).arrayBuffer());
  const service = createFileRegistry(fromBinary(FileDescriptorSetSchema, bytes)).getService('bilm_api.v1.EmbedService');
  const client = createClient(service, createGrpcWebTransport({ baseUrl, useBinaryFormat: true }));
  const sentence = { input: { case: 'tokens', value: { tokens: ['héllo', 'wörld'] } } };
  const reply = await client.embed({ options: { layers: 2 }, sentences: [sentence] });
  const { tensor, tokens } = reply.results[0].outcome.value;
  const refused = await client.embed({ model: 'other' }).catch((error) => error);
  return { tokens, shape: tensor.shape.map(Number), vectors: floats(tensor), code: refused.code, said: refused.rawMessage };
}

const tell = (found) => fetch('found', { method: 'POST', body: JSON.stringify(found) });
run(new URLSearchParams(location.search).get('target')).then(tell, (error) => tell({ failed: String(error) }));
