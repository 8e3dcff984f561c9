// Choosing the one model, layer and head that a section shows.
import { labelled, select } from "./dom.js";
import { state, update } from "./state.js";

/** One of the models that are side by side; `at` says which one it is at first: 0 the first, -1 the last. */
export class ModelPicker {
  constructor(at, change) {
    this.at = at;
    this.change = change;
    this.picked = null;
  }

  get model() {
    return state.chosen.includes(this.picked) ? this.picked : state.chosen.at(this.at);
  }

  control() {
    const own = select(state.chosen.map((name) => [name, name]), this.model, (name) => {
      this.picked = name;
      this.change();
    });
    return labelled("model", own);
  }
}

const numbers = (n) => Array.from({ length: n }, (_, i) => [i, i]);

export function layerPicker(facts) {
  const layer = Math.min(state.layer, facts.layers - 1);
  return labelled("layer", select(numbers(facts.layers), layer, (value) => update({ layer: Number(value) })));
}

export function headPicker(facts) {
  const head = Math.min(state.head, facts.heads - 1);
  return labelled("head", select(numbers(facts.heads), head, (value) => update({ head: Number(value) })));
}
