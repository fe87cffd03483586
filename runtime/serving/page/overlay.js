// Draws which image tokens were kept over the picture that they were cut from, as `leanvlm run --overlay` does.

// As in runtime/commands/overlay.py, which says why: tests/test_page.py compares them.
export const DIM = 0.22;
export const COLOURS = [
  [0, [8, 8, 20]],
  [0.35, [110, 30, 110]],
  [0.65, [225, 95, 45]],
  [0.9, [250, 210, 80]],
  [1, [255, 255, 255]],
];
// Longer side of the canvas, in pixels: sharp on a dense screen, and light on a phone.
const SIDE = 1344;
// Of a crop's area: fractions of pixels make neighbours overlap by less.
const OVERLAP = 0.1;
// Of a picture, three rows of three.
const PLACES = ["top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"];

/** Return a canvas with the picture in a file, upright, of the size that is shown; rejects what the browser cannot read. */
export async function decode(file) {
  const bitmap = await createImageBitmap(file);
  const scale = SIDE / Math.max(bitmap.width, bitmap.height);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}

/** Return a value in 0..1 as red, green and blue. */
export function colour(share) {
  const value = Math.min(1, Math.max(0, share));
  const above = Math.max(1, COLOURS.findIndex(([stop]) => value <= stop));
  const [[from, low], [to, high]] = [COLOURS[above - 1], COLOURS[above]];
  return low.map((level, channel) => Math.floor(level + ((high[channel] - level) * (value - from)) / (to - from)));
}

const area = ([left, top, right, bottom]) => Math.max(0, right - left) * Math.max(0, bottom - top);
const shared = (one, other) => one.map((side, at) => (at < 2 ? Math.max : Math.min)(side, other[at]));

/** Part crops into layers in which none covers another, tiles before the whole picture. */
export function layers(crops) {
  const found = [];
  for (const crop of crops) {
    const clear = ({ box }) => area(shared(box, crop.box)) <= OVERLAP * Math.min(area(box), area(crop.box));
    const layer = found.find((one) => one.every(clear));
    if (layer) layer.push(crop);
    else found.push([crop]);
  }
  return found.sort((one, other) => other.length - one.length);
}

/** Return a crop's cells in raster order, each [left, top, right, bottom] in whole pixels, so that they meet without a seam. */
export function cells({ grid: [rows, columns], box: [left, top, right, bottom] }, width, height) {
  const at = (from, to, part, parts, pixels) => Math.round((from + ((to - from) * part) / parts) * pixels);
  return Array.from({ length: rows * columns }, (_, index) => {
    const [row, column] = [Math.floor(index / columns), index % columns];
    return [
      at(left, right, column, columns, width),
      at(top, bottom, row, rows, height),
      at(left, right, column + 1, columns, width),
      at(top, bottom, row + 1, rows, height),
    ];
  });
}

/** Hatch what no crop shows: preprocessing cut it off. */
function hatch(context, crops, { width, height }) {
  context.save();
  context.beginPath();
  context.rect(0, 0, width, height);
  for (const { box: [left, top, right, bottom] } of crops) {
    const [x, y] = [Math.round(left * width), Math.round(top * height)];
    context.rect(x, y, Math.round(right * width) - x, Math.round(bottom * height) - y);
  }
  context.clip("evenodd");
  context.fillStyle = `rgb(0 0 0 / ${1 - DIM})`;
  context.fillRect(0, 0, width, height);
  context.strokeStyle = "rgb(255 255 255 / 0.35)";
  context.lineWidth = 2;
  context.beginPath();
  for (let start = -height; start < width; start += 16) {
    context.moveTo(start, height);
    context.lineTo(start + height, 0);
  }
  context.stroke();
  context.restore();
}

/** Draw the picture, and over it one layer's tokens; `view` is picture, kept or attention. */
export function draw(canvas, picture, crops, view) {
  canvas.width = picture.width;
  canvas.height = picture.height;
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  if (view === "picture" || !crops.length) return;
  for (const crop of crops) {
    const kept = new Set(crop.kept);
    for (const [index, [left, top, right, bottom]] of cells(crop, canvas.width, canvas.height).entries()) {
      if (view === "kept" && kept.has(index)) continue;
      // On a square root, since a few cells take most of it.
      const [red, green, blue] = view === "kept" ? [0, 0, 0] : colour(Math.sqrt(crop.attention[index]));
      context.fillStyle = `rgb(${red} ${green} ${blue} / ${view === "kept" ? 1 - DIM : 1})`;
      context.fillRect(left, top, right - left, bottom - top);
    }
  }
  hatch(context, crops, canvas);
  context.strokeStyle = "rgb(255 255 255 / 0.8)";
  context.lineWidth = 2;
  const { width, height } = canvas;
  for (const { box: [left, top, right, bottom] } of crops.length > 1 ? crops : []) {
    context.strokeRect(left * width, top * height, (right - left) * width, (bottom - top) * height);
  }
}

/** Count the kept tokens in each of the nine places of a picture. */
function counted(crops) {
  const numbers = PLACES.map(() => 0);
  const third = (low, high) => Math.min(2, Math.max(0, Math.floor((1.5 * (low + high)) / 1000)));
  for (const crop of crops) {
    // In thousandths of the picture.
    const found = cells(crop, 1000, 1000);
    for (const [left, top, right, bottom] of crop.kept.map((index) => found[index])) {
      numbers[3 * third(top, bottom) + third(left, right)] += 1;
    }
  }
  return numbers.map((number, at) => [PLACES[at], number]);
}

// The space before the sign does not break.
const percent = (part, whole) => `${Math.round((100 * part) / Math.max(1, whole))}\u00a0%`;

/** Say in words how many tokens were kept, and roughly where. */
export function words({ kept, total, crops }) {
  if (kept >= total) return `All ${total} image tokens kept.`;
  const [layer = []] = layers(crops);
  const places = counted(layer);
  const sum = layer.reduce((number, crop) => number + crop.kept.length, 0);
  const most = [...places].sort((one, other) => other[1] - one[1]).slice(0, 3).filter(([, number]) => number);
  const none = places.filter(([, number]) => !number).map(([name]) => name);
  const where = most.map(([name, number]) => `${name} ${percent(number, sum)}`).join(", ");
  const head = `${kept} of ${total} image tokens kept, ${percent(kept, total)}. Most of them: ${where}.`;
  return none.length && most.length === 3 ? `${head} None: ${none.join(", ")}.` : head;
}

/** Whether preprocessing cut off some of the picture. */
export function isCut(crops) {
  const [layer = []] = layers(crops);
  return layer.reduce((sum, { box }) => sum + area(shared(box, [0, 0, 1, 1])), 0) < 0.99;
}

/** Return what stands for a picture that the browser cannot show. */
export function blank() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  const context = canvas.getContext("2d");
  context.fillStyle = "#a0a4a8";
  context.fillRect(0, 0, SIDE, SIDE);
  return canvas;
}

/** Draw the colours of the attention, from the least to the most. */
export function drawScale(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x += 1) {
    const [red, green, blue] = colour(Math.sqrt(x / (canvas.width - 1)));
    context.fillStyle = `rgb(${red} ${green} ${blue})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}
