// Choosing the one model, layer and head that a section shows.
import { labelled, select } from "./dom.js";
import { state, update } from "./state.js";

export const modelPicker = () =>
  labelled("model", select(state.chosen.map((name) => [name, name]), state.focus, (focus) => update({ focus })));

const numbers = (n) => Array.from({ length: n }, (_, i) => [i, i]);

export function layerPicker(facts) {
  const layer = Math.min(state.layer, facts.layers - 1);
  return labelled("layer", select(numbers(facts.layers), layer, (value) => update({ layer: Number(value) })));
}

export function headPicker(facts) {
  const head = Math.min(state.head, facts.heads - 1);
  return labelled("head", select(numbers(facts.heads), head, (value) => update({ head: Number(value) })));
}
