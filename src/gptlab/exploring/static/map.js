// One attention map on a canvas: rows are queries, columns are keys.
import { palette, ramp } from "./colours.js";

export const HIDDEN = 0;

/** The weight that a byte stands for, as gptlab/exploring/packing.py has it. */
export const weightOf = (byte) => ((Math.max(byte, 1) - 1) / 254) ** 2;

/** Paint bytes [rows * rows]: keys after the query stay paper, hidden ones have a colour of their own. */
export function paintMap(canvas, bytes, size) {
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d"), image = context.createImageData(size, size);
  const table = ramp(), { paper } = palette();
  for (let query = 0, at = 0; query < size; query++) {
    for (let key = 0; key < size; key++, at++) {
      const future = key > query;
      for (let i = 0; i < 3; i++) image.data[4 * at + i] = future ? paper[i] : table[3 * bytes[at] + i];
      image.data[4 * at + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
}

/** Where the window of a layer ends, as a path in tokens: the oldest key that each query sees; null without a window. */
export function windowEdge(window, tokens) {
  return window === null || window >= tokens ? null : [[0, window], [tokens - window, tokens]];
}

/** Draw over a map: the edge of the window, the end of the sinks, and the cursor's row and column. */
export function paintMarks(canvas, { tokens, window, sinks, cursor }) {
  const pixels = Math.round(canvas.clientWidth * devicePixelRatio) || tokens;
  canvas.width = canvas.height = pixels;
  const context = canvas.getContext("2d"), scale = pixels / tokens, { line, mark } = palette();
  context.lineWidth = Math.max(1, devicePixelRatio);
  context.strokeStyle = line;
  context.setLineDash([5, 4]);
  const edge = windowEdge(window, tokens);
  if (edge) {
    context.beginPath();
    context.moveTo(edge[0][0] * scale, edge[0][1] * scale);
    context.lineTo(edge[1][0] * scale, edge[1][1] * scale);
    context.stroke();
  }
  if (sinks) {
    context.beginPath();
    context.moveTo(sinks * scale, sinks * scale);
    context.lineTo(sinks * scale, pixels);
    context.stroke();
  }
  if (!cursor) return;
  context.fillStyle = mark;
  const thick = Math.max(1, Math.min(scale, 3));
  context.fillRect(0, (cursor.query + 0.5) * scale - thick / 2, (cursor.query + 1) * scale, thick);
  context.fillRect((cursor.key + 0.5) * scale - thick / 2, cursor.key * scale, thick, pixels - cursor.key * scale);
}
