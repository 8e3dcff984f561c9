// The report's calculator, with this machine's own figures.
import { el } from "./dom.js";
import { ask } from "./api.js";
import { Task, whenSeen } from "./parts.js";

export function startCosts(root) {
  const task = new Task("measuring this machine, about a second\u2026");
  root.append(el("p", {}, "Generating a token takes as long as reading the weights and the cache, or computing with them, whichever is longer. The calculator says what fewer key heads and a window change about that."), task.root);
  whenSeen(root, [], () => task.run((signal) => ask("costs", {}, signal), ({ html, data }, content) => {
    content.innerHTML = html; // written by the program, from its own template
    globalThis.startCalculator(content.querySelector(".calculator"), data);
  }));
}
