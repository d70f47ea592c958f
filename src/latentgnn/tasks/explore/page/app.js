// The page: what it shows is in `state`, which the link holds; the server is asked for inputs alone.
import { halfIsIn, line } from "./affinity.js";
import { unpack } from "./binary.js";
import { CloudStage } from "./cloud.js";
import { HEAT, brightest, coloursOf } from "./colours.js";
import { BoxStage, ClassStage } from "./map.js";

const FEW = 24; // latents that are shown at first
const STAGES = { detection: BoxStage, segmentation: ClassStage, pointcloud: CloudStage };
const get = (id) => document.getElementById(id);
const escaped = (value) => (value === null ? "" : String(value));

const state = {};
let about = null; // what the server says of the model
let view = null; // of the input
let stage = null;
let other = null;
let without = null; // what is found without a block
let upload = null; // a file that was dropped
let dirty = null; // since when the picture is behind
let asked = 0;

// For the browser's console: the numbers behind the picture.
window.explore = { state, weights: null, milliseconds: null };

function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  const number = (name, otherwise) => (link.has(name) && isFinite(link.get(name)) ? Number(link.get(name)) : otherwise);
  Object.assign(state, {
    token: link.get("token"),
    input: number("input", 0),
    block: link.get("block"),
    kernel: number("kernel", null),
    group: number("group", null),
    out: number("out", 0) === 1,
    node: number("node", null),
    pinned: number("pinned", 0) === 1,
    off: new Set((link.get("off") ?? "").split(",").filter(Boolean)),
    heat: number("heat", 1) === 1,
    smooth: number("smooth", 1) === 1,
    found: number("found", 1) === 1,
    score: number("score", 0.5),
    compare: number("compare", 0) === 1,
    yaw: number("yaw", -0.6),
    pitch: number("pitch", 0.9),
    zoom: number("zoom", 1),
  });
}

function linkOf() {
  const link = new URLSearchParams();
  const put = (name, value, usual) => value !== usual && value !== null && link.set(name, escaped(value));
  put("token", state.token, null);
  if (upload === null) put("input", state.input, null);
  put("block", state.block, null);
  put("kernel", state.kernel, null);
  put("group", state.group, null);
  put("out", Number(state.out), 0);
  put("node", state.node, null);
  put("pinned", Number(state.pinned), 0);
  put("off", [...state.off].join(","), "");
  for (const name of ["heat", "smooth", "found"]) put(name, Number(state[name]), 1);
  put("score", state.score, 0.5);
  put("compare", Number(state.compare), 0);
  if (about?.task === "pointcloud") for (const name of ["yaw", "pitch", "zoom"]) put(name, Number(state[name].toFixed(3)), null);
  return `#${link}`;
}

const later = {};
function soon(name, wait, action) {
  clearTimeout(later[name]);
  later[name] = setTimeout(action, wait);
}

// Browsers limit how often a page's address may change.
const keepLink = () => soon("link", 300, () => history.replaceState(null, "", linkOf()));

async function ask(path, options = {}) {
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch {
    throw new Error("the server does not answer: is `latentgnn explore` still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Error(told.error ?? `the server failed (${response.status}): its terminal says more`);
}

function askInput(what, block) {
  const query = new URLSearchParams(block === undefined ? {} : { block });
  if (upload === null) return ask(`api/input/${state.input}/${what}?${query}`);
  query.set("suffix", upload.suffix);
  return ask(`api/upload/${what}?${query}`, { method: "POST", body: upload.file });
}

function tell(error) {
  get("error").textContent = error ? error.message : "";
  get("error").hidden = !error;
}

async function load() {
  const mine = ++asked;
  const name = upload ? upload.file.name : about.names[state.input];
  get("status").textContent = `Looking at ${name} …`;
  tell(null);
  try {
    const found = unpack(await (await askInput("view")).arrayBuffer());
    const loaded = new STAGES[about.task](get("stage"), about, state);
    await loaded.load(found);
    if (mine !== asked) return;
    for (const block of found.header.blocks) {
      for (const graph of block.graphs) for (const part of ["gather", "scatter", "affinity"]) graph[part] = found.array(graph[part]);
    }
    [view, stage, without] = [found.header, loaded, null];
    other = Object.assign(Object.create(Object.getPrototypeOf(stage)), stage, { canvas: get("other"), heat: document.createElement("canvas") });
    get("status").textContent = view.blocks.length ? "" : "No block has run on this input.";
    document.querySelector("main").hidden = !view.blocks.length;
    get("stage").setAttribute("aria-label", `${name}: move over it, or use the arrow keys, to choose a node`);
    if (view.blocks.length) showBlocks();
  } catch (error) {
    if (mine !== asked) return;
    get("status").textContent = "";
    tell(error);
  }
}

const block = () => view.blocks.find((each) => each.name === state.block);
// Without the name that a block gets from being put in after a module.
const short = (name) => name.replace(/\.latentgnn$/, "");
const nodesOf = (each) => each.shape.reduce((a, b) => a * b, 1);
const keyOf = (graph, latent) => `${graph.kernel}.${graph.group}.${latent}`;
const isOn = (graph, latent) => !state.off.has(keyOf(graph, latent));
const shownGraphs = () =>
  block().graphs.filter(
    (graph) => (state.kernel === null || graph.kernel === state.kernel) && (state.group === null || graph.group === state.group),
  );

function choices(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value, false, value === chosen)));
}

