// Masks as one byte a pixel, row by row, and as `runs`: the lengths of stretches outside and inside by turns.
const COLOURS = ['#e8871e', '#3b8ed0', '#2f9e6e', '#c2477f', '#7c6bd6', '#c9a20c', '#00c2d1', '#a8502d'];
const FINE = 512;  // pixels of a drawing's longer side

const runsOf = (mask) => {
  const runs = [];
  let inside = 0, from = 0;
  for (let at = 0; at <= mask.length; at++) {
    if (at === mask.length || mask[at] !== inside) { runs.push(at - from); from = at; inside = 1 - inside; }
  }
  return runs;
};
const maskOf = (runs, length) => {
  const mask = new Uint8Array(length);
  let at = 0;
  runs.forEach((run, turn) => { if (turn % 2) mask.fill(1, at, at + run); at += run; });
  return mask;
};
const share = (mask) => { let sum = 0; for (const one of mask) sum += one; return sum / mask.length; };

function grid(shape) {
  const scale = FINE / Math.max(...shape);
  return shape.map((side) => Math.max(1, Math.round(side * scale)));
}
