// An image with the weights of a block's nodes over it, drawn on a canvas.
import { HEAT, brightest, ofLabel } from "./colours.js";

const TALLEST = 0.62; // of the window's height

export class MapStage {
  constructor(canvas) {
    this.canvas = canvas;
    this.heat = document.createElement("canvas");
  }

  async load({ header, array }) {
    this.view = header;
    this.picture = await createImageBitmap(new Blob([array(header.picture)], { type: "image/jpeg" }));
    this.gray = grayed(this.picture);
  }

  usually() {
    const best = this.view.found[0];
    if (!best || best.score < 0.3) return [0.5, 0.5];
    const [left, top, right, bottom] = best.box;
    return [(left + right) / 2 / this.view.width, (top + bottom) / 2 / this.view.height];
  }

  // The node where nothing else says which: at the middle of the surest detection.
  firstNode(block) {
    return this.nodeOf(block, ...this.usually());
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

  draw({ block, node, weights, heat, smooth, found, score }) {
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
    if (found) for (const each of found) if (each.score >= score) drawBox(context, each, width / view.width, height / view.height, sharp);
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
