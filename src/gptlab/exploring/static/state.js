// What the whole page is about: one text, some models side by side, one head, and what things are set to at first. Parts of the page hear of every change.

export const state = { models: [], chosen: [], text: "", layer: 0, head: 0, settings: {} };

const listeners = [];

/** Call `listener(changed)` after every change, with the set of names that changed. */
export function subscribe(listener) {
  listeners.push(listener);
}

export function update(changes) {
  const changed = new Set(Object.keys(changes).filter((name) => JSON.stringify(state[name]) !== JSON.stringify(changes[name])));
  Object.assign(state, changes);
  if (changed.size) for (const listener of listeners) listener(changed);
}
