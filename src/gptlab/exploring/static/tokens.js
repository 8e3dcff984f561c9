// A text as tokens, coloured, with a cursor that keys and the pointer move.
import { el } from "./dom.js";

/**
 * Show tokens in a row. `classOf(i)` colours token i, `describe(i)` says in words what there is to know of it,
 * `onCursor(i)` hears where the cursor goes. Returns `{root, paint(), setCursor(i), reveal(i)}`.
 */
export function tokenView({ tokens, label, classOf, describe, onCursor = () => {} }) {
  const marks = tokens.map((token, i) => el("span", { data: { i } }, ...spelled(token)));
  const root = el("div", { className: "tokens", tabIndex: 0, role: "application", "aria-roledescription": "text", "aria-label": label }, ...marks);
  let cursor = -1;

  const paint = () => marks.forEach((mark, i) => {
    mark.className = `token ${classOf(i)}${i === cursor ? " cursor" : ""}`;
    mark.title = describe(i);
  });
  const setCursor = (i) => {
    marks[cursor]?.classList.remove("cursor");
    cursor = i;
    marks[i]?.classList.add("cursor");
  };
  const go = (i) => {
    if (i < 0 || i >= tokens.length || i === cursor) return;
    setCursor(i);
    onCursor(i);
  };
  root.addEventListener("pointerover", (event) => {
    const mark = event.target.closest("[data-i]");
    if (mark) go(Number(mark.dataset.i));
  });
  root.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: cursor - 1, ArrowRight: cursor + 1, ArrowUp: cursor - 10, ArrowDown: cursor + 10, Home: 0, End: tokens.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    go(Math.max(0, Math.min(tokens.length - 1, moves[event.key])));
  });
  root.addEventListener("focus", () => cursor < 0 && go(Math.min(1, tokens.length - 1)));
  /** Scroll the text, and nothing else, to a token; not while somebody is in it. */
  const reveal = (i) => {
    if (!root.matches(":hover, :focus")) root.scrollTop += marks[i].getBoundingClientRect().top - root.getBoundingClientRect().top - root.clientHeight / 2;
  };
  paint();
  return { root, paint, setCursor, reveal };
}

/** Line breaks are shown, and still break the line. */
function spelled(token) {
  return token.split("\n").flatMap((line, i) => (i ? [el("i", {}, "\u21b5"), "\n", line] : [line]));
}