function showBlocks() {
  const wanted = view.blocks.find((each) => each.name === state.block) ?? view.blocks[0];
  if (wanted.name !== state.block && state.block !== null) [state.node, state.off] = [null, new Set()];
  state.block = wanted.name;
  choices(get("block"), view.blocks.map((each) => [each.name, short(each.name)]), state.block);
  showBlock();
}

function showBlock() {
  const now = block();
  for (const [name, count] of [["kernel", now.kernels], ["group", now.groups]]) {
    if (state[name] !== null && !(state[name] >= 0 && state[name] < count)) state[name] = null;
    const numbers = Array.from({ length: count }, (_, number) => [String(number), String(number)]);
    choices(get(name), [["", "mean of all"], ...numbers], state[name] === null ? "" : String(state[name]));
    get(`${name}-row`).hidden = count === 1;
  }
  if (state.node === null || !(Number.isInteger(state.node) && state.node >= 0 && state.node < nodesOf(now))) state.node = stage.firstNode(now);
  const rows = [
    ["nodes", now.shape.map((size) => size.toLocaleString("en")).join(" x ")],
    ["gamma", now.gamma === null ? "none" : now.gamma.toPrecision(3)],
    ["changes its input by", `${(100 * now.change).toFixed(1)} %`],
    ["rows differ (0: all the same)", now.row_difference.toFixed(3)],
    ["effective rank", `${now.rank.toFixed(1)} of ${now.latents}`],
    ["dead latents", `${now.dead} of ${now.latents}`],
  ];
  get("figures").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = document.createElement("tr");
      const head = Object.assign(document.createElement("th"), { textContent: name, scope: "row" });
      row.append(head, Object.assign(document.createElement("td"), { textContent: value }));
      return row;
    }),
  );
  for (const [id, value] of [["heat", state.heat], ["smooth", state.smooth], ["found", state.found], ["compare", state.compare]]) get(id).checked = value;
  document.querySelector(`input[name=direction][value=${state.out ? "out" : "in"}]`).checked = true;
  get("score").value = state.score;
  get("score-shown").textContent = state.score.toFixed(2);
  get("compared").hidden = !state.compare;
  showGallery();
  compare();
  paint();
}

function showGallery() {
  const now = block();
  const key = state.out ? "scatter" : "gather";
  const latents = shownGraphs().flatMap((graph) =>
    Array.from({ length: graph.latents }, (_, latent) => ({ graph, latent, usage: graph[`${key}_usage`][latent] })),
  );
  latents.sort((a, b) => b.usage - a.usage);
  const all = get("more").getAttribute("aria-expanded") === "true";
  get("more").hidden = latents.length <= FEW;
  get("more").textContent = all ? "show fewer" : `show all ${latents.length}`;
  get("latents-help").textContent = state.out
    ? "which nodes read each latent, with its share of all that is read; press one to leave its part out"
    : "which nodes each latent gathers from, with its share of all that is gathered; press one to leave its part out";
  const several = shownGraphs().length > 1;
  get("gallery").replaceChildren(
    ...latents.slice(0, all ? latents.length : FEW).map(({ graph, latent, usage }) => {
      const button = Object.assign(document.createElement("button"), { type: "button" });
      const picture = document.createElement("canvas");
      const nodes = nodesOf(now);
      const aspect = stage.thumbnail(picture, now, graph[key].subarray(latent * nodes, (latent + 1) * nodes));
      picture.style.setProperty("--aspect", aspect);
      const place = several ? `${graph.kernel}.${graph.group}.` : "";
      const name = document.createElement("span");
      name.textContent = `${place}${latent}: ${(100 * usage).toFixed(1)} %`;
      button.append(picture, name);
      button.title = `latent ${place}${latent}`;
      button.setAttribute("aria-label", `latent ${place}${latent}, ${(100 * usage).toFixed(1)} percent`);
      button.dataset.latent = keyOf(graph, latent);
      button.setAttribute("aria-pressed", isOn(graph, latent));
      button.addEventListener("click", () => {
        const id = button.dataset.latent;
        if (!state.off.delete(id)) state.off.add(id);
        button.setAttribute("aria-pressed", !state.off.has(id));
        paint();
      });
      return button;
    }),
  );
}

