// Points that turn, drawn on a canvas: each a square, the nearer before the farther.
import { HEAT, brightest, coloursOf } from "./colours.js";

const SHOWN = 0.68; // height of the canvas over its width, and over the window's height
const FAR = 3.2; // of the eye from the middle, in radii

export class CloudStage {
  constructor(canvas, about, camera) {
    Object.assign(this, { canvas, about, camera });
  }

  async load({ header, array }) {
    this.view = header;
    this.points = array(header.points);
    this.classes = array(header.classes);
    for (const block of header.blocks) {
      block.positions = array(block.positions);
      block.nearest = array(block.nearest);
    }
    // From above for the gallery: at most this many.
    this.every = Math.max(1, Math.floor(this.points.length / 3 / 20000));
  }

  firstNode(block) {
    return nearestTo(block.positions, 0, 0, 0);
  }

  nameOf(block, node) {
    const place = [0, 1, 2].map((axis) => (block.positions[3 * node + axis] + this.view.middle[axis]).toFixed(2));
    return `Node ${node} at ${place.join(", ")}`;
  }

  turn(camera, across, down) {
    camera.yaw -= across / 150;
    camera.pitch = Math.min(Math.PI / 2, Math.max(-Math.PI / 2, camera.pitch + down / 150));
  }

  // The node of the point that is shown there.
  nodeAt(block, x, y) {
    const box = this.canvas.getBoundingClientRect();
    const sharp = this.canvas.width / box.width;
    const [column, row] = [Math.floor((x - box.left) * sharp), Math.floor((y - box.top) * sharp)];
    if (!this.ids || column < 0 || row < 0 || column >= this.canvas.width || row >= this.canvas.height) return null;
    for (let away = 0; away <= 6; away++) {
      for (const [right, down] of [[0, 0], [away, 0], [-away, 0], [0, away], [0, -away]]) {
        const at = (row + down) * this.canvas.width + column + right;
        if (this.ids[at]) return block.nearest[this.ids[at] - 1];
      }
    }
    return null;
  }

  // The nearest node on the screen towards a side.
  move(block, node, right, down) {
    const project = this.projection();
    const [x, y] = project(block.positions, node);
    let [best, least] = [node, Infinity];
    for (let n = 0; n < block.positions.length / 3; n++) {
      const at = project(block.positions, n);
      const [across, along] = [at[0] - x, at[1] - y];
      const ahead = across * right + along * down;
      const aside = Math.abs(across * down - along * right);
      if (ahead > 0.5 && aside <= ahead && ahead + 2 * aside < least) [best, least] = [n, ahead + 2 * aside];
    }
    return best;
  }

  // Of a point: column, row and distance.
  projection() {
    const { yaw, pitch, zoom } = this.camera;
    const { width, height } = this.canvas;
    const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
    const radius = this.view.radius;
    const scale = 0.5 * Math.min(width, 1.2 * height) * (FAR - 0.4) * zoom;
    const out = [0, 0, 0];
    return (points, n) => {
      const [x, y, z] = [points[3 * n], points[3 * n + 1], points[3 * n + 2]];
      const across = cy * x + sy * y;
      const along = -sy * x + cy * y;
      const away = (along * cp - z * sp) / radius + FAR;
      out[0] = width / 2 + (scale * across) / radius / away;
      out[1] = height / 2 - (scale * (along * sp + z * cp)) / radius / away;
      out[2] = away;
      return out;
    };
  }

