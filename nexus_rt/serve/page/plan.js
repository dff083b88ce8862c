// A plan drawn before it runs: a step a bar, as wide as it costs, in its generator's colour.

const SVG = "http://www.w3.org/2000/svg";
const NAMES = { small: "small generator", bridge: "both, blended", large: "large generator" };

export const milliseconds = (ms) =>
  ms === null || ms === undefined ? "?" : ms < 1000 ? `${Math.round(ms)} ms`
    : ms < 60000 ? `${(ms / 1000).toFixed(1)} s` : `${Math.floor(ms / 60000)} min ${Math.round((ms % 60000) / 1000)} s`;

function rectangle(x, width, className, words) {
  const rect = document.createElementNS(SVG, "rect");
  for (const [name, value] of Object.entries({ x, y: 0, width, height: 40, class: className }))
    rect.setAttribute(name, value);
  const title = document.createElementNS(SVG, "title");
  title.textContent = words;
  rect.append(title);
  return rect;
}

// Fill a <figure> with a plan as `GET /v1/plan` answers it.
export function drawPlan(figure, plan) {
  const priced = plan.total_ms !== null;
  const bars = plan.steps.map((step) => ({
    width: priced ? Math.max(step.ms, plan.total_ms / 400) : 1,
    name: `${step.phase}${step.kind === "reused" ? " reused" : ""}`,
    words: `step ${step.step}: ${step.runs}, timestep ${Math.round(step.timestep)}, ${milliseconds(step.ms)}`,
  }));
  if (priced) {
    bars.unshift({ width: plan.encode_ms, name: "other", words: `encode ${milliseconds(plan.encode_ms)}` });
    const rest = plan.decode_ms + plan.write_ms;
    bars.push({ width: rest, name: "other", words: `decode and write ${milliseconds(rest)}` });
  }
  const total = bars.reduce((sum, bar) => sum + bar.width, 0);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 1000 40");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  let x = 0;
  for (const bar of bars) {
    const width = (1000 * bar.width) / total;
    svg.append(rectangle(x, width, bar.name, bar.words));
    x += width;
  }
  const caption = document.createElement("figcaption");
  const counts = {};
  for (const step of plan.steps) counts[step.phase] = (counts[step.phase] || 0) + 1;
  const keys = Object.entries(counts).map(([phase, count]) => [phase, `${count} ${NAMES[phase]}`]);
  if (priced) keys.push(["other", "encode, decode, write"]);
  for (const [phase, words] of keys) {
    const key = document.createElement("span");
    key.className = `key ${phase}`;
    caption.append(key, words);
  }
  const words = ` \u2014 ${plan.plan}: ${plan.steps.length} steps, ${priced ? `about ${milliseconds(plan.total_ms)}` : "price not known yet"}`;
  caption.append(words);
  svg.setAttribute("aria-label", caption.textContent);
  figure.replaceChildren(svg, caption);
}
