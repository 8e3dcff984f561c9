// Take something out of a model, and see what becomes of the loss.
import { el, fixed, signed } from "./dom.js";
import { ask, exported } from "./api.js";
import { changeStep } from "./colours.js";
import { ModelPicker } from "./pickers.js";
import { state } from "./state.js";
import { Task, whenSeen } from "./parts.js";
import { tokenView } from "./tokens.js";

export function startWithout(root) {
  const controls = el("div", { className: "controls" });
  const grid = new Task("measuring every head\u2026"), result = new Task("measuring\u2026");
  const picker = new ModelPicker(0, () => refresh());
  const readout = el("p", { className: "readout", role: "status" });
  let heads = new Set(), layers = new Set(), sinks = false;
  root.append(el("p", {}, "Each number is measured: the change of this text's loss, in nats per token, when that head alone writes nothing. Press heads, or a whole layer's attention, to take them out together."),
    controls, grid.root, result.root);

  /** A button that stays pressed while its part is out. */
  function toggle(words, label, pressed, change, className = "") {
    const button = el("button", { type: "button", className: `toggle ${className}`, "aria-pressed": pressed, "aria-label": label }, ...words);
    button.addEventListener("click", () => {
      if (exported) return only(change);
      button.setAttribute("aria-pressed", change());
      return measure();
    });
    return button;
  }

  /** In an exported page one part at a time is out: each has been measured alone. */
  function only(change) {
    heads = new Set(), layers = new Set(), sinks = false;
    for (const other of grid.content.querySelectorAll("[aria-pressed=true]")) other.setAttribute("aria-pressed", "false");
    document.activeElement.setAttribute("aria-pressed", change());
    measure();
  }

  const flip = (set, value) => () => (set().delete(value) ? false : Boolean(set().add(value)));

  const row = (effects, layer) => el("div", { className: "effects" },
    toggle([`layer ${layer}`], `layer ${layer}: all attention`, layers.has(layer), flip(() => layers, layer), "whole"),
    ...effects.map((nats, head) => toggle([el("span", { className: "note" }, `${head}`), signed(nats, 3)], `layer ${layer}, head ${head}: ${signed(nats, 3)} nats per token`,
      heads.has(`${layer}.${head}`), flip(() => heads, `${layer}.${head}`), `change${changeStep(nats * 5)}`)));

  /** What stands below the heads. */
  function tools(facts) {
    const sinkButton = facts.sinks
      ? toggle([`the ${facts.sinks} sinks`], `the ${facts.sinks} sinks`, sinks, () => (sinks = !sinks), "whole")
      : el("span", { className: "note" }, `${picker.model} has no sinks to take out.`);
    const clear = el("button", { type: "button" }, "put everything back");
    clear.addEventListener("click", () => {
      heads = new Set(), layers = new Set(), sinks = false;
      for (const button of grid.content.querySelectorAll("[aria-pressed=true]")) button.setAttribute("aria-pressed", "false");
      measure();
    });
    return el("div", { className: "controls" }, sinkButton, clear);
  }

  function measure() {
    const body = {
      model: picker.model, text: state.text, sinks,
      heads: [...heads].map((name) => name.split(".").map(Number)).sort(([a, b], [c, d]) => a - c || b - d),
      attention: [...layers].sort((a, b) => a - b),
    };
    if (!body.heads.length && !body.attention.length && !sinks) {
      result.stop();
      result.say("Nothing is taken out.");
      result.content.replaceChildren();
      return;
    }
    const { model, text } = body;
    result.run(async (signal) => {
      const { tokens } = await ask("losses", { model, text }, signal);
      return { tokens, ...(await ask("without", body, signal)) };
    }, ({ tokens, before, after, changes }, content) => {
      const describe = (i) => (i ? `\u201c${tokens[i]}\u201d: ${signed(changes[i - 1], 2)} nats` : "not predicted");
      const view = tokenView({ tokens, label: "the text, coloured by the change of loss", describe, classOf: (i) => (i ? `change${changeStep(changes[i - 1])}` : ""),
        onCursor: (i) => { readout.textContent = describe(i); } });
      content.replaceChildren(el("p", { className: "summary" }, `Loss of this text: ${fixed(before, 3)} nats per token with everything, ${fixed(after, 3)} without what is pressed (${signed(after - before, 3)}).`), view.root, readout);
    });
  }

  function refresh() {
    heads = new Set(), layers = new Set(), sinks = false;
    const body = { model: picker.model, text: state.text };
    controls.replaceChildren(picker.control());
    measure();
    grid.run(async (signal) => {
      const facts = await ask("facts", { model: body.model }, signal);
      const rows = el("div");
      for (let layer = 0; layer < facts.layers; layer++) {
        if (layer) grid.progress(`measuring every head: ${layer} of ${facts.layers} layers\u2026`);
        const { effects } = await ask("effects", { ...body, layer }, signal); // one at a time: others may ask between
        if (signal.aborted) return;
        if (!layer) grid.content.replaceChildren(rows, tools(facts));
        rows.append(row(effects, layer));
      }
    }, () => {});
  }
  whenSeen(root, ["text", "chosen"], refresh);
}
