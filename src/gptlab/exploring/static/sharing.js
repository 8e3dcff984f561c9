// Grouped queries: fewer key heads, in closed form, and what that loses.
import { el, fixed, labelled, memory, percent, signed } from "./dom.js";
import { ask } from "./api.js";
import { smallMap } from "./maps.js";
import { layerPicker, ModelPicker } from "./pickers.js";
import { state } from "./state.js";
import { Task, whenSeen } from "./parts.js";

let unfolded = null; // whether all layers are listed; null: where they are few
const FEW = 6;
let wanted = null; // key heads; null: as many as the model's next smaller number

export const keyHeadsOf = (facts) =>
  Array.from({ length: facts.keyHeads }, (_, i) => i + 1).filter((n) => facts.heads % n === 0);

/** One layer: a bracket for each key head over the query heads that share it. */
function brackets(answer, layer) {
  const groups = answer.groups[layer].map((heads, key) => el("li", { className: "group" },
    el("span", { className: "keyhead" }, `key head ${key}`),
    el("ul", {}, ...heads.map((head) => el("li", {}, el("strong", {}, `head ${head}`),
      el("span", {}, `looks ${percent(answer.keyErrors[layer][head])}`), el("span", {}, `writes ${percent(answer.valueErrors[layer][head])}`))))));
  const lost = `looking ${percent(answer.layerKeyErrors[layer])}, writing ${percent(answer.layerValueErrors[layer])}`;
  return el("div", { className: "grouping" }, el("p", { className: "note" }, el("strong", {}, `layer ${layer}`), `: lost of all heads together: ${lost}`), el("ul", { className: "groups" }, ...groups));
}

function beforeAndAfter(before, after) {
  const [heads, size] = before.shape;
  const one = (answer, head, when) => {
    const canvas = smallMap(answer.data.subarray(head * size * size, (head + 1) * size * size), size);
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `head ${head}, ${when}`);
    return canvas;
  };
  const note = (text) => el("p", { className: "note" }, text);
  return el("div", { className: "pairs" }, ...Array.from({ length: heads }, (_, head) =>
    el("div", {}, note(`head ${head}, before`), one(before, head, "before"), note("after"), one(after, head, "after"))));
}

/** The brackets of every layer, folded where there are many. */
function allLayers(answer) {
  const n = answer.groups.length;
  const details = el("details", { open: unfolded ?? n <= FEW }, el("summary", {}, `All ${n} layers`), ...answer.groups.map((_, layer) => brackets(answer, layer)));
  details.addEventListener("toggle", () => (unfolded = details.open));
  return details;
}

export function startSharing(root) {
  const controls = el("div", { className: "controls" });
  const picker = new ModelPicker(0, () => refresh());
  const task = new Task("converting\u2026");
  root.append(el("p", {}, "With grouped queries several query heads share one key and one value. Fewer key heads make the cache smaller. Which heads share, and what they share, is computed from the weights at once, without training."),
    controls, task.root);

  function slider(facts) {
    const possible = keyHeadsOf(facts);
    const at = wanted !== null && possible.includes(wanted) ? possible.indexOf(wanted) : Math.max(possible.length - 2, 0);
    const value = el("output", {}, `${possible[at]} of ${facts.heads}`);
    const range = el("input", { type: "range", min: 0, max: possible.length - 1, value: at, name: "n_kv_head" });
    range.setAttribute("aria-valuetext", `${possible[at]} key heads`);
    range.addEventListener("input", () => {
      wanted = possible[range.value];
      value.textContent = `${wanted} of ${facts.heads}`;
      range.setAttribute("aria-valuetext", `${wanted} key heads`);
      compute(facts);
    });
    wanted = possible[at];
    return labelled("key heads", range, value);
  }

  function compute(facts) {
    const layer = Math.min(state.layer, facts.layers - 1);
    const body = { model: picker.model, text: state.text }, n_kv_head = wanted;
    task.run(async (signal) => {
      const answer = await ask("share", { ...body, n_kv_head }, signal);
      const before = await ask("maps", { ...body, layer, size: state.settings.small }, signal);
      const after = await ask("maps", { ...body, layer, size: state.settings.small, n_kv_head }, signal);
      return { answer, before, after };
    }, ({ answer, before, after }, content) => {
      const loss = `Loss of this text: ${fixed(answer.before, 3)} nats per token before, ${fixed(answer.after, 3)} after (${signed(answer.after - answer.before, 3)}).`;
      const cache = answer.cacheBytesPerToken.map((n) => memory(n)).join(" before, ");
      content.replaceChildren(
        el("p", { className: "summary" }, loss, ` Cache per token: ${cache} after (bfloat16).`),
        el("p", { className: "note" }, "Percentages are the share of a head's circuit that is lost: \u201clooks\u201d is where it looks (QK), \u201cwrites\u201d what it adds (OV). 0% is nothing, 100% as much as there was."),
        brackets(answer, layer), beforeAndAfter(before, after), allLayers(answer));
    });
  }

  async function refresh() {
    try {
      const facts = await ask("facts", { model: picker.model });
      controls.replaceChildren(picker.control(), slider(facts), layerPicker(facts));
      compute(facts);
    } catch (error) {
      controls.replaceChildren(picker.control());
      task.say(error.message, true);
    }
  }
  whenSeen(root, ["text", "chosen", "layer"], refresh);
}
