// An image with the weights of a block's nodes over it, drawn on a canvas. What is found in it is drawn by those below.
import { HEAT, brightest, coloursOf, ofLabel } from "./colours.js";

const TALLEST = 0.62; // of the window's height

class MapStage {
  constructor(canvas, about) {
    Object.assign(this, { canvas, about });
    this.heat = document.createElement("canvas");
  }

  async load({ header, array }) {
    this.view = header;
    this.picture = await createImageBitmap(new Blob([array(header.picture)], { type: "image/jpeg" }));
    this.gray = grayed(this.picture);
  }

  // The node where nothing else says which.
  firstNode(block) {
    return this.nodeOf(block, 0.5, 0.5);
  }

  nodeOf(block, x, y) {
    const column = Math.min(Math.max(Math.floor(x * block.covered[1]), 0), block.inside[1] - 1);
    const row = Math.min(Math.max(Math.floor(y * block.covered[0]), 0), block.inside[0] - 1);
    return row * block.shape[1] + column;
  }

  nodeAt(block, x, y) {
    const box = this.canvas.getBoundingClientRect();
    return this.nodeOf(block, (x - box.left) / box.width, (y - box.top) / box.height);
  }

  move(block, node, right, down) {
    const [row, column] = this.placeOf(block, node);
    const at = [Math.min(Math.max(row + down, 0), block.inside[0] - 1), Math.min(Math.max(column + right, 0), block.inside[1] - 1)];
    return at[0] * block.shape[1] + at[1];
  }

  placeOf(block, node) {
    return [Math.floor(node / block.shape[1]), node % block.shape[1]];
  }

  nameOf(block, node) {
    const [row, column] = this.placeOf(block, node);
    return `Node in row ${row}, column ${column}`;
  }

  draw({ block, node, weights, heat, smooth, found, without, score }) {
    const { canvas, view } = this;
    const scale = Math.min(canvas.parentElement.clientWidth / view.width, (window.innerHeight * TALLEST) / view.height);
    const shown = [Math.round(view.width * scale), Math.round(view.height * scale)];
    const sharp = window.devicePixelRatio || 1;
    if (canvas.style.width !== `${shown[0]}px` || canvas.width !== Math.round(shown[0] * sharp)) {
      canvas.style.width = `${shown[0]}px`;
      canvas.width = Math.round(shown[0] * sharp);
      canvas.height = Math.round(shown[1] * sharp);
    }
    const [width, height] = [canvas.width, canvas.height];
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(heat ? this.gray : this.picture, 0, 0, width, height);
    const [rows, columns] = block.covered;
    if (heat) {
      paint(this.heat, weights, block.shape, true);
      context.imageSmoothingEnabled = smooth;
      context.drawImage(this.heat, 0, 0, columns, rows, 0, 0, width, height);
    }
    this.drawFound(context, { found, without, heat, score });
    if (node !== null) {
      const [row, column] = this.placeOf(block, node);
      context.lineWidth = 2 * sharp;
      for (const [colour, grow] of [["#000", 1.5 * sharp], ["#2dd4ff", 0]]) {
        context.strokeStyle = colour;
        context.strokeRect((column * width) / columns - grow, (row * height) / rows - grow, width / columns + 2 * grow, height / rows + 2 * grow);
      }
    }
  }

  thumbnail(canvas, block, weights) {
    paint(canvas, weights, block.shape, false, block.inside);
    return block.inside[1] / block.inside[0];
  }
}

// Boxes, with what they hold.
export class BoxStage extends MapStage {
  // At the middle of the surest detection.
  firstNode(block) {
    const best = this.view.found[0];
    if (!best || best.score < 0.3) return super.firstNode(block);
    const [left, top, right, bottom] = best.box;
    return this.nodeOf(block, (left + right) / 2 / this.view.width, (top + bottom) / 2 / this.view.height);
  }

  drawFound(context, { found, without, score }) {
    if (!found) return;
    const { width, height } = context.canvas;
    const sharp = window.devicePixelRatio || 1;
    for (const each of (without ? without.header : this.view).found) {
      if (each.score >= score) drawBox(context, each, width / this.view.width, height / this.view.height, sharp);
    }
  }
}

// Classes of pixels: over the image, and where weights are shown, their borders alone.
export class ClassStage extends MapStage {
  async load(found) {
    await super.load(found);
    this.found = found;
    this.painted = new WeakMap();
  }

