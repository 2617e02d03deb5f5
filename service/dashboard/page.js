// The dashboard: shows /api/state each second, switches the path, and runs comparisons.
// Messages are protobuf's JSON with proto names. Credentials live in the two input fields alone.

const MODES = ["unfused", "fused_norm", "fused"];
const POLL_MS = 1000;
const KEPT_SECONDS = 330;
const SPARK_PARTS = 60;
const BAR_REM = 9;
const FEWEST_SAMPLES = 30; // of each path, for a ratio of their means
const STEPS = "fusewire_engine_step_duration_seconds";
const QK = "fusewire_qk_norm_kernel_duration_seconds";
const ROWS = [
  { title: "Step, prefill only", name: STEPS, phase: "prefill" },
  { title: "Step, decode only", name: STEPS, phase: "decode" },
  { title: "Step, both", name: STEPS, phase: "mixed" },
  { title: "Time to first token", name: "fusewire_time_to_first_token_seconds" },
  { title: "Between two tokens", name: "fusewire_inter_token_latency_seconds" },
  { title: "QK norm of a layer, prefill", name: QK, phase: "prefill" },
  { title: "QK norm of a layer, decode", name: QK, phase: "decode" },
];

const $ = (id) => document.getElementById(id);
const wire = (mode) => `KERNEL_MODE_${mode.toUpperCase()}`;
const spoken = (mode) => mode.replace("KERNEL_MODE_", "").toLowerCase();

/** Make an element; text never becomes markup. */
function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

function fill(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value, false, value === chosen)));
}

function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value >= 1) return `${value.toPrecision(3)} s`;
  if (value >= 1e-3) return `${(value * 1e3).toPrecision(3)} ms`;
  return `${(value * 1e6).toPrecision(3)} µs`;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const small = (value) => (Number.isFinite(Number(value)) ? Number(value).toExponential(2) : "–");

// ---- asking ----

async function post(path, message, token, signal) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(message), signal });
  if (!response.ok) {
    const refusal = await response.json();
    throw new Error(`${refusal.code}: ${refusal.message}`);
  }
  return response;
}

function say(output, text, refused = false) {
  output.textContent = text;
  output.classList.toggle("refused", refused);
}

/** Post what an operator asked for and tell how it went. */
async function operate(path, message, tell) {
  const output = $("answer");
  say(output, "…");
  try {
    const response = await post(path, message, $("admin-token").value);
    say(output, tell(await response.json()));
  } catch (error) {
    say(output, error.message, true);
  }
  poll();
}

/** What holds after a change; one that re-arms the guard tells of no split, for it leaves none. */
function told(reply) {
  const [previous, current] = [spoken(reply.previous), spoken(reply.current)];
  const isSplit = Boolean(reply.split?.length);
  const held = [isSplit ? `split ${describeSplit(reply)}` : "no split"];
  if (previous !== current) held.unshift(`${previous} → ${current}`);
  else if (!isSplit) held.unshift(current);
  return `${held.join(", ")}, generation ${reply.generation}, from step ${reply.applied_at_step} on`;
}

// ---- the state ----

const history = []; // of {time, sums, turns}, oldest first; turns is the generation of time slices, or null
let latest = null;
let known = "";

function keyOf(name, labels) {
  return `${name}|${labels.phase ?? ""}|${labels.kernel_mode ?? ""}`;
}

/** Keep the sums and counts of a state; forget all if the server has begun anew. */
function remember(state) {
  const sums = new Map();
  for (const [name, series] of Object.entries(state.histograms)) {
    for (const { labels, sum, count } of series) sums.set(keyOf(name, labels), { sum, count });
  }
  const last = history.at(-1);
  const isNew = last && (state.time < last.time ||
    [...last.sums].some(([key, { count }]) => (sums.get(key)?.count ?? 0) < count));
  if (isNew) history.length = 0;
  const takesTurns = state.kernel?.split_kind === "SPLIT_KIND_TIME_SLICE";
  history.push({ time: state.time, sums, turns: takesTurns ? state.kernel.generation : null });
  while (history[0].time < state.time - KEPT_SECONDS) history.shift();
}