// What is found without the block is computed when it is asked for, once for each block.
async function compare() {
  const [mine, name] = [asked, state.block];
  const input = upload ? upload.file.name : about.names[state.input];
  get("caption").textContent = state.compare ? `${input}, with ${short(name)}` : input;
  get("other-caption").textContent = `the result without ${short(name)}`;
  if (!state.compare || without?.name === name) return;
  get("other-caption").textContent = "computing the result without the block …";
  without = { name, stage: null };
  try {
    const found = unpack(await (await askInput("without", name)).arrayBuffer());
    if (mine !== asked || state.block !== name) return;
    without = { name, found };
    get("other-caption").textContent = `the result without ${short(name)}`;
    paint();
  } catch (error) {
    without = null;
    tell(error);
  }
}

// Draw in the browser's next picture; several wishes become one.
function paint(since = performance.now()) {
  keepLink();
  if (dirty !== null) return;
  dirty = since;
  requestAnimationFrame(() => {
    const began = dirty;
    dirty = null;
    draw();
    window.explore.milliseconds = performance.now() - began;
    get("time").textContent = `${window.explore.milliseconds.toFixed(0)} ms`;
  });
}

function draw() {
  const now = block();
  const weights = line(shownGraphs(), state.node, nodesOf(now), state.out, isOn);
  window.explore.weights = weights;
  const options = { block: now, node: state.node, weights, smooth: state.smooth, score: state.score, camera: state };
  stage.draw({ ...options, heat: state.heat, found: state.found });
  const beside = state.compare && without?.found;
  other.draw({ ...options, node: null, heat: false, found: Boolean(beside), without: beside || null });
  get("top").textContent = brightest(weights).toPrecision(2);
  soon("readout", 120, () => {
    const sum = weights.reduce((a, b) => a + b, 0);
    const half = sum > 0 ? `; half of it from ${(100 * halfIsIn(weights, sum)).toPrecision(2)} % of the nodes` : "";
    get("readout").textContent =
      `${stage.nameOf(now, state.node)}${state.pinned ? " (pinned)" : ""}: ${state.out ? "it is taken in with" : "it takes in"} ` +
      `weights that sum to ${sum.toPrecision(3)}${half}.`;
  });
}

