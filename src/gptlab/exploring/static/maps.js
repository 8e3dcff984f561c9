// Where the heads look: all of them, one, and back.
import { el, fixed, quoted, table, whole } from "./dom.js";
import { ask } from "./api.js";
import { onPaletteChange } from "./colours.js";
import { HIDDEN, paintMap, paintMarks, weightOf } from "./map.js";
import { state, subscribe, update } from "./state.js";
import { Cards, Task, whenSeen } from "./parts.js";
import { tokenView } from "./tokens.js";

const LISTED = 8; // keys in the table of a query
const inPlaces = (weight) => fixed(weight, weight < 0.01 ? 4 : 3); // as many as 8 bits are good for

const repaints = new Set(); // what to draw again when light turns dark
onPaletteChange(() => repaints.forEach((repaint) => repaint()));

/** A small map on a button or alone. `bytes` are those of one head. */
export function smallMap(bytes, size) {
  const canvas = el("canvas", { className: "map" });
  const paint = () => (canvas.isConnected || !canvas.width ? paintMap(canvas, bytes, size) : repaints.delete(paint));
  paintMap(canvas, bytes, size);
  repaints.add(paint);
  return canvas;
}

/** A bracket over the query heads that share a key head; none where each has its own. */
function sharedKeys({ heads, keyHeads }) {
  if (keyHeads === heads) return [];
  return Array.from({ length: keyHeads }, (_, key) => {
    const bracket = el("span", { className: "bracket", title: `query heads ${key * heads / keyHeads} to ${(key + 1) * heads / keyHeads - 1} share key head ${key}` }, `key head ${key}`);
    bracket.style.gridColumn = `span ${heads / keyHeads}`;
    return bracket;
  });
}