const ZERO = { sum: 0, count: 0 };

/** What one series gained between two moments; the first may be null, for the server's start. */
function gained(from, to, key) {
  const before = from?.sums.get(key) ?? ZERO;
  const after = to.sums.get(key) ?? ZERO;
  return { sum: after.sum - before.sum, count: after.count - before.count };
}

const mean = ({ sum, count }) => (count > 0 ? sum / count : null);

/** The moments of the chosen window; none before it if all since the start counts. */
function chosenWindow() {
  const length = Number($("window").value);
  if (!length) return [null, ...history];
  const begin = history.at(-1).time - length - 0.5;
  return history.filter((moment) => moment.time >= begin);
}

/** Whether the paths took turns all through a window, the same ones: then what they met was alike. */
function isTimeSliced(moments) {
  const turns = moments[0]?.turns ?? null;
  return turns !== null && moments.every((moment) => moment.turns === turns);
}

function showLatencies() {
  const moments = chosenWindow();
  const isFair = isTimeSliced(moments);
  $("unfair").hidden = isFair;
  const modes = availableModes();
  const head = [make("th"), ...modes.map((mode) => make("th", mode, mode)), make("th", "over time")];
  $("latency-head").replaceChildren(...head);
  const rows = ROWS.filter((row) => latest.histograms[row.name]);
  $("latency-body").replaceChildren(...rows.map((row) => latencyRow(row, modes, moments, isFair)));
  const steps = (phases) => phases.flatMap((phase) => modes.map((mode) =>
    gained(moments[0], moments.at(-1), keyOf(STEPS, { phase, kernel_mode: mode })).count))
    .reduce((a, b) => a + b, 0);
  const all = steps(["prefill", "decode", "mixed"]);
  $("mixed").textContent = all ? `${percent(steps(["mixed"]) / all)} of ${all} steps held both` : "no step yet";
}

/** How much faster a path is than unfused, with a word if that is no verdict; nothing of too few samples. */
function describeRatio(row, unfused, path, isFair) {
  if (row.phase === "mixed") return ""; // such steps hold what the traffic of their moment brought
  if (!(unfused?.count >= FEWEST_SAMPLES && path.count >= FEWEST_SAMPLES)) return "";
  return `${(mean(unfused) / mean(path)).toFixed(2)}× as fast${isFair ? "" : ", not time-sliced"} · `;
}

function latencyRow(row, modes, moments, isFair) {
  const keys = modes.map((mode) => keyOf(row.name, { phase: row.phase, kernel_mode: mode }));
  const gains = keys.map((key) => gained(moments[0], moments.at(-1), key));
  const means = gains.map(mean);
  const largest = Math.max(...means.map((value) => value ?? 0));
  const unfused = gains[modes.indexOf("unfused")];
  const cells = modes.map((mode, i) => {
    const cell = make("td", seconds(means[i]));
    cell.dataset.mode = mode;
    if (means[i] === null) return cell;
    const bar = make("span", "", `bar ${mode}`);
    bar.style.width = `${(BAR_REM * means[i]) / largest}rem`;
    const ratio = mode === "unfused" ? "" : describeRatio(row, unfused, gains[i], isFair);
    cell.append(bar, make("small", `${ratio}${gains[i].count} of them`));
    return cell;
  });
  const last = make("td");
  last.append(sparkline(modes, keys, moments));
  const line = make("tr");
  line.dataset.row = row.title;
  line.append(make("th", row.title), ...cells, last);
  return line;
}

const SVG = "http://www.w3.org/2000/svg";

/** One line for each mode: the mean in each part of the window, with gaps where there was none. */
function sparkline(modes, keys, moments) {
  const kept = moments.filter((moment) => moment !== null);
  const stride = Math.max(1, Math.ceil((kept.length - 1) / SPARK_PARTS));
  const starts = [];
  for (let i = 0; i + stride < kept.length; i += stride) starts.push(i);
  const lines = keys.map((key) => starts.map((i) => mean(gained(kept[i], kept[i + stride], key))));
  const top = Math.max(...lines.flat().map((value) => value ?? 0), Number.MIN_VALUE);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", "0 0 100 20");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  lines.forEach((values, i) => {
    const line = document.createElementNS(SVG, "path");
    line.setAttribute("class", modes[i]);
    line.setAttribute("d", staircase(values, 100 / Math.max(starts.length, 1), top));
    svg.append(line);
  });
  return svg;
}