  nameOf(block, node) {
    const [rows, columns] = this.view.size;
    const at = this.placeOf(block, node).map((place, axis) => Math.min((place + 0.5) / block.covered[axis], 1));
    const [row, column] = [Math.min(Math.floor(at[0] * rows), rows - 1), Math.min(Math.floor(at[1] * columns), columns - 1)];
    const label = this.found.array(this.view.classes)[row * columns + column];
    return `${super.nameOf(block, node)}, ${this.about.categories[label]}`;
  }

  drawFound(context, { found, without, heat }) {
    if (!found) return;
    const shown = without || this.found;
    if (!this.painted.has(shown)) this.painted.set(shown, paintClasses(shown, coloursOf(this.about)));
    const { areas, borders } = this.painted.get(shown);
    // Lines of one pixel would be lost in a smaller picture.
    context.imageSmoothingEnabled = heat && context.canvas.width < borders.width;
    context.globalAlpha = heat ? 0.9 : 0.55;
    context.drawImage(heat ? borders : areas, 0, 0, context.canvas.width, context.canvas.height);
    context.globalAlpha = 1;
  }
}

// Two pictures of classes: all pixels in their colours, and those alone that have another class to the right or below.
function paintClasses({ header, array }, colours) {
  const [rows, columns] = header.size;
  const classes = array(header.classes);
  const canvases = [0, 1].map(() => Object.assign(document.createElement("canvas"), { width: columns, height: rows }));
  const [areas, borders] = canvases.map((canvas) => canvas.getContext("2d").createImageData(columns, rows));
  for (let row = 0, at = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, at++) {
      const label = classes[at];
      const colour = [...colours[label], 255];
      areas.data.set(colour, 4 * at);
      const right = column + 1 < columns && classes[at + 1] !== label;
      const below = row + 1 < rows && classes[at + columns] !== label;
      // Lighter, for the picture below is dark.
      if (right || below) borders.data.set(colour.map((part) => 128 + part / 2), 4 * at);
    }
  }
  canvases[0].getContext("2d").putImageData(areas, 0, 0);
  canvases[1].getContext("2d").putImageData(borders, 0, 0);
  return { areas: canvases[0], borders: canvases[1] };
}

// Weights as colours, a pixel a node; over a picture, small ones are transparent.
function paint(canvas, weights, shape, transparent, inside = shape) {
  const [rows, columns] = inside;
  if (canvas.width !== columns || canvas.height !== rows) [canvas.width, canvas.height] = [columns, rows];
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  const top = brightest(weights);
  for (let row = 0, at = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++, at += 4) {
      const part = top > 0 ? Math.min(weights[row * shape[1] + column] / top, 1) : 0;
      const colour = 3 * Math.round(255 * part);
      image.data[at] = HEAT[colour];
      image.data[at + 1] = HEAT[colour + 1];
      image.data[at + 2] = HEAT[colour + 2];
      image.data[at + 3] = transparent ? 240 * Math.sqrt(part) : 255;
    }
  }
  context.putImageData(image, 0, 0);
}

function grayed(picture) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.width, picture.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  const values = image.data;
  for (let at = 0; at < values.length; at += 4) {
    const gray = 0.75 * (0.299 * values[at] + 0.587 * values[at + 1] + 0.114 * values[at + 2]);
    values[at] = values[at + 1] = values[at + 2] = gray;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function drawBox(context, { box, label, name, score }, across, down, sharp) {
  const [left, top, right, bottom] = [box[0] * across, box[1] * down, box[2] * across, box[3] * down];
  context.lineWidth = 2 * sharp;
  context.strokeStyle = ofLabel(label);
  context.strokeRect(left, top, right - left, bottom - top);
  const text = `${name} ${score.toFixed(2)}`;
  context.font = `${12 * sharp}px system-ui, "DejaVu Sans", sans-serif`;
  const wide = context.measureText(text).width + 6 * sharp;
  const high = 16 * sharp;
  const x = Math.max(0, Math.min(left, context.canvas.width - wide));
  const y = top >= high ? top - high : Math.min(bottom, context.canvas.height - high);
  context.fillStyle = ofLabel(label);
  context.fillRect(x, y, wide, high);
  context.fillStyle = "#101418";
  context.fillText(text, x + 3 * sharp, y + 12 * sharp);
}
