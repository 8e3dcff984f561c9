// The colours of weights, for light and dark.

const LIGHT = { paper: [254, 254, 254], weak: [226, 238, 248], strong: [0, 45, 95], hidden: [221, 218, 210], line: "#b3470a", mark: "rgba(179, 71, 10, 0.55)" };
const DARK = { paper: [23, 24, 26], weak: [36, 52, 66], strong: [190, 230, 255], hidden: [62, 58, 50], line: "#f5a15c", mark: "rgba(245, 161, 92, 0.6)" };
const dark = matchMedia("(prefers-color-scheme: dark)");

export const palette = () => (dark.matches ? DARK : LIGHT);
export const onPaletteChange = (listener) => dark.addEventListener("change", listener);

/** Red, green and blue of every byte of a map: 0 is hidden, 1 to 255 go from weak to strong. */
export function ramp() {
  const { weak, strong, hidden } = palette();
  const table = new Uint8Array(3 * 256);
  for (let byte = 0; byte < 256; byte++) {
    const share = (byte - 1) / 254;
    for (let i = 0; i < 3; i++) table[3 * byte + i] = byte ? Math.round(weak[i] + share * (strong[i] - weak[i])) : hidden[i];
  }
  return table;
}

/** The step of losses in nats that a token is coloured by: 0 to 7. */
export const lossStep = (nats) => Math.min(7, Math.floor(nats / 1.25));

/** The step of a difference in nats: -4 to 4, 0 for less than 0.05. */
export function changeStep(nats) {
  const step = [0.05, 0.25, 0.75, 2].filter((limit) => Math.abs(nats) >= limit).length;
  return nats < 0 ? -step : step;
}
