// How hard each token was to predict, and the difference between two models.
import { el, fixed, labelled, quoted, select, signed, table, whole } from "./dom.js";
import { ask } from "./api.js";
import { changeStep, lossStep } from "./colours.js";
import { state, subscribe } from "./state.js";
import { Cards, Task, whenSeen } from "./parts.js";
import { tokenView } from "./tokens.js";

const found = new Map(); // answers by model, of the present text
let base = ""; // the model that the others are compared with; empty: none
let views = new Map();

const sameTokens = (a, b) => a.ids.length === b.ids.length && a.ids.every((id, i) => id === b.ids[i]);

/** Nats of token i, or how many more than the base model's; null where there is no such number. */
function valueOf(name, i) {
  const own = found.get(name), other = found.get(base);
  if (i < 1) return null;
  if (!base || name === base) return own.losses[i - 1];
  return other && sameTokens(own, other) ? own.losses[i - 1] - other.losses[i - 1] : null;
}

const compared = (name) => Boolean(base) && name !== base;

function classOf(name, i) {
  const value = valueOf(name, i);
  if (value === null) return "";
  return compared(name) ? `change${changeStep(value)}` : `loss${lossStep(value)}`;
}

function describe(name, i) {
  const { tokens, losses } = found.get(name), value = valueOf(name, i);
  const nats = i < 1 ? "not predicted" : `${fixed(losses[i - 1], 2)} nats, ${fixed(losses[i - 1] / Math.LN2, 2)} bits`;
  const change = compared(name) && value !== null ? `, ${signed(value, 2)} against ${base}` : "";
  return `${quoted(tokens[i])}: ${nats}${change}`;
}

function summary(name) {
  const { losses, total, mean, bitsPerByte } = found.get(name), other = found.get(base);
  const parts = [`${fixed(mean, 3)} nats per token`, `${fixed(bitsPerByte, 3)} bits per byte`, `${fixed(total, 1)} nats in all, ${whole(losses.length)} tokens`];
  if (!compared(name) || !other) return parts.join("; ");
  const own = found.get(name);
  parts.push(sameTokens(own, other)
    ? `${signed(mean - other.mean, 3)} nats per token against ${base}`
    : `${signed(bitsPerByte - other.bitsPerByte, 3)} bits per byte against ${base}, which cuts the text into other tokens`);
  return parts.join("; ");
}

export function startLosses(root) {
  const readout = el("p", { className: "readout", role: "status" }, "Point at a token, or focus a text and use the arrow keys.");
  const grid = el("div", { className: "cards" });
  const key = el("p", { className: "key note" });
  const chooser = el("div", { className: "controls" });
  const details = el("details", {}, el("summary", {}, "All numbers as a table"));
  const numbers = el("div"), guess = el("span");
  details.append(numbers);

  const cards = new Cards(grid, (name) => {
    const task = new Task("loading and reading\u2026");
    const line = el("p", { className: "summary" });
    const card = el("article", { className: "card" }, el("h3", {}, name), line, task.root);
    return { root: card, task, line, name, stop: () => task.stop() };
  });

  function showCursor(i) {
    const lines = state.chosen.filter((name) => found.has(name) && i < found.get(name).tokens.length);
    for (const name of lines) views.get(name)?.setCursor(i);
    readout.replaceChildren(el("span", {}, `token ${i}`), ...lines.map((name) => el("span", {}, el("strong", {}, name), ` ${describe(name, i)}`)));
  }

  function paint() {
    for (const card of cards.cards.values()) {
      if (!found.has(card.name)) continue;
      card.line.textContent = summary(card.name);
      views.get(card.name)?.paint();
    }
    const steps = base
      ? [-4, -3, -2, -1, 0, 1, 2, 3, 4].map((step) => el("span", { className: `token change${step}` }, ["\u22122", "\u22120.75", "\u22120.25", "\u22120.05", "0", "+0.05", "+0.25", "+0.75", "+2"][step + 4]))
      : [0, 1, 2, 3, 4, 5, 6, 7].map((step) => el("span", { className: `token loss${step}` }, step === 7 ? "8.75 and more" : fixed(1.25 * step, 2)));
    key.replaceChildren(base ? `nats more (+) or fewer (\u2212) than ${base}: ` : "nats: ", ...steps.flatMap((step) => [step, " "]));
    if (details.open) fill();
  }

  function fill() {
    const names = state.chosen.filter((name) => found.has(name));
    if (!names.length) return;
    const first = found.get(names[0]), alike = names.filter((name) => sameTokens(found.get(name), first));
    const rows = first.tokens.slice(1).map((token, i) => [`${i + 1} ${quoted(token)}`, ...alike.map((name) => fixed(found.get(name).losses[i], 3))]);
    numbers.replaceChildren(table("Loss of every token in nats", ["token", ...alike], rows));
  }
  details.addEventListener("toggle", () => details.open && fill());

  function choose() {
    if (!state.chosen.includes(base)) base = "";
    const options = [["", "no other: show the loss itself"], ...state.chosen.map((name) => [name, name])];
    const picker = select(options, base, (name) => { base = name; paint(); });
    chooser.replaceChildren(...(state.chosen.length > 1 ? [labelled("compare each model with", picker)] : []));
  }

  /** What a loss would be without any knowledge. */
  async function describeGuess() {
    const all = await Promise.allSettled(state.chosen.map((model) => ask("facts", { model })));
    const sizes = new Set(all.filter((one) => one.value).map((one) => one.value.vocabulary));
    guess.textContent = [...sizes].map((n) => `; a guess among all ${whole(n)} tokens is ${fixed(Math.log(n), 1)} nats`).join("");
  }

  function refresh() {
    choose();
    describeGuess();
    for (const name of found.keys()) if (!state.chosen.includes(name)) found.delete(name);
    for (const { name, task } of cards.show(state.chosen)) {
      task.run((signal) => ask("losses", { model: name, text: state.text }, signal), (answer, content) => {
        found.set(name, answer);
        const view = tokenView({
          tokens: answer.tokens, label: `${name}: the text, coloured by loss`,
          classOf: (i) => classOf(name, i), describe: (i) => describe(name, i), onCursor: showCursor,
        });
        views.set(name, view);
        content.replaceChildren(view.root);
        paint();
      });
    }
    paint();
  }

  root.append(el("p", {}, "Each token is coloured by its loss: minus the logarithm of the probability that the model gave it. 0 is certainty", guess, "."),
    chooser, key, grid, readout, details);
  subscribe((changed) => changed.has("text") && found.clear());
  whenSeen(root, ["text", "chosen"], refresh);
}
