// Elements, and numbers in words.

/** Make an element: properties are set as properties, `data` as data attributes, `aria-...` and `role` as attributes. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined) continue;
    if (name === "data") Object.assign(made.dataset, value);
    else if (name in made && !name.includes("-") && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** Make an element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A labelled control: the label says what it is, with an output of its value where one is given. */
export function labelled(text, control, output = "") {
  return el("label", { className: "field" }, text, ...(output ? [" ", output] : []), control);
}

export function select(options, value, change) {
  const made = el("select", {}, ...options.map(([own, text]) => new Option(text, own)));
  made.value = value;
  made.addEventListener("change", () => change(made.value));
  return made;
}

/** A table: the first row of cells are its headings, the first cell of every other row heads its row. */
export function table(caption, head, rows) {
  const cell = (text, i) => el(i ? "td" : "th", { className: i ? "number" : "", ...(i ? {} : { scope: "row" }) }, text);
  const heading = (text, i) => el("th", { scope: "col", className: i ? "number" : "" }, text);
  return el("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": caption },
    el("table", {}, el("caption", { className: "unseen" }, caption),
      el("thead", {}, el("tr", {}, ...head.map(heading))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell))))));
}

export const whole = (n) => Math.round(n).toLocaleString("en-US");
export const fixed = (x, places) => (x === 0 || Number(x.toFixed(places)) === 0 ? 0 : x).toFixed(places).replace("-", "\u2212");
export const signed = (x, places) => `${Number(x.toFixed(places)) > 0 ? "+" : ""}${fixed(x, places)}`;
export const percent = (x) => `${(100 * x).toFixed(x >= 0.0995 || x === 0 ? 0 : x >= 0.00995 ? 1 : 2)}%`;

/** Bytes in the unit that fits. */
export function memory(n) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (n >= size) return `${Number((n / size).toPrecision(3))}\u00a0${unit}`;
  }
  return `${n}\u00a0bytes`;
}

/** A token as it can be read on a line: blanks in quotation marks, and line breaks visible. */
export const quoted = (token) => `\u201c${token.replaceAll("\n", "\u21b5")}\u201d`;
