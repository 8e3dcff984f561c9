// What the whole page is about: one text, some models side by side, and one model and head where only one can be shown.

export const state = { models: [], chosen: [], text: "", focus: "", layer: 0, head: 0 };

const listeners = [];

/** Call `listener(changed)` after every change, with the set of names that changed. */
export function subscribe(listener) {
  listeners.push(listener);
}

export function update(changes) {
  if (changes.chosen && !changes.chosen.includes(state.focus)) changes = { ...changes, focus: changes.chosen.at(-1) };
  const changed = new Set(Object.keys(changes).filter((name) => JSON.stringify(state[name]) !== JSON.stringify(changes[name])));
  Object.assign(state, changes);
  if (changed.size) for (const listener of listeners) listener(changed);
}
