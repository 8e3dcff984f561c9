// Parts of the page that compute: when they come into view, again when what they depend on changes, and never twice at once.
import { el } from "./dom.js";
import { subscribe } from "./state.js";

/** A place that shows what it is waiting for, then the result of `load(signal)`, or in a sentence why there is none. */
export class Task {
  constructor(waiting = "computing\u2026") {
    this.waiting = waiting;
    this.words = el("span", { role: "status" });
    this.clock = el("span", { "aria-hidden": "true" }); // what changes every second is not read out
    this.status = el("p", { className: "status note" }, this.words, this.clock);
    this.content = el("div", { className: "content" });
    this.root = el("div", { className: "task" }, this.status, this.content);
    this.running = null;
  }

  async run(load, show) {
    this.running?.abort();
    const own = new AbortController();
    this.running = own;
    this.say(this.waiting);
    this.root.setAttribute("aria-busy", "true");
    this.clock.textContent = "";
    const began = performance.now(), timer = setInterval(() => {
      if (this.running === own) this.clock.textContent = ` ${Math.round((performance.now() - began) / 1000)} s`;
    }, 1000);
    try {
      const result = await load(own.signal);
      if (own.signal.aborted) return;
      this.say("");
      show(result, this.content);
    } catch (error) {
      if (own.signal.aborted) return;
      this.say(error.message, true);
      this.content.replaceChildren();
    } finally {
      clearInterval(timer);
      if (this.running === own) {
        this.clock.textContent = "";
        this.root.setAttribute("aria-busy", "false");
      }
    }
  }

  stop() {
    this.running?.abort();
  }

  /** Say how far it is; what is shown already counts. */
  progress(text) {
    this.say(text);
    this.content.classList.remove("old");
  }

  say(text, failed = false) {
    this.words.textContent = text;
    this.status.classList.toggle("warning", failed);
    this.status.hidden = !text;
    this.content.classList.toggle("old", Boolean(text) && !failed);
  }
}

/** Call `refresh` when a section is near the view, and after changes of any of the named parts of the state. */
export function whenSeen(root, names, refresh) {
  let seen = false, due = true;
  const go = () => {
    if (!seen || !due) return;
    due = false;
    refresh();
  };
  new IntersectionObserver((entries) => {
    seen = entries.at(-1).isIntersecting;
    go();
  }, { rootMargin: "200px" }).observe(root);
  subscribe((changed) => {
    if (!names.some((name) => changed.has(name))) return;
    due = true;
    go();
  });
}

/** Keep one card for each of some names, in their order: `make(name)` returns `{root, stop}`. */
export class Cards {
  constructor(root, make) {
    this.root = root;
    this.make = make;
    this.cards = new Map();
  }

  show(names) {
    for (const [name, card] of this.cards) {
      if (names.includes(name)) continue;
      card.stop();
      this.cards.delete(name);
    }
    for (const name of names) if (!this.cards.has(name)) this.cards.set(name, this.make(name));
    this.root.replaceChildren(...names.map((name) => this.cards.get(name).root));
    return names.map((name) => this.cards.get(name));
  }
}
