// Colours of weights, those of Matplotlib's "inferno", and of categories.
const STOPS = (
  "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 fcffa4"
).split(" ").map((text) => [0, 2, 4].map((at) => parseInt(text.slice(at, at + 2), 16)));

// 256 colours, (red, green, blue) one after another.
export const HEAT = new Uint8ClampedArray(256 * 3);
for (let i = 0; i < 256; i++) {
  const at = (i / 255) * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2);
  for (let c = 0; c < 3; c++) HEAT[3 * i + c] = STOPS[low][c] + (at - low) * (STOPS[low + 1][c] - STOPS[low][c]);
}

const NAMED = (
  "4c9be8 ff9f40 4cc38a f2617a b58cff c98d6b f79ad3 9aa5b1 d6d04a 3fd0d9 8fb8ff ffc38a a4e0b5 ff9d9a d4c1f7 d9b8a8 f9c6e0 c7ced6 e6e3a1 a5e4ec"
).split(" ");
export const ofLabel = (label) => `#${NAMED[label % NAMED.length]}`;
export const partsOf = (label) => [0, 2, 4].map((at) => parseInt(NAMED[label % NAMED.length].slice(at, at + 2), 16));

// Of all classes: the model's own, or ours.
export const coloursOf = (about) => about.colors ?? about.categories.map((_, label) => partsOf(label));

// The weight that gets the brightest colour: the largest but for two in a thousand, which would leave others dark.
export function brightest(weights) {
  let most = 0;
  for (const weight of weights) if (weight > most) most = weight;
  if (most === 0) return 0;
  const bins = new Uint32Array(1024);
  for (const weight of weights) bins[Math.min(1023, Math.floor((1024 * weight) / most))]++;
  let left = 0.002 * weights.length;
  for (let bin = 1023; bin > 0; bin--) {
    left -= bins[bin];
    if (left < 0) return (most * (bin + 1)) / 1024;
  }
  return most;
}
