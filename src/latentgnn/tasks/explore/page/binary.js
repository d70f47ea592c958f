// What the server sends: the length of a JSON header, the header, and the arrays that it refers to.
const TYPES = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };

export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const array = ({ at, count, type }) => new TYPES[type](buffer, 4 + length + at, count);
  return { header, array };
}