/** The path of a line that is level over each part; null makes a gap. */
function staircase(values, width, top) {
  return values.map((value, i) => {
    if (value === null) return "";
    const move = i && values[i - 1] !== null ? "L" : "M";
    return `${move}${i * width} ${19 - (18 * value) / top}h${width}`;
  }).join("");
}

function availableModes() {
  const available = (latest?.kernel?.available ?? []).map(spoken);
  return available.length ? MODES.filter((mode) => available.includes(mode)) : MODES;
}

/** Make what depends on the modes that the server has; typed values survive. */
function offerModes(modes) {
  if (known === modes.join()) return;
  known = modes.join();
  $("mode-buttons").replaceChildren(...modes.map((mode) => {
    const button = make("button", mode);
    button.type = "button";
    button.dataset.mode = mode;
    button.addEventListener("click", () => operate("/api/mode", { mode: wire(mode) }, told));
    return button;
  }));
  const share = Math.floor(100 / modes.length);
  $("shares").replaceChildren(...modes.map((mode, i) => {
    const label = make("label", `${mode} `, mode);
    const input = make("input");
    Object.assign(input, { type: "number", min: 0, max: 100 });
    input.value = i ? share : 100 - share * (modes.length - 1);
    input.dataset.mode = mode;
    label.append(input, " %");
    return label;
  }));
  fill($("left-mode"), modes, modes[0]);
  fill($("right-mode"), modes, modes.at(-1));
}

function describeSplit(kernel) {
  if (!kernel.split.length) return "none";
  const shares = kernel.split.map(({ mode, percent: part }) => `${spoken(mode)} ${part} %`).join(", ");
  const sliced = kernel.split_kind === "SPLIT_KIND_TIME_SLICE";
  return `${shares}, ${sliced ? `in time slices of ${kernel.slice_seconds} s` : "by request"}`;
}

function describeGuard(guard) {
  if (!guard || !guard.every_steps) return "off";
  const watch = `every ${guard.every_steps} steps, threshold ${small(guard.threshold)}`;
  if (!guard.fallback_active) return `watching ${watch}`;
  return `fell back from ${guard.left_modes.map(spoken).join(", ")}: relative error ${small(guard.relative_error)}; ${watch}`;
}

function showKernel(kernel) {
  const mode = spoken(kernel.mode);
  const isShared = kernel.split_kind === "SPLIT_KIND_REQUEST"; // then few requests follow the default
  $("mode").textContent = isShared ? "split" : mode;
  $("mode").className = isShared ? "" : mode;
  $("backend").textContent = isShared ? "" : kernel.backend;
  $("generation").textContent = kernel.generation;
  $("split").textContent = describeSplit(kernel);
  $("guard").textContent = describeGuard(kernel.guard);
  $("guard").classList.toggle("refused", Boolean(kernel.guard?.fallback_active));
  $("rearm").hidden = !kernel.guard?.fallback_active;
  $("coupled").hidden = !isShared;
  for (const button of $("mode-buttons").children) {
    const isCurrent = button.dataset.mode === mode && !kernel.split.length;
    button.classList.toggle("chosen", isCurrent);
    button.setAttribute("aria-pressed", String(isCurrent));
  }
}

function showHealth(text, isGood) {
  $("health").textContent = text;
  $("health").className = `pill ${isGood ? "good" : "bad"}`;
}