/** All heads of a model, a row for each layer; `open(layer, head)` is what a click does, `made` hears of each button, `progress` how far it is. */
function overview(name, facts, open, made, progress) {
  const rows = Array.from({ length: facts.layers }, () => new Task(""));
  const root = el("div", { className: "heads" }, ...rows.map((row, layer) =>
    el("div", { className: "layer" }, el("span", { className: "note" }, `layer ${layer}`), row.root)));
  const buttons = [];

  root.addEventListener("keydown", (event) => {
    const at = buttons.findIndex((row) => row?.includes(event.target));
    if (at < 0) return;
    const head = buttons[at].indexOf(event.target);
    const moves = { ArrowLeft: [at, head - 1], ArrowRight: [at, head + 1], ArrowUp: [at - 1, head], ArrowDown: [at + 1, head] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [layer, other] = moves[event.key];
    buttons[layer]?.[other]?.focus();
  });

  async function load(signal) {
    let done = 0;
    const count = () => !signal.aborted && progress(done < facts.layers ? `${done} of ${facts.layers} layers\u2026` : "");
    count();
    await Promise.all(rows.map((row, layer) => row.run(
      () => ask("maps", { model: name, text: state.text, layer, size: state.settings.small }, signal),
      ({ shape: [heads, size], data }, content) => {
        buttons[layer] = Array.from({ length: heads }, (_, head) => {
          const bytes = data.subarray(head * size * size, (head + 1) * size * size);
          const button = el("button", { type: "button", className: "head", "aria-label": `${name}, layer ${layer}, head ${head}`, title: `layer ${layer}, head ${head}` }, smallMap(bytes, size));
          button.addEventListener("click", () => open(layer, head));
          return button;
        });
        content.style.gridTemplateColumns = `repeat(${heads}, minmax(0, 8.5rem))`;
        content.replaceChildren(...sharedKeys(facts), ...buttons[layer]);
        buttons[layer].forEach((button, head) => made(button, layer, head));
      },
    ).then(() => {
      done += 1;
      count();
    })));
  }
  return { root, load };
}

/** One head of one model, at one pixel or more for each token. */
class SingleMap {
  constructor(name, moved) {
    this.name = name;
    this.moved = moved;
    this.map = el("canvas", { className: "map" });
    this.marks = el("canvas", { className: "marks" });
    this.frame = el("div", { className: "frame", tabIndex: 0, role: "application", "aria-roledescription": "attention map" }, this.map, this.marks);
    this.words = el("p", { className: "readout", role: "status" });
    this.rest = el("div");
    this.root = el("div", { className: "single" }, this.frame, el("div", {}, this.words, this.rest));
    this.frame.addEventListener("pointermove", (event) => this.point(event));
    this.frame.addEventListener("pointerdown", (event) => this.point(event));
    this.frame.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.paintMarks()).observe(this.frame);
    repaints.add(() => this.tokens && this.paint());
  }

  show({ tokens, bytes, window, sinks, label, cursor }) {
    Object.assign(this, { tokens, bytes, window, sinks, size: tokens.length });
    this.cursor = this.within(cursor);
    this.frame.setAttribute("aria-label", label);
    this.view = tokenView({
      tokens, label: `${this.name}: the text, coloured by the weight of each key`,
      classOf: (i) => this.shade(i), describe: (i) => this.about(this.cursor.query, i),
      onCursor: (i) => i <= this.cursor.query && this.moved({ query: this.cursor.query, key: i }),
    });
    this.best = el("div");
    this.rest.replaceChildren(this.view.root, this.best);
    this.paint();
    this.move(cursor);
  }

  paint() {
    paintMap(this.map, this.bytes, this.size);
    this.paintMarks();
  }

  paintMarks() {
    if (this.tokens) paintMarks(this.marks, { tokens: this.size, window: this.window, sinks: this.sinks, cursor: this.cursor });
  }

  byte(query, key) {
    return this.bytes[query * this.size + key];
  }

  shade(i) {
    if (i > this.cursor.query) return "later";
    const byte = this.byte(this.cursor.query, i);
    const chosen = i === this.cursor.query ? " query" : "";
    return (byte === HIDDEN ? "hidden" : `weight${Math.min(7, Math.floor(Math.sqrt(weightOf(byte)) * 10))}`) + chosen;
  }

  about(query, key) {
    const pair = `query ${query} ${quoted(this.tokens[query])}, key ${key} ${quoted(this.tokens[key])}`;
    if (key > query) return `${pair}: comes later`;
    const back = query - key, byte = this.byte(query, key);
    const where = `${whole(back)} token${back === 1 ? "" : "s"} back`;
    if (byte === HIDDEN) return `${pair}: hidden, ${where} and outside the window`;
    const sink = key < this.sinks && this.window !== null && back >= this.window ? ", a sink" : "";
    return `${pair}: weight ${inPlaces(weightOf(byte))}, ${where}${sink}`;
  }

  /** A cursor may come from a longer text. */
  within({ query, key }) {
    return { query: Math.min(query, this.size - 1), key: Math.min(key, query, this.size - 1) };
  }

  move(cursor) {
    this.cursor = this.within(cursor);
    this.frame.dataset.query = this.cursor.query;
    this.frame.dataset.key = this.cursor.key;
    this.words.textContent = this.about(this.cursor.query, this.cursor.key);
    this.view.paint();
    this.view.setCursor(this.cursor.key);
    this.view.reveal(this.cursor.query);
    this.paintMarks();
    const { query } = this.cursor;
    const keys = Array.from({ length: query + 1 }, (_, key) => key).filter((key) => this.byte(query, key) !== HIDDEN)
      .sort((a, b) => this.byte(query, b) - this.byte(query, a)).slice(0, LISTED);
    this.best.replaceChildren(table(`What query ${query} looks at most`, ["key", "back", "weight"],
      keys.map((key) => [`${key} ${quoted(this.tokens[key])}`, whole(query - key), inPlaces(weightOf(this.byte(query, key)))])));
  }

  point(event) {
    const box = this.map.getBoundingClientRect();
    const at = (place, start, length) => Math.max(0, Math.min(this.size - 1, Math.floor(((place - start) / length) * this.size)));
    const query = at(event.clientY, box.top, box.height), key = at(event.clientX, box.left, box.width);
    if (key <= query) this.moved({ query, key });
  }

  key(event) {
    const far = event.shiftKey ? 10 : 1, { query, key } = this.cursor;
    const moves = { ArrowLeft: [query, key - far], ArrowRight: [query, key + far], ArrowUp: [query - far, key], ArrowDown: [query + far, key] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [q, k] = moves[event.key].map((i) => Math.max(0, Math.min(this.size - 1, i)));
    this.moved({ query: q, key: Math.min(k, q) });
  }
}

export function startMaps(root) {
  let single = false, returning = null, cursor = { query: Number.MAX_SAFE_INTEGER, key: 0 };
  const back = el("button", { type: "button", className: "back" }, "\u2190 all heads");
  const title = el("strong");
  const bar = el("div", { className: "controls", hidden: true }, back, title);
  const grid = el("div", { className: "cards" });

  const cards = new Cards(grid, (name) => {
    const task = new Task("loading and reading\u2026"), loading = new AbortController();
    const one = new SingleMap(name, (to) => {
      cursor = to;
      for (const card of cards.cards.values()) if (card.one.tokens) card.one.move(to);
    });
    return { name, task, one, root: el("article", { className: "card" }, el("h3", {}, name), task.root), stop: () => { task.stop(); loading.abort(); } };
  });

  function open(layer, head) {
    update({ layer, head });
    single = true;
    refresh();
    back.focus();
  }
  function close() {
    single = false;
    returning = [state.layer, state.head];
    refresh();
    root.scrollIntoView({ block: "nearest" });
  }
  back.addEventListener("click", close);
  root.addEventListener("keydown", (event) => event.key === "Escape" && single && close());

  async function showAll(card, signal) {
    const facts = await ask("facts", { model: card.name }, signal);
    return overview(card.name, facts, open, (button, layer, head) => {
      if (returning?.[0] !== layer || returning[1] !== head) return;
      returning = null;
      button.focus({ preventScroll: true });
    }, (words) => card.task.progress(words));
  }

  async function showOne(card, signal) {
    const body = { model: card.name, text: state.text };
    const [facts, { tokens }] = await Promise.all([ask("facts", { model: card.name }, signal), ask("losses", body, signal)]);
    const layer = Math.min(state.layer, facts.layers - 1), head = Math.min(state.head, facts.heads - 1);
    const { data } = await ask("maps", { ...body, layer, head }, signal);
    const label = `${card.name}, layer ${layer}, head ${head}: use the arrow keys to move the query and the key`;
    const note = layer === state.layer && head === state.head ? "" : `${card.name} has fewer: this is layer ${layer}, head ${head}.`;
    return { tokens, bytes: data, window: facts.windows[layer], sinks: facts.sinks, label, cursor, note };
  }

  function refresh() {
    bar.hidden = !single;
    title.textContent = `layer ${state.layer}, head ${state.head}`;
    grid.classList.toggle("one", single);
    for (const card of cards.show(state.chosen)) {
      if (single) {
        card.task.run((signal) => showOne(card, signal), (shown, content) => {
          content.replaceChildren(...(shown.note ? [el("p", { className: "note" }, shown.note)] : []), card.one.root);
          card.one.show(shown);
        });
      } else {
        card.task.run((signal) => showAll(card, signal).then((all) => ({ all, signal })), ({ all, signal }, content) => {
          content.replaceChildren(all.root);
          all.load(signal);
        });
      }
    }
  }

  root.append(el("p", {}, "A row is a query, a column a key: the darker (in the dark: the brighter), the larger the weight; colours go with its square root. Weights of a query sum to 1. They are sent in 8 bits and are within 0.004 of the model's own."),
    el("p", { className: "key note" }, el("span", { className: "swatch strong" }), "much weight ", el("span", { className: "swatch weak" }), "little ", el("span", { className: "swatch hidden" }), "hidden by the window ", el("span", { className: "swatch edge" }), "edge of the window, end of the sinks"),
    bar, grid);
  subscribe((changed) => changed.has("text") && (cursor = { query: Number.MAX_SAFE_INTEGER, key: 0 }));
  subscribe((changed) => single && (changed.has("layer") || changed.has("head")) && refresh());
  whenSeen(root, ["text", "chosen"], refresh);
}
