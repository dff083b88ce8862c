// A clip from a running `nexus-rt serve`, watched as it is made; Node 18 or later, no packages.
//
//     node examples/serve/client.mjs "a red circle moves left on a black background" clip.mp4
//
// OPENAI_BASE_URL and OPENAI_API_KEY say where and who (default: this machine, no key).

import { writeFile } from "node:fs/promises";

const base = process.env.OPENAI_BASE_URL || "http://127.0.0.1:8000/v1";
const key = process.env.OPENAI_API_KEY;

async function call(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(base + path, { ...options, headers });
  if (response.ok) return response;
  const { error } = await response.json();
  throw new Error(`${response.status} ${error.code}: ${error.message}`);
}

// A job's server-sent events, one after another, until it ends.
async function* events(id) {
  const { body } = await call(`/videos/${id}/events`);
  let text = "";
  for await (const chunk of body.pipeThrough(new TextDecoderStream())) {
    const messages = (text + chunk).split("\n\n");
    text = messages.pop();
    for (const message of messages) {
      const [, kind] = /^event: (.*)$/m.exec(message) || [];
      if (kind) yield [kind, JSON.parse(/^data: (.*)$/m.exec(message)[1])];
    }
  }
}

const [prompt, path] = process.argv.slice(2);
const created = await call("/videos", {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({ prompt, seed: 7 }),
});
const { id } = await created.json();
for await (const [kind, event] of events(id)) {
  if (kind === "step") console.log(`step ${event.step} of ${event.steps}: ${event.runs}, ${event.ms_left ?? "?"} ms left`);
  if (kind === "failed") throw new Error(`${id}: ${event.error.code}: ${event.error.message}`);
}
const clip = await call(`/videos/${id}/content`);
await writeFile(path, Buffer.from(await clip.arrayBuffer()));
console.log(`${path}: ${id}`);