function showLoad({ load, server, gauges }) {
  $("running").textContent = load.running_requests;
  $("running-meter").max = server.max_running_requests || 1;
  $("running-meter").value = load.running_requests;
  $("waiting").textContent = load.waiting_requests;
  $("kv").textContent = percent(load.kv_cache_usage_ratio);
  $("kv-meter").value = load.kv_cache_usage_ratio;
  for (const phase of ["prefill", "decode"]) {
    const errors = (gauges.fusewire_shadow_max_relative_error ?? [])
      .filter(({ labels }) => labels.phase === phase).map(({ value }) => value);
    const isBroken = errors.includes(null); // no finite number
    const largest = Math.max(0, ...errors);
    $(`shadow-${phase}`).textContent = isBroken ? "not finite" : largest ? small(largest) : "none yet";
  }
}

function show(state) {
  latest = state;
  remember(state);
  $("model").textContent = state.model;
  $("device").textContent = `${state.server.device ?? ""} · ${state.server.version}`;
  $("admin-field").hidden = !state.needs_token.admin;
  $("public-field").hidden = !state.needs_token.public;
  const degradations = state.server.degradations ?? [];
  $("degradations").hidden = !degradations.length;
  $("degradations").textContent = degradations.join(" · ");
  if (state.load.draining) showHealth("draining", false);
  else showHealth(state.unavailable ?? "serving", !state.unavailable);
  if (state.kernel) {
    offerModes(availableModes());
    showKernel(state.kernel);
  }
  showLoad(state);
  showLatencies();
}

async function poll() {
  try {
    const response = await fetch("/api/state");
    const state = await response.json();
    if (!response.ok) throw new Error(state.message);
    show(state);
  } catch (error) {
    showHealth(`no answer: ${error.message}`, false);
  }
}