function listen() {
  const canvas = get("stage");
  let drag = null;
  const follow = (event) => {
    const node = stage.nodeAt(block(), event.clientX, event.clientY);
    if (node !== null && node !== state.node) {
      state.node = node;
      paint(event.timeStamp);
    }
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    drag = { x: event.clientX, y: event.clientY, moved: false };
    if (!stage.turn) follow(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (drag && stage.turn) {
      const [across, down] = [event.clientX - drag.x, event.clientY - drag.y];
      if (!drag.moved && Math.hypot(across, down) < 4) return;
      stage.turn(state, across, down);
      drag = { x: event.clientX, y: event.clientY, moved: true };
      paint(event.timeStamp);
    } else if (drag || !state.pinned) follow(event);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) {
      follow(event);
      state.pinned = true;
      paint(event.timeStamp);
    }
    drag = null;
  });
  canvas.addEventListener("pointercancel", () => (drag = null));
  canvas.addEventListener("wheel", (event) => {
    if (!stage.turn) return;
    event.preventDefault();
    state.zoom = Math.min(20, Math.max(0.3, state.zoom * Math.exp(-event.deltaY / 600)));
    paint(event.timeStamp);
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (arrow && event.shiftKey && stage.turn) stage.turn(state, 25 * arrow[0], 25 * arrow[1]);
    else if (arrow) state.node = stage.move(block(), state.node, ...arrow.map((step) => step * (event.shiftKey ? 5 : 1)));
    else if (event.key === "Escape") state.pinned = false;
    else if ((event.key === "+" || event.key === "-") && stage.turn) state.zoom *= event.key === "+" ? 1.2 : 1 / 1.2;
    else return;
    if (arrow && !(event.shiftKey && stage.turn)) state.pinned = true;
    event.preventDefault();
    paint(event.timeStamp);
  });

  const go = (number) => {
    [state.input, state.node, state.off, upload] = [number, null, new Set(), null];
    get("input").value = number;
    load();
  };
  get("input").addEventListener("change", (event) => go(Number(event.target.value)));
  const step = (by) => about.names.length && go((state.input + by + about.names.length) % about.names.length);
  get("previous").addEventListener("click", () => step(-1));
  get("next").addEventListener("click", () => step(1));
  get("copy").addEventListener("click", async () => {
    history.replaceState(null, "", linkOf());
    // Browsers give the clipboard to pages of this machine or under HTTPS alone.
    const done = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
    get("status").textContent = done ? "The link is in the clipboard." : "The link is in the address bar.";
  });

  get("block").addEventListener("change", (event) => {
    [state.block, state.kernel, state.group, state.node, state.off] = [event.target.value, null, null, null, new Set()];
    showBlock();
  });
  for (const name of ["kernel", "group"]) {
    get(name).addEventListener("change", (event) => {
      state[name] = event.target.value === "" ? null : Number(event.target.value);
      showBlock();
    });
  }
  for (const radio of document.querySelectorAll("input[name=direction]")) {
    radio.addEventListener("change", () => {
      state.out = radio.value === "out";
      showBlock();
    });
  }
  for (const name of ["heat", "smooth", "found", "compare"]) {
    get(name).addEventListener("change", (event) => {
      state[name] = event.target.checked;
      get("compared").hidden = !state.compare;
      compare();
      paint();
    });
  }
  get("score").addEventListener("input", (event) => {
    state.score = Number(event.target.value);
    get("score-shown").textContent = state.score.toFixed(2);
    paint();
  });
  const all = (on) => {
    const keys = shownGraphs().flatMap((graph) => Array.from({ length: graph.latents }, (_, latent) => keyOf(graph, latent)));
    state.off = new Set(on ? [] : keys);
    for (const button of get("gallery").children) button.setAttribute("aria-pressed", on);
    paint();
  };
  get("all").addEventListener("click", () => all(true));
  get("none").addEventListener("click", () => all(false));
  get("more").addEventListener("click", (event) => {
    event.target.setAttribute("aria-expanded", event.target.getAttribute("aria-expanded") !== "true");
    showGallery();
  });

  get("choose").addEventListener("click", () => get("file").click());
  get("file").addEventListener("change", (event) => event.target.files.length && take(event.target.files[0]));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    get("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => event.relatedTarget === null && (get("drop").hidden = true));
  addEventListener("drop", (event) => {
    event.preventDefault();
    get("drop").hidden = true;
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
  addEventListener("resize", () => view?.blocks.length && paint());
  addEventListener("hashchange", () => {
    readLink();
    upload = null;
    load();
  });
}

function take(file) {
  if (file.size > about.most_bytes) {
    return tell(new Error(`${file.name} has ${(file.size / 2 ** 20).toFixed(0)} MB; at most ${about.most_bytes / 2 ** 20} are taken here`));
  }
  const suffix = /\.[^.]*$/.exec(file.name)?.[0].toLowerCase() ?? "";
  if (!about.suffixes.includes(suffix)) {
    return tell(new Error(`${file.name}: expected a file that ends in ${about.suffixes.join(", ")}`));
  }
  [upload, state.node, state.off] = [{ file, suffix }, null, new Set()];
  return load();
}

function legend() {
  const scale = get("bar").getContext("2d");
  const image = scale.createImageData(256, 1);
  for (let i = 0; i < 256; i++) image.data.set([...HEAT.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  scale.putImageData(image, 0, 0);
  const names = about.categories.slice(0, 40);
  const colours = coloursOf(about);
  get("legend").replaceChildren(
    ...names.map((name, label) => {
      const entry = document.createElement("li");
      const colour = document.createElement("canvas");
      [colour.width, colour.height] = [1, 1];
      const context = colour.getContext("2d");
      context.fillStyle = `rgb(${colours[label].join()})`;
      context.fillRect(0, 0, 1, 1);
      entry.append(colour, name);
      return entry;
    }),
  );
}

async function begin() {
  readLink();
  try {
    about = await (await ask("api/about")).json();
  } catch (error) {
    return tell(error);
  }
  const points = about.task === "pointcloud";
  get("title").textContent = `explore ${about.title}`;
  document.title = `${about.title}: latentgnn explore`;
  get("file").accept = about.suffixes.join(",");
  if (!(Number.isInteger(state.input) && state.input >= 0 && state.input < about.names.length)) state.input = 0;
  choices(get("input"), about.names.map((name, number) => [String(number), name]), String(state.input));
  get("smooth-row").hidden = get("found-row").hidden = points;
  get("score-row").hidden = about.task !== "detection";
  get("found-name").textContent = about.task === "detection" ? "detections" : "classes";
  get("help").textContent = points
    ? "Move over a point to see its row, click to pin it, Escape lets it go. Drag or Shift and arrow keys turn, the wheel or + and - bring it nearer, arrow keys go to the next node."
    : "Move over the picture to see a node's row, click to pin it, Escape lets it go. Arrow keys go to the next node, with Shift by five.";
  legend();
  listen();
  if (about.names.length) return load();
  get("status").textContent = `Drop ${points ? "a scan" : "an image"} on this page, or open a file.`;
}

begin();
