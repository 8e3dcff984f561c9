// The first section: which text, and which models.
import { el, labelled, select, whole, memory } from "./dom.js";
import { ask, exported } from "./api.js";
import { state, update } from "./state.js";

const POSITIONS = { learned: "learned positions", rope: "rotary positions", none: "no positions", blend: "learned and rotary positions" };
const TYPING = 400; // milliseconds of rest after which a text is read

/** A model's attention in a few words. */
export function inWords(facts) {
  const windows = [...new Set(facts.windows)].map((window) => (window === null ? "no window" : `window ${whole(window)}`));
  const heads = `${facts.heads} heads on ${facts.keyHeads} key head${facts.keyHeads > 1 ? "s" : ""}`;
  return [POSITIONS[facts.position], heads, windows.join(" or "), ...(facts.sinks ? [`${facts.sinks} sinks`] : [])].join(", ");
}

function modelChoice(name) {
  const box = el("input", { type: "checkbox", checked: state.chosen.includes(name), value: name });
  const words = el("span", { className: "note" });
  box.addEventListener("change", () => {
    const chosen = state.models.filter((other) => (other === name ? box.checked : state.chosen.includes(other)));
    if (chosen.length) update({ chosen });
    else box.checked = true; // there is always one to look at
    describe();
  });
  const choice = el("label", { className: "choice" }, box, el("span", {}, el("strong", {}, name), words));
  const describe = async () => {
    if (!box.checked || choice.dataset.ready) return;
    words.textContent = "loading\u2026";
    choice.dataset.ready = "";
    try {
      const facts = await ask("facts", { model: name });
      const size = `${(facts.parameters / 1e6).toPrecision(3)}M parameters`;
      words.textContent = `${inWords(facts)}; ${size}, ${memory(facts.cacheBytesPerToken)} of cache per token (bfloat16)`;
      choice.dataset.ready = "true";
    } catch (error) {
      words.textContent = error.message;
      delete choice.dataset.ready;
    }
  };
  describe();
  return choice;
}

export function startModels(root, { examples }) {
  const area = el("textarea", { value: state.text, rows: 6, spellcheck: false, disabled: exported, id: "text" });
  let timer;
  area.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => update({ text: area.value }), TYPING);
  });
  const options = [["", "an example\u2026"], ...Object.keys(examples).map((name) => [name, name])];
  const picker = select(options, "", (name) => {
    if (!name) return;
    area.value = examples[name];
    update({ text: area.value });
  });
  picker.disabled = exported;
  const models = el("fieldset", { className: "choices" }, el("legend", {}, "models, side by side"), ...state.models.map(modelChoice));
  const remark = exported ? [el("p", { className: "note" }, "This page was exported: it shows what was computed then, for this text and these models.")] : [];
  root.append(...remark, el("div", { className: "begin" },
    el("div", {}, labelled("the text that all models read", area), labelled("or", picker)), models));
}