async function keepPolling() {
  for (;;) {
    await poll();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

// ---- comparing ----

let running = null; // the AbortController of the comparison that runs

function sideOf(mode, prompt) {
  const side = {
    kernel_mode: wire(mode),
    stopping: { max_tokens: Number($("max-tokens").value) },
  };
  if ($("chat").checked) side.chat = { messages: [{ role: "user", content: prompt }] };
  else side.text = prompt;
  return side;
}

function compareRequest() {
  const left = $("left-prompt").value;
  const right = $("two-prompts").checked ? $("right-prompt").value : left;
  return {
    left: sideOf($("left-mode").value, left),
    right: sideOf($("right-mode").value, right),
    repetitions: Number($("repetitions").value),
  };
}

/** Yield {name, content} for each server-sent event of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (pending + value).split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) {
      const fields = new Map(block.split("\n").map((line) => {
        const colon = line.indexOf(": ");
        return [line.slice(0, colon), line.slice(colon + 2)];
      }));
      yield { name: fields.get("event"), content: JSON.parse(fields.get("data")) };
    }
  }
}

async function compare() {
  const request = compareRequest();
  running = new AbortController();
  prepareSides(request);
  try {
    const response = await post("/api/compare", request, $("public-token").value, running.signal);
    const tokens = { left: 0, right: 0 };
    for await (const { name, content } of events(response)) takeEvent(name, content, tokens, request);
  } catch (error) {
    say($("compare-status"), error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    $("compare-start").disabled = false;
    $("compare-stop").disabled = true;
    $("progress").hidden = true;
  }
}

function prepareSides(request) {
  $("compare-start").disabled = true;
  $("compare-stop").disabled = false;
  $("report").hidden = true;
  $("sides").hidden = false;
  $("progress").hidden = false;
  $("progress").value = 0;
  for (const side of ["left", "right"]) {
    const mode = spoken(request[side].kernel_mode);
    $(`${side}-text`).textContent = "";
    $(`${side}-title`).textContent = mode;
    $(`${side}-title`).className = mode;
  }
  say($("compare-status"), "both at once, untimed");
}

function takeEvent(name, content, tokens, request) {
  if (name === "delta") {
    const side = content.delta.right ? "right" : "left";
    tokens[side] += content.delta.delta.token_ids.length;
    $(`${side}-text`).append(content.delta.delta.text);
    $(`${side}-title`).textContent = `${spoken(request[side].kernel_mode)} · ${tokens[side]} tokens`;
  } else if (name === "progress") {
    const { finished_runs: finished, total_runs: total } = content.progress;
    $("progress").max = total || 1;
    $("progress").value = finished;
    say($("compare-status"), `timed alone, in turn: ${finished} of ${total} runs`);
  } else if (name === "report") {
    showReport(content.report);
    say($("compare-status"), "");
  } else if (name === "error") {
    throw new Error(`${content.code}: ${content.message}`);
  }
}

function showReport(report) {
  $("report").hidden = false;
  $("verdict").textContent = report.verdict;
  const sides = [report.left_timings ?? {}, report.right_timings ?? {}];
  const names = sides.map((side) => spoken(side.mode ?? "?"));
  $("report-head").replaceChildren(make("th", "median [lowest – highest]"),
    ...sides.map((side, i) => make("th", `${names[i]} · ${side.backend ?? ""}`, names[i])),
    make("th", `left ÷ right, of ${sides[0].runs?.length ?? 0} runs a side`));
  const spreads = [
    ["Time to first token", "time_to_first_token"],
    ["Prefill", "prefill"],
    ["Time per token after it", "time_per_output_token"],
    ["Decode", "decode"],
  ];
  const rows = spreads.map(([title, field]) => reportRow(title, sides.map((side) => side[field]), (spread) =>
    [spread.median, `${seconds(spread.median)} [${seconds(spread.low)} – ${seconds(spread.high)}]`]));
  const norms = [["prefill_qk_norm", "prefill"], ["decode_qk_norm", "decode"]];
  rows.push(...norms.map(([field, phase]) =>
    reportRow(`QK norm of a layer, ${phase}`, sides.map((side) => side[field]), (norm) =>
      [norm.layer_seconds, `${seconds(norm.layer_seconds)}, all layers ${percent(norm.step_share)} of the step`])));
  $("report-body").replaceChildren(...rows);
  showFacts(report);
}

/** A row of the report; `read` tells a side's number and how to spell it. */
function reportRow(title, values, read) {
  const [left, right] = values.map((value) => (value ? read(value) : [null, "–"]));
  const ratio = left[0] && right[0] ? `${(left[0] / right[0]).toFixed(2)}×` : "–";
  const row = make("tr");
  row.append(make("th", title), make("td", left[1]), make("td", right[1]), make("td", ratio));
  return row;
}

function showFacts(report) {
  const drift = (report.positions ?? []).length > 0;
  const load = report.load ?? {};
  const facts = [
    ["Same tokens", `${report.agreeing_tokens} of ${report.compared_tokens}` +
      (report.first_divergence === undefined ? "" : `, apart from position ${report.first_divergence} on`)],
    ["Largest logit difference", drift ? small(report.max_logit_difference) : "not compared"],
    ["Mean logit difference", drift ? small(report.mean_logit_difference) : "not compared"],
    ["Mean KL divergence", drift ? `${small(report.mean_kl_divergence)} nats` : "not compared"],
    ["Same likeliest token", drift ? percent(report.top1_agreement) : "not compared"],
    ["Other requests meanwhile", `at most ${load.max_running_requests ?? 0} running, ` +
      `${load.max_waiting_requests ?? 0} waiting`],
  ];
  $("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
}

// ---- what is pressed ----

$("split-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const kind = $("split-kind").value;
  const split = [...$("shares").querySelectorAll("input")]
    .map((input) => ({ mode: wire(input.dataset.mode), percent: Number(input.value) }))
    .filter((share) => share.percent > 0);
  const message = { split, split_kind: kind };
  if (kind === "SPLIT_KIND_TIME_SLICE") message.slice_seconds = Number($("slice-seconds").value);
  operate("/api/mode", message, told);
});
$("end-split").addEventListener("click", () => operate("/api/mode", { mode: latest.kernel.mode }, told));
$("rearm").addEventListener("click", () => operate("/api/rearm", {}, told));
$("window").addEventListener("change", () => latest && showLatencies());
$("two-prompts").addEventListener("change", () => {
  $("right-prompt-field").hidden = !$("two-prompts").checked;
});
$("compare-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) compare();
});
$("compare-stop").addEventListener("click", () => running?.abort());

keepPolling();
