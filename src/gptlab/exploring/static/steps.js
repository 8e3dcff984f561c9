// Generation, one token after the other: what could have come, and what the cache holds.
import { el, fixed, labelled, memory, percent, quoted, table, whole } from "./dom.js";
import { ask, exported } from "./api.js";
import { ModelPicker } from "./pickers.js";
import { state } from "./state.js";
import { Task, whenSeen } from "./parts.js";

const PACE = 450; // milliseconds a step when it plays

/** Layers in words: "layer 3", "layers 0 to 29" or "layers 0, 2, 4". */
function named(layers) {
  const first = layers[0], last = layers.at(-1);
  if (layers.length === 1) return `layer ${first}`;
  return last - first === layers.length - 1 ? `layers ${first} to ${last}` : `layers ${layers.join(", ")}`;
}

/** The slots of the cache of layers that hold the same; the one that was written last is marked, and what it held before is said. */
function slotsOf(layers, now, before, window, sinks) {
  const changed = now.map((position, slot) => before && slot < before.length && before[slot] !== position ? slot : -1).filter((slot) => slot >= 0);
  const added = before ? now.length - before.length : 0;
  const cells = now.map((position, slot) => {
    const kind = position < 0 ? "empty" : changed.includes(slot) || (added > 0 && slot >= before.length) ? "written" : position < sinks ? "sink" : "full";
    return el("span", { className: `slot ${kind}`, title: position < 0 ? `slot ${slot}: empty` : `slot ${slot}: position ${position}` });
  });
  const filled = now.filter((position) => position >= 0), oldest = Math.min(...filled);
  const words = changed.length && before[changed[0]] >= 0
    ? `slot ${changed[0]} is overwritten: position ${before[changed[0]]} goes, ${now[changed[0]]} comes`
    : before ? `one more slot: position ${Math.max(...filled)}` : "the prompt has been read";
  const kind = window === null ? "keeps everything" : `window ${whole(window)}`;
  return el("div", { className: "cache" }, el("p", { className: "note" }, el("strong", {}, named(layers)), `, ${kind}: ${whole(filled.length)} slots${layers.length > 1 ? " each" : ""}, positions ${whole(oldest)} to ${whole(Math.max(...filled))}; ${words}`),
    el("div", { className: "slots", role: "img", "aria-label": `${named(layers)}: ${words}` }, ...cells));
}

function candidates(step) {
  const rows = step.candidates.some(([text]) => text === step.chosen[0]) ? step.candidates : [...step.candidates, step.chosen];
  const bar = (share) => {
    const inner = el("span", { className: "filled" });
    inner.style.width = percent(share);
    return el("span", { className: "meter" }, inner);
  };
  return table("What could come, and how likely the model found it", ["token", "probability", "chance to be drawn"], rows.map(([text, probability, chance]) => [
    el("span", { className: text === step.chosen[0] ? "drawn" : "" }, `${quoted(text)}${text === step.chosen[0] ? " \u2190 drawn" : ""}`),
    el("span", {}, bar(probability), percent(probability)), percent(chance)]));
}

export function startSteps(root) {
  const settings = { ...state.settings.steps };
  const controls = el("div", { className: "controls" });
  const task = new Task("generating\u2026");
  const picker = new ModelPicker(-1, () => refresh());
  root.append(el("p", {}, "The text above goes on, token by token. A layer with a window keeps its keys and values in a ring: when it is full, the newest overwrites the oldest that no query can see any more."),
    controls, task.root);
  let timer;

  function player(answer, content) {
    const { steps } = answer;
    const last = steps.length - 1;
    const range = el("input", { type: "range", min: 0, max: last, value: 0, name: "step" });
    const output = el("output"), shown = el("div");
    const play = el("button", { type: "button" }, "play");
    const seconds = steps.slice(1).reduce((sum, step) => sum + step.seconds, 0);
    const speed = last ? `${fixed(last / seconds, 0)} tokens/s in plain PyTorch, one at a time, after the prompt (${whole(1000 * steps[0].seconds)} ms)` : `${whole(1000 * steps[0].seconds)} ms for the prompt`;

    function show() {
      const at = Number(range.value), step = steps[at], before = at ? steps[at - 1] : null;
      output.textContent = `${at + 1} of ${steps.length}`;
      const text = steps.slice(0, at).map((other) => other.chosen[0]).join("");
      shown.replaceChildren(
        el("p", { className: "grown" }, el("span", { className: "note" }, "\u2026 "), text, el("mark", {}, step.chosen[0].replaceAll("\n", "\u21b5\n"))),
        el("p", { className: "summary" }, `Cache: ${memory(step.bytes)} for ${whole(answer.prompt + at)} tokens. ${speed}.`),
        el("div", { className: "two" }, candidates(step), el("div", {},
          ...step.slots.map((slots, i) => slotsOf(answer.layers[i], slots, before?.slots[i], answer.windows[i], answer.sinks)))));
    }
    function stop() {
      clearInterval(timer);
      timer = undefined;
      play.textContent = "play";
    }
    stop();
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (Number(range.value) === last) range.value = 0;
      play.textContent = "stop";
      timer = setInterval(() => {
        range.value = Number(range.value) + 1;
        show();
        if (Number(range.value) === last) stop();
      }, PACE);
      return undefined;
    });
    range.addEventListener("input", () => { stop(); show(); });
    content.replaceChildren(el("div", { className: "controls" }, play, labelled("step", range, output)), shown);
    show();
  }

  function number(text, name, attributes) {
    const input = el("input", { type: "number", name, value: settings[name], disabled: exported, ...attributes });
    input.addEventListener("change", () => {
      settings[name] = Number(input.value);
      compute();
    });
    return labelled(text, input);
  }
  const compute = () => {
    clearInterval(timer);
    task.run((signal) => ask("steps", { model: picker.model, text: state.text, ...settings }, signal), player);
  };
  function refresh() {
    controls.replaceChildren(picker.control(), number("tokens", "n", { min: 1, max: 200 }), number("temperature", "temperature", { min: 0, max: 100, step: 0.1 }), number("seed", "seed", { min: 0, step: 1 }));
    compute();
  }
  whenSeen(root, ["text", "chosen"], refresh);
}
