// The server's routes, as the page calls them: relative, so that it works under any prefix.

let key = sessionStorage.getItem("nexus-rt-key") || "";
let asking = null;

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
    this.param = error.param;
  }
}

// Ask for a key once, however many requests were refused without one.
function askKey() {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    dialog.addEventListener("close", () => {
      key = document.getElementById("key").value.trim();
      sessionStorage.setItem("nexus-rt-key", key);
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

export async function request(path, options = {}) {
  for (;;) {
    const used = key;
    const headers = { ...options.headers };
    if (used) headers.Authorization = `Bearer ${used}`;
    const response = await fetch(path, { ...options, headers });
    if (response.status === 401) {
      if (used === key) await askKey();
      continue;
    }
    if (response.ok) return response;
    let error = { message: `the server answered ${response.status}` };
    try {
      error = (await response.json()).error || error;
    } catch {
      // no JSON: an intermediary's answer
    }
    throw new ApiError(response.status, error);
  }
}

export const getJson = async (path) => (await request(path)).json();

export async function post(path, body) {
  const options = { method: "POST" };
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  return (await request(path, options)).json();
}

export const remove = async (id) => (await request(`v1/videos/${id}`, { method: "DELETE" })).json();

// A file as a local address, since <img> and <video> send no key.
export async function objectUrl(id, variant) {
  const response = await request(`v1/videos/${id}/content?variant=${variant}`);
  return URL.createObjectURL(await response.blob());
}

// A job's server-sent events, until one ends it: tell(kind, data).
export async function follow(id, tell) {
  const response = await request(`v1/videos/${id}/events`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const messages = text.split("\n\n");
    text = messages.pop();
    for (const message of messages) {
      const fields = Object.fromEntries(
        message.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]),
      );
      if (fields.event) tell(fields.event, JSON.parse(fields.data));
    }
  }
}
