// What tests/test_sdks.py asks of OpenAI's JavaScript SDK. Prints one JSON object.
import { File } from "node:buffer";
import OpenAI, { APIError, toFile } from "openai";

globalThis.File ??= File; // Node.js 18 has it, but not as a global

const [baseURL, apiKey, model, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey });
const asked = { model, prompt, n: 2, size: "64x64", seed: 7, num_inference_steps: 4 };

async function failing(call) {
  try {
    await call();
  } catch (error) {
    if (!(error instanceof APIError)) throw error;
    const { status, message, type, param, code, requestID } = error;
    return { name: error.constructor.name, status, message, type, param: param ?? null, code: code ?? null, requestID };
  }
  throw new Error("nothing was raised");
}

const models = [];
for await (const one of client.models.list()) models.push(one.id);

const { data: drawn, response, request_id } = await client.images
  .generate({ ...asked, quality: "hd", user: "somebody" })
  .withResponse();

const events = [];
for await (const event of await client.images.generate({ ...asked, n: 1, stream: true, partial_images: 2 })) {
  events.push(event);
}

const side = Array.from({ length: 6 }, (_, i) => client.images.generate({ ...asked, n: 1, seed: 20 + i }));
const crowd = (await Promise.all(side)).map((one) => one.data[0]);

const png = await toFile(Buffer.from(drawn.data[0].b64_json, "base64"), "drawn.png", { type: "image/png" });

const begun = { ...asked, image: png, strength: 0.5 };
const edits = [await client.images.edit(begun)];
for await (const event of await client.images.edit({ ...begun, n: 1, stream: true, partial_images: 1 })) {
  edits.push(event);
}

const output = {
  models,
  retrieved: (await client.models.retrieve(models[0])).id,
  drawn,
  request_id,
  ignored: response.headers.get("x-ignored-fields"),
  events,
  crowd,
  refused: await failing(() => client.images.generate({ ...asked, num_inference_steps: 100_000 })),
  unknown: await failing(() => client.models.retrieve("no-such-model")),
  edits,
  several: await failing(() => client.images.edit({ ...begun, image: [png, png] })),
};
console.log(JSON.stringify(output));
