// The painter by keyboard, with the focus on the canvas: arrow keys move the chosen region, Shift and arrows resize it, Enter puts one in the
// middle, Delete takes it away. While a region is moved over others they are only covered: where it moves on, they are as they were.
const STEP = 1 / 32;  // of the drawing's side
const ARROWS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
let lifted = null;

function bounds(mask) {
  let [left, top, right, bottom] = [size[0], size[1], 0, 0];
  mask.forEach((inside, at) => {
    if (!inside) return;
    const [x, y] = [at % size[0], Math.floor(at / size[0])];
    [left, top, right, bottom] = [Math.min(left, x), Math.min(top, y), Math.max(right, x + 1), Math.max(bottom, y + 1)];
  });
  return right ? [left, top, right, bottom] : null;
}

// The region as it was when it was first taken, stretched into another box; so that nothing wears off on the way.
function put([left, top, right, bottom]) {
  const [l, t, r, b] = lifted.from, mine = lifted.masks[chosen];
  regions.forEach((one, number) => { one.mask = number === chosen ? empty() : lifted.masks[number].slice(); });
  for (let y = top; y < bottom; y++) {
    const row = t + Math.floor((y - top + 0.5) / (bottom - top) * (b - t));
    for (let x = left; x < right; x++) {
      if (mine[row * size[0] + l + Math.floor((x - left + 0.5) / (right - left) * (r - l))]) set(y * size[0] + x, 1);
    }
  }
  lifted.at = [left, top, right, bottom];
}

function lift() {
  if (lifted && lifted.written === written && lifted.chosen === chosen) return true;
  const from = regions[chosen] && bounds(regions[chosen].mask);
  lifted = from && {chosen, from, at: from, masks: regions.map((one) => one.mask.slice())};
  return Boolean(from);
}

function nudge([right, down], resize) {
  if (!lift()) return false;
  const by = [right, down].map((way, side) => way * Math.max(1, Math.round(size[side] * STEP)));
  const to = lifted.at.map((value, at) => value + (resize && at < 2 ? 0 : by[at % 2]));
  [0, 1].forEach((side) => {
    const over = Math.max(0, to[2 + side] - size[side]), under = Math.max(0, -to[side]);
    to[2 + side] = Math.max(to[2 + side] - over + (resize ? 0 : under), to[side] + Math.ceil(size[side] * STEP));
    to[side] += under - (resize ? 0 : over);
  });
  remember();
  put(to.map((value, at) => Math.min(Math.max(value, 0), size[at % 2])));
  return true;
}

function middle() {
  if (!regions.length && !layout) return false;
  if (regions[chosen] && share(regions[chosen].mask)) return false;
  remember();
  if (!regions.length) add();
  const at = [0.25, 0.25, 0.75, 0.75].map((value, side) => Math.round(value * size[side % 2]));
  lifted = {chosen, from: at, at, masks: regions.map((one) => one.mask.slice())};
  fill(at);
  lifted.masks[chosen] = regions[chosen].mask.slice();
  return true;
}

function away() {
  if (!regions[chosen] || !(layout || share(regions[chosen].mask))) return false;
  remember();
  lifted = null;
  if (layout) regions.splice(chosen, 1); else regions[chosen].mask = empty();
  return true;
}

// Where the chosen region is, in words: the canvas itself says nothing to those who don't see it.
function said() {
  const one = regions[chosen], at = one && bounds(one.mask);
  if (!at) return (one && one.words || 'The region') + ' is empty';
  const [left, top, right, bottom] = at.map((value, side) => Math.round(100 * value / size[side % 2]));
  return (one.words || 'The subject') + ': ' + left + ' to ' + right + ' % from the left, ' + top + ' to ' + bottom + ' % from the top';
}

canvas.addEventListener('keydown', (event) => {
  if (drag || event.ctrlKey || event.metaKey || event.altKey) return;
  const done = ARROWS[event.key] ? nudge(ARROWS[event.key], event.shiftKey)
    : event.key === 'Enter' ? middle() : ['Delete', 'Backspace'].includes(event.key) && away();
  if (done || ARROWS[event.key]) event.preventDefault();  // the page doesn't scroll from under the hands
  if (!done) return;
  tell();
  if (lifted) lifted.written = written;
  show();
  part('said').textContent = said();
});
