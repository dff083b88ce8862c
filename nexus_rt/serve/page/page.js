import { ApiError, follow, getJson, objectUrl, post, remove } from "./api.js";
import { drawPlan, milliseconds } from "./plan.js";

const $ = (id) => document.getElementById(id);
const FIELDS = ["size", "num_frames", "seed", "num_inference_steps", "guidance_scale", "negative_prompt", "lora"];
const WHOLE = ["num_frames", "seed", "num_inference_steps"];
const running = new Map(); // id -> what to call when it ends
let last = null; // of the gallery's page
let shown = null; // the job in the dialog

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const ratio = (node, size) => node.style.setProperty("--ratio", size.replace("x", " / "));

// What the form asks for; a field that is empty is the server's to choose.
function asked(planId) {
  const body = {};
  for (const name of FIELDS) {
    const value = $(name).value.trim();
    if (value) body[name] = WHOLE.includes(name) || name === "guidance_scale" ? Number(value) : value;
  }
  const plan = $(planId).value.trim();
  if (plan) body.plan = plan;
  return body;
}

function say(error) {
  $("problem").textContent = error instanceof Error ? error.message : error || "";
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  const field = error instanceof ApiError && error.param && $(error.param);
  if (field) field.setAttribute("aria-invalid", "true");
}

// The plan that would run, and its price, as the form changes.
async function price(planId, figureId) {
  const figure = $(figureId);
  if (planId === "plan_b" && !$(planId).value.trim()) {
    figure.hidden = true;
    return null;
  }
  const body = asked(planId);
  delete body.negative_prompt;
  try {
    const plan = await getJson(`v1/plan?${new URLSearchParams(body)}`);
    drawPlan(figure, plan);
    figure.hidden = false;
    return plan;
  } catch (error) {
    figure.replaceChildren(element("figcaption", "", error.message));
    figure.hidden = false;
    return null;
  }
}

let timer = 0;
function priceSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => Promise.all([price("plan", "plan-a"), price("plan_b", "plan-b")]), 200);
}

// A running job's card, kept up to date by its events.
function watch(job, place) {
  const card = element("article", "card");
  card.dataset.id = job.id;
  ratio(card, job.size);
  const picture = element("img");
  picture.alt = "";
  picture.hidden = true;
  const bar = element("progress");
  bar.max = 100;
  bar.value = job.progress;
  bar.setAttribute("aria-label", "progress");
  const state = element("p", "state", "waiting");
  state.setAttribute("role", "status");
  const rewritten = element("p", "quiet");
  rewritten.hidden = true;
  const cancel = element("button", "", "Cancel");
  cancel.type = "button";
  cancel.addEventListener("click", async () => {
    cancel.disabled = true;
    try {
      await post(`v1/videos/${job.id}/cancel`);
    } catch (error) {
      say(error);
    }
  });
  card.append(picture, element("p", "prompt", job.prompt), bar, state, rewritten, cancel);
  (place || $("running")).prepend(card);
  running.set(job.id, true);
  countRunning();
  tellOf(job.id, { card, picture, bar, state, rewritten, cancel });
  return card;
}

async function tellOf(id, { card, picture, bar, state, rewritten, cancel }) {
  const update = (kind, event) => {
    if (kind === "state" && event.status === "queued")
      state.textContent = event.jobs_ahead ? `waiting, ${event.jobs_ahead} before it` : "waiting";
    if (kind === "queued") state.textContent = "waiting again";
    if (kind === "stage") state.textContent = event.stage;
    if (kind === "step") {
      bar.value = event.progress;
      const left = event.ms_left === null ? "" : `, ${milliseconds(event.ms_left)} left`;
      state.textContent = `step ${event.step} of ${event.steps}, ${event.runs}${left}`;
    }
    if (kind === "rewriting") {
      rewritten.hidden = false;
      rewritten.textContent = `The large generator reads: ${event.text}`;
    }
    if (kind === "preview") {
      picture.src = event.image;
      picture.alt = `preview after step ${event.step}`;
      picture.hidden = false;
    }
  };
  let job = null;
  while (job === null) {
    try {
      await follow(id, update);
      const now = await getJson(`v1/videos/${id}`);
      if (now.status === "completed" || now.status === "failed") job = now;
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) break;
      state.textContent = "the server does not answer";
    }
    if (job === null) await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  running.delete(id);
  cancel.remove();
  if (job === null || (job.status === "completed" && card.parentElement === $("running"))) card.remove();
  countRunning();
  if (job === null) return;
  bar.value = job.progress;
  if (job.status === "failed") {
    state.textContent = job.error.code === "cancelled" ? "cancelled" : `failed: ${job.error.message}`;
    bar.remove();
    return;
  }
  if (card.isConnected) await playIn(card, job, { picture, bar, state });
  await show(job, true);
}

function countRunning() {
  $("none-running").hidden = $("running").children.length > 0;
}

// The finished clip in place of its preview.
async function playIn(card, job, { picture, bar, state }) {
  const video = element("video");
  Object.assign(video, { controls: true, loop: true, muted: true, playsInline: true });
  video.src = await objectUrl(job.id, "video");
  video.setAttribute("aria-label", `clip: ${job.prompt}`);
  picture.replaceWith(video);
  bar.remove();
  const perf = await getJson(`v1/perf/${job.id}`);
  state.textContent = `${perf.meta.plan}: ${milliseconds(perf.total_duration_ms)}, seed ${perf.meta.seed}`;
}

