// Lines against a number, small and plain.
import { el, svg, fixed } from "./dom.js";

const WIDTH = 640, HEIGHT = 240, LEFT = 46, RIGHT = 10, TOP = 30, BOTTOM = 28;

/** Round steps that divide a range into about `n`. */
export function ticks(low, high, n) {
  const rough = (high - low || 1) / n, power = 10 ** Math.floor(Math.log10(rough));
  const size = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let value = Math.ceil(low / size) * size; value <= high + 1e-9 * size; value += size) found.push(value);
  return { values: found, places: Math.max(0, -Math.floor(Math.log10(size))) };
}

/**
 * Draw lines: `series` is a list of `{values, className, name}`, values against 0, 1, 2, ...
 * `label` says in words what is drawn; `across` and `up` name the axes.
 */
export function lineChart({ series, label, across, up }) {
  const n = Math.max(...series.map(({ values }) => values.length)) - 1;
  const all = series.flatMap(({ values }) => values);
  let low = Math.min(0, ...all), high = Math.max(0, ...all);
  if (low === high) high = 1;
  const x = (i) => LEFT + (i / Math.max(n, 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label, class: "chart" });
  const upward = ticks(low, high, 4), sideways = ticks(0, n, 6);
  for (const value of upward.values) {
    drawing.append(svg("path", { d: `M${LEFT} ${y(value)}H${WIDTH - RIGHT}`, class: Math.abs(value) < 1e-9 ? "axis" : "grid" }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, fixed(value, upward.places)));
  }
  for (const value of sideways.values) {
    drawing.append(svg("text", { x: x(value), y: HEIGHT - BOTTOM + 20, "text-anchor": "middle" }, fixed(value, sideways.places)));
  }
  for (const { values, className } of series) {
    const points = values.map((value, i) => `${x(i).toFixed(1)} ${y(value).toFixed(1)}`);
    drawing.append(svg("path", { d: `M${points.join("L")}`, class: `line ${className}` }));
  }
  drawing.append(svg("text", { x: 0, y: 14 }, `${up}, against ${across}`));
  return el("div", { className: "drawing" }, drawing);
}