  draw({ block, node, weights, heat, without }) {
    const { canvas } = this;
    const sharp = Math.min(window.devicePixelRatio || 1, 2);
    const across = canvas.parentElement.clientWidth;
    if (!across) return;
    const down = Math.round(Math.min(SHOWN * across, SHOWN * window.innerHeight));
    canvas.style.height = `${down}px`;
    [canvas.width, canvas.height] = [Math.round(across * sharp), Math.round(down * sharp)];
    const { width, height } = canvas;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    pixels.fill(0xff221c1a);
    const depth = new Float32Array(width * height).fill(Infinity);
    const ids = (this.ids = new Uint32Array(width * height));
    const colours = this.colours(block, weights, heat, without);
    const project = this.projection();
    const count = this.points.length / 3;
    // About the distance of neighbouring points, so that surfaces close.
    const size = Math.max(1, ((0.75 * Math.min(width, height)) / Math.sqrt(count)) * this.camera.zoom);
    for (let n = 0; n < count; n++) {
      const [x, y, away] = project(this.points, n);
      if (away < 0.1) continue;
      const half = Math.min(12 * sharp, (size * FAR) / away) / 2;
      const [left, right] = [Math.max(0, Math.round(x - half)), Math.min(width, Math.round(x + half) + 1)];
      const [top, bottom] = [Math.max(0, Math.round(y - half)), Math.min(height, Math.round(y + half) + 1)];
      for (let row = top; row < bottom; row++) {
        for (let at = row * width + left; at < row * width + right; at++) {
          if (away < depth[at]) [depth[at], pixels[at], ids[at]] = [away, colours[n], n + 1];
        }
      }
    }
    context.putImageData(image, 0, 0);
    if (node !== null) {
      const [x, y] = project(block.positions, node);
      for (const [colour, wide] of [["#000", 5 * sharp], ["#2dd4ff", 2.5 * sharp]]) {
        context.beginPath();
        [context.strokeStyle, context.lineWidth] = [colour, wide];
        context.arc(x, y, 8 * sharp, 0, 2 * Math.PI);
        context.stroke();
      }
    }
  }

  // A colour for each point, as the canvas lays it in memory.
  colours(block, weights, heat, without) {
    const count = this.points.length / 3;
    const colours = new Uint32Array(count);
    if (heat) {
      const top = brightest(weights);
      for (let n = 0; n < count; n++) {
        const part = top > 0 ? Math.min(weights[block.nearest[n]] / top, 1) : 0;
        const at = 3 * Math.round(255 * (0.08 + 0.92 * part));
        colours[n] = packed(HEAT[at], HEAT[at + 1], HEAT[at + 2]);
      }
      return colours;
    }
    const classes = without ? without.array(without.header.classes) : this.classes;
    const palette = coloursOf(this.about).map((colour) => packed(...colour));
    for (let n = 0; n < count; n++) colours[n] = palette[classes[n]];
    return colours;
  }

  thumbnail(canvas, block, weights) {
    const [width, height] = [112, Math.max(20, Math.round(112 * Math.min(1.5, this.view.size[1] / this.view.size[0])))];
    [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer).fill(0xff221c1a);
    const colours = this.colours(block, weights, true, null);
    const highest = new Float32Array(width * height).fill(-Infinity);
    const half = Math.min(4, Math.ceil((0.5 * width) / Math.sqrt(this.points.length / 3 / this.every)));
    for (let n = 0; n < colours.length; n += this.every) {
      const column = Math.floor((this.points[3 * n] / this.view.size[0] + 0.5) * (width - 1));
      const row = Math.floor((0.5 - this.points[3 * n + 1] / this.view.size[1]) * (height - 1));
      const z = this.points[3 * n + 2];
      for (let y = Math.max(0, row - half + 1); y < Math.min(height, row + half); y++) {
        for (let x = Math.max(0, column - half + 1); x < Math.min(width, column + half); x++) {
          if (z >= highest[y * width + x]) [highest[y * width + x], pixels[y * width + x]] = [z, colours[n]];
        }
      }
    }
    context.putImageData(image, 0, 0);
    return width / height;
  }
}

const packed = (red, green, blue) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0;

function nearestTo(points, x, y, z) {
  let [best, least] = [0, Infinity];
  for (let n = 0; n < points.length / 3; n++) {
    const away = (points[3 * n] - x) ** 2 + (points[3 * n + 1] - y) ** 2 + (points[3 * n + 2] - z) ** 2;
    if (away < least) [best, least] = [n, away];
  }
  return best;
}