// A card of the gallery.
async function show(job, first) {
  const card = element("button", "card");
  card.type = "button";
  card.dataset.id = job.id;
  ratio(card, job.size);
  const picture = element("img");
  picture.alt = "";
  picture.loading = "lazy";
  card.append(picture, element("p", "prompt", job.prompt));
  card.addEventListener("click", () => open(job));
  const old = $("gallery").querySelector(`[data-id="${job.id}"]`);
  if (old) old.replaceWith(card);
  else if (first) $("gallery").prepend(card);
  else $("gallery").append(card);
  $("none-made").hidden = true;
  try {
    if (job.status === "completed") picture.src = await objectUrl(job.id, "thumbnail");
  } catch {
    picture.remove(); // it expired
  }
}

async function open(job) {
  shown = job;
  $("clip-title").textContent = job.prompt;
  $("clip-facts").replaceChildren();
  ratio($("clip-dialog"), job.size);
  $("clip-dialog").showModal();
  try {
    const [address, perf] = await Promise.all([objectUrl(job.id, "video"), getJson(`v1/perf/${job.id}`)]);
    $("clip-video").src = address;
    $("clip-download").href = address;
    $("clip-download").download = `${job.id}.mp4`;
    shown = { ...job, meta: perf.meta };
    const facts = {
      Plan: perf.meta.plan, Seed: perf.meta.seed, Size: `${job.size}, ${perf.meta.num_frames} frames`,
      Took: milliseconds(perf.total_duration_ms),
      Stages: perf.steps.map((s) => `${s.name} ${milliseconds(s.duration_ms)}`).join(", "),
      LoRA: (perf.meta.loras || []).join(", "), Model: job.model, Device: perf.meta.device,
      Made: new Date(1000 * job.completed_at).toLocaleString(),
      Expires: new Date(1000 * job.expires_at).toLocaleString(), Id: job.id,
    };
    for (const [name, value] of Object.entries(facts))
      if (value !== undefined && value !== "") $("clip-facts").append(element("dt", "", name), element("dd", "", String(value)));
  } catch (error) {
    $("clip-facts").append(element("dt", "", "Problem"), element("dd", "", error.message));
  }
}

async function gallery() {
  const page = await getJson(`v1/videos?limit=20${last ? `&after=${last}` : ""}`);
  for (const job of page.data) {
    if (job.status === "completed") show(job, false);
    else if (job.status !== "failed" && !running.has(job.id)) watch(job);
  }
  last = page.last_id || last;
  $("more").hidden = !page.has_more;
}

async function submit(event) {
  event.preventDefault();
  say("");
  const prompt = $("prompt").value.trim();
  const second = $("plan_b").value.trim();
  const body = { prompt, ...asked("plan") };
  $("go").disabled = true;
  try {
    if (!second) {
      watch(await post("v1/videos", body));
      return;
    }
    body.seed ??= Math.floor(Math.random() * 2 ** 32);
    const both = [await post("v1/videos", body), await post("v1/videos", { ...body, plan: second })];
    $("pair").replaceChildren();
    for (const job of both.reverse()) watch(job, $("pair"));
    $("compare").hidden = false;
  } catch (error) {
    say(error);
  } finally {
    $("go").disabled = false;
  }
}

function playTogether() {
  const clips = [...$("pair").querySelectorAll("video")];
  for (const clip of clips) clip.currentTime = 0;
  for (const clip of clips) clip.play();
}

function useSettings() {
  const meta = shown.meta || {};
  $("prompt").value = shown.prompt;
  $("size").value = shown.size;
  for (const name of ["num_frames", "seed", "num_inference_steps", "guidance_scale", "negative_prompt"])
    $(name).value = meta[name] ?? "";
  $("plan").value = meta.plan ?? "";
  $("clip-dialog").close();
  $("prompt").focus();
  priceSoon();
}

async function state() {
  try {
    const response = await fetch("ready");
    const { status } = await response.json();
    $("state").textContent = { ready: "Ready", loading: "Loading the models ...", stopping: "Stopping", failed: "The models cannot be loaded" }[status] || status;
    return status === "ready";
  } catch {
    $("state").textContent = "The server does not answer";
    return false;
  }
}

async function start() {
  while (!(await state())) await new Promise((resolve) => setTimeout(resolve, 1000));
  const plan = await price("plan", "plan-a");
  if (plan) {
    $("size").placeholder = plan.defaults.size;
    $("num_frames").placeholder = plan.defaults.num_frames;
    $("plan").placeholder = plan.defaults.plan;
    for (const name of plan.loras) $("lora").append(new Option(name, name));
    $("lora-label").hidden = plan.loras.length === 0;
  }
  await gallery();
  setInterval(state, 10000);
}

$("form").addEventListener("submit", submit);
for (const name of ["size", "num_frames", "num_inference_steps", "guidance_scale", "plan", "plan_b", "lora"])
  $(name).addEventListener("input", priceSoon);
$("more").addEventListener("click", () => gallery().catch(say));
$("together").addEventListener("click", playTogether);
$("clip-close").addEventListener("click", () => $("clip-dialog").close());
$("clip-dialog").addEventListener("close", () => {
  const video = $("clip-video");
  video.pause();
  URL.revokeObjectURL(video.src);
  video.removeAttribute("src");
});
$("clip-again").addEventListener("click", useSettings);
$("clip-delete").addEventListener("click", async () => {
  try {
    await remove(shown.id);
    $("gallery").querySelector(`[data-id="${shown.id}"]`)?.remove();
    $("none-made").hidden = $("gallery").children.length > 0;
    $("clip-dialog").close();
  } catch (error) {
    $("clip-facts").append(element("dt", "", "Problem"), element("dd", "", error.message));
  }
});
start().catch(say);
