// What positions do: scores by distance, and a text that is moved.
import { el, fixed, labelled, select, signed, table, whole } from "./dom.js";
import { ask } from "./api.js";
import { lineChart } from "./chart.js";
import { headPicker, layerPicker, ModelPicker } from "./pickers.js";
import { state } from "./state.js";
import { Task, whenSeen } from "./parts.js";

const EXACT = 1e-4; // what rounding alone may do

function startScores(root) {
  const controls = el("div", { className: "controls" });
  const task = new Task("loading and reading\u2026");
  const picker = new ModelPicker(-1, () => refresh());
  let pair = "";
  root.append(el("h3", {}, "Score against distance"),
    el("p", {}, "The score of a key is what the softmax turns into its weight. This is the mean over all queries of the text, by how far back the key stands. Rotary positions rotate pairs of channels, each at its own speed; the sum of the pairs is the score."),
    controls, task.root);

  function draw({ answer, layer, head }, content) {
    const { total, pairs, angles, note } = answer;
    const series = [];
    if (pairs) pairs.forEach((values, i) => String(i) !== pair && series.push({ values, className: "faint" }));
    series.push({ values: total, className: "total" });
    if (pairs && pair !== "") series.push({ values: pairs[pair], className: "picked" });
    const chart = lineChart({ series, across: "tokens back", up: "mean score", label: `Mean score against distance of layer ${layer}, head ${head}, of ${picker.model}` });
    const places = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256].filter((d) => d < total.length);
    const rows = [["sum", ...places.map((d) => fixed(total[d], 2))]];
    if (pairs && pair !== "") rows.push([`pair ${pair}`, ...places.map((d) => fixed(pairs[pair][d], 2))]);
    const parts = [chart, el("p", { className: "key note" }, el("span", { className: "swatch total" }), "sum ", ...(pairs ? [el("span", { className: "swatch faint" }), "each pair ", el("span", { className: "swatch picked" }), "the pair chosen"] : [])),
      table("Mean score by distance", ["tokens back", ...places.map(whole)], rows)];
    if (pairs) {
      const words = (i) => `pair ${i}: once round in ${fixed((2 * Math.PI) / angles[i], angles[i] > 0.1 ? 1 : 0)} tokens`;
      const chooser = select([["", "none"], ...angles.map((_, i) => [i, words(i)])], pair, (value) => { pair = value; draw({ answer, layer, head }, content); content.querySelector("select").focus(); });
      parts.unshift(labelled("show one pair", chooser));
    } else parts.push(el("p", { className: "note" }, `${note[0].toUpperCase()}${note.slice(1)}.`));
    content.replaceChildren(...parts);
  }

  async function refresh() {
    pair = "";
    task.run(async (signal) => {
      const facts = await ask("facts", { model: picker.model }, signal);
      controls.replaceChildren(picker.control(), layerPicker(facts), headPicker(facts));
      const layer = Math.min(state.layer, facts.layers - 1), head = Math.min(state.head, facts.heads - 1);
      return { answer: await ask("scores", { model: picker.model, text: state.text, layer, head }, signal), layer, head };
    }, draw);
  }
  whenSeen(root, ["text", "chosen", "layer", "head"], refresh);
}

function startShift(root) {
  const { shifts } = state.settings;
  let by = 64;
  const output = el("output", {}, whole(by));
  const range = el("input", { type: "range", min: 0, max: shifts.length - 1, value: shifts.indexOf(by), name: "by" });
  range.setAttribute("aria-valuetext", `${by} positions`);
  const rows = el("div", { className: "cards" });
  const tasks = new Map();
  root.append(el("h3", {}, "The same text, further on"),
    el("p", {}, "All tokens are moved by so many positions, as if something stood before them that nobody can see. Rotary positions see distances only, so that nothing changes but rounding. Learned positions are other numbers at every place. Sinks are the first positions: a text that is moved past them has none."),
    el("div", { className: "controls" }, labelled("positions to move by", range, output)), rows);

  const says = (change) => (change < EXACT ? "stays" : "moves");
  function refresh() {
    rows.replaceChildren(...state.chosen.map((name) => {
      if (!tasks.has(name)) tasks.set(name, new Task("moving the text\u2026"));
      const task = tasks.get(name);
      task.run((signal) => ask("shift", { model: name, text: state.text, by }, signal), (found, content) => content.replaceChildren(
        table(`${name} moved by ${by} positions`, ["", "value", ""], [
          ["loss before, nats per token", fixed(found.before, 3), ""],
          ["loss after", fixed(found.after, 3), signed(found.after - found.before, 3)],
          ["largest change of a token's loss, nats", fixed(found.largestLossChange, 3), says(found.largestLossChange)],
          ["largest change of a weight", fixed(found.largestWeightChange, 3), says(found.largestWeightChange)],
        ])));
      return el("article", { className: "card" }, el("h4", {}, name), task.root);
    }));
  }
  range.addEventListener("input", () => {
    by = shifts[range.value];
    output.textContent = whole(by);
    range.setAttribute("aria-valuetext", `${by} positions`);
    refresh();
  });
  whenSeen(root, ["text", "chosen"], refresh);
}

export function startPositions(root) {
  const scores = el("div"), shift = el("div");
  root.append(scores, shift);
  startScores(scores);
  startShift(shift);
}
