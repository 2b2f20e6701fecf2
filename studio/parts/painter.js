// The painter: regions as rectangles and brush strokes, each in its own colour, hard-edged. It never asks the server.
// props.value is JSON: {size: [width, height], regions: [{words, occurrence, weight, runs: [...]}]}; `runs` are the lengths of stretches of
// pixels, row by row, outside and inside by turns. Other props:
// shape [width, height] of the picture, picture (what lies under the drawing), finder (whether "Find" is offered).
const MOST_UNDO = 30;
const part = (name) => element.querySelector('[data-part=' + name + ']');
const layout = part('painter').dataset.kind === 'layout';
const canvas = part('canvas'), shapeNow = () => (layout ? props.shape || [FINE, FINE] : size);
let words = choicesOf(window.attunePrompt || '');
let size = [FINE, FINE], regions = [], chosen = 0, tool = layout ? 'box' : 'brush', undo = [], drag = null, under = null, written = null;

const colourOf = (number) => COLOURS[(number + (layout ? 0 : 6)) % COLOURS.length];  // photos have few colours of that kind
const empty = () => new Uint8Array(size[0] * size[1]);

// An empty drawing takes the picture's shape; what is drawn keeps its pixels and is stretched over the picture.
function refit() {
  if (!layout || regions.some((one) => share(one.mask))) return;
  size = grid(shapeNow());
  regions.forEach((one) => { one.mask = empty(); });
}

// What was drawn goes into the value, which is what Python gets and what a reload brings back.
function tell() {
  const plain = regions.map(({words, occurrence, weight, mask}) => ({words, occurrence, weight, runs: runsOf(mask)}));
  written = JSON.stringify({size, regions: plain});
  props.value = written;
  trigger('paint');
}

function remember() {
  undo.push(JSON.stringify({size, chosen, regions: regions.map((one) => ({...one, mask: runsOf(one.mask)}))}));
  if (undo.length > MOST_UNDO) undo.shift();
}

function back() {
  if (!undo.length) return;
  const then = JSON.parse(undo.pop());
  [size, chosen] = [then.size, then.chosen];
  regions = then.regions.map((one) => ({...one, mask: maskOf(one.mask, size[0] * size[1])}));
  tell();
  show();
}

function nextWord() {
  const taken = regions.map((one) => one.words + '#' + one.occurrence);
  const free = words.find((one) => one.likely && !taken.includes(one.words + '#' + one.occurrence));
  return free ? [free.words, free.occurrence] : ['', null];
}

function add() {
  const [words, occurrence] = nextWord();
  regions.push({words, occurrence, weight: 2.5, mask: empty()});
  chosen = regions.length - 1;
}

// One pixel belongs to one region: what is painted is taken from the others.
function set(index, inside) {
  regions.forEach((one, number) => { if (number === chosen) one.mask[index] = inside; else if (inside && layout) one.mask[index] = 0; });
}

function box(from, to) {
  const [left, right] = [from[0], to[0]].sort((a, b) => a - b), [top, bottom] = [from[1], to[1]].sort((a, b) => a - b);
  return [left, top, right, bottom].map((value, at) => Math.min(Math.max(Math.round(value), 0), size[at % 2]));
}

function fill([left, top, right, bottom]) {
  for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) set(y * size[0] + x, 1);
}

// A round dab on the picture, also where the drawing is stretched over it.
function dab([x0, y0], [x1, y1], inside) {
  const shape = shapeNow(), radius = Number(part('width').value) / 400 * Math.min(...shape);
  const [wide, high] = [0, 1].map((at) => Math.max(0.75, radius * size[at] / shape[at]));
  const stops = Math.ceil(Math.max(Math.abs(x1 - x0) / wide, Math.abs(y1 - y0) / high) * 3) || 1;
  for (let stop = 0; stop <= stops; stop++) {
    const [x, y] = [x0 + (x1 - x0) * stop / stops, y0 + (y1 - y0) * stop / stops];
    for (let row = Math.max(0, Math.floor(y - high)); row < Math.min(size[1], y + high); row++) {
      for (let column = Math.max(0, Math.floor(x - wide)); column < Math.min(size[0], x + wide); column++) {
        if (Math.hypot((column + 0.5 - x) / wide, (row + 0.5 - y) / high) <= 1) set(row * size[0] + column, inside);
      }
    }
  }
}

// Drawing

function overlay() {
  const sheet = document.createElement('canvas');
  [sheet.width, sheet.height] = size;
  const pen = sheet.getContext('2d'), pixels = pen.createImageData(...size);
  regions.forEach((one, number) => {
    const colour = [1, 3, 5].map((at) => parseInt(colourOf(number).slice(at, at + 2), 16));
    for (let at = 0; at < one.mask.length; at++) {
      if (!one.mask[at]) continue;
      const edge = !layout && [1, -1, size[0], -size[0]].some((step) => !one.mask[at + step]);
      pixels.data.set([...colour, edge ? 255 : number === chosen ? 165 : 120], 4 * at);
    }
  });
  pen.putImageData(pixels, 0, 0);
  return sheet;
}

function label(pen, one, scale) {
  let [sum, x, y] = [0, 0, 0];
  for (let at = 0; at < one.mask.length; at++) if (one.mask[at]) { sum++; x += at % size[0]; y += Math.floor(at / size[0]); }
  if (!sum || !one.words) return;
  pen.font = '600 ' + Math.round(15 * Math.min(2, canvas.width / 420)) + 'px ui-sans-serif, system-ui, sans-serif';
  [pen.textAlign, pen.textBaseline, pen.lineWidth, pen.strokeStyle, pen.fillStyle] = ['center', 'middle', 4, '#000a', '#fff'];
  pen.strokeText(one.words, x / sum * scale[0], y / sum * scale[1]);
  pen.fillText(one.words, x / sum * scale[0], y / sum * scale[1]);
}

function draw() {
  const shape = shapeNow();
  const wide = 840 / Math.max(...shape);
  [canvas.width, canvas.height] = shape.map((side) => Math.max(1, Math.round(side * wide)));
  canvas.parentElement.style.maxWidth = Math.round(460 * shape[0] / Math.max(...shape)) + 'px';
  const pen = canvas.getContext('2d'), scale = [canvas.width / size[0], canvas.height / size[1]];
  if (under) pen.drawImage(under, 0, 0, canvas.width, canvas.height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(overlay(), 0, 0, canvas.width, canvas.height);
  if (layout) regions.forEach((one) => label(pen, one, scale));
  if (drag && drag.box) {
    const [left, top, right, bottom] = box(drag.from, drag.to);
    [pen.lineWidth, pen.strokeStyle] = [3, colourOf(chosen)];
    pen.setLineDash([10, 6]);
    pen.strokeRect(left * scale[0], top * scale[1], (right - left) * scale[0], (bottom - top) * scale[1]);
  }
  const nothing = !regions.some((one) => share(one.mask));
  part('invite').hidden = !layout || !nothing || Boolean(drag);
  part('invite').textContent = words.some((one) => one.likely) ? 'Drag a box for “' + ((regions[chosen] || {}).words || nextWord()[0]) + '”, or press Enter here' : 'Write the prompt first, then drag a box for each thing in it';
  canvas.dataset.drawn = regions.map((one) => one.words + ':' + Math.round(100 * share(one.mask))).join(' ');
  canvas.setAttribute('aria-label', 'Drawing: ' + regions.map((one) => one.words + ' ' + Math.round(100 * share(one.mask)) + ' %').join(', '));
}

function choices(one) {
  const select = document.createElement('select');
  const known = [...words];
  if (!known.some((word) => word.words === one.words && word.occurrence === one.occurrence)) {
    known.unshift({words: one.words, occurrence: one.occurrence, title: titleOf(one, window.attunePrompt || '')});
  }
  known.forEach((word) => {
    const option = new Option(word.title, JSON.stringify([word.words, word.occurrence]));
    option.selected = word.words === one.words && word.occurrence === one.occurrence;
    select.add(option);
  });
  select.setAttribute('aria-label', 'Whose place this is');
  select.dataset.part = 'word';
  return select;
}

function row(one, number) {
  const line = document.createElement('div');
  line.className = 'region' + (number === chosen ? ' chosen' : '');
  line.dataset.number = number;
  const swatch = document.createElement('button');
  [swatch.type, swatch.className, swatch.style.background, swatch.title] = ['button', 'swatch', colourOf(number), 'Draw this one'];
  swatch.setAttribute('aria-pressed', String(number === chosen));
  swatch.setAttribute('aria-label', 'Draw ' + (one.words || 'this region'));
  const amount = document.createElement('span'), covered = share(one.mask);
  amount.textContent = covered ? (covered < 0.005 ? '< 1 %' : Math.round(100 * covered) + ' %') : 'empty';
  if (!layout) {
    const name = document.createElement('b');
    name.textContent = one.words || 'the subject';
    line.append(swatch, name, amount);
    return line;
  }
  if (covered && covered < 0.02) amount.textContent += ', small: may be missed';
  const weight = document.createElement('input');
  Object.assign(weight, {type: 'number', value: one.weight, step: 0.5, title: 'How strongly the word is drawn here (2.5 is usual)'});
  weight.setAttribute('aria-label', 'Weight');
  weight.dataset.part = 'weight';
  const gone = document.createElement('button');
  [gone.type, gone.className, gone.textContent, gone.title] = ['button', 'gone', '×', 'Take this region out'];
  gone.dataset.part = 'gone';
  line.append(swatch, choices(one), weight, amount, gone);
  return line;
}

function show() {
  chosen = Math.max(0, Math.min(chosen, regions.length - 1));
  const held = document.activeElement && element.contains(document.activeElement) && document.activeElement.closest('.region .swatch');
  const number = held && held.closest('.region').dataset.number;
  part('regions').replaceChildren(...regions.map(row));
  if (held) (element.querySelector('.region[data-number="' + number + '"] .swatch') || canvas).focus();  // the rows are new
  element.querySelectorAll('[data-tool]').forEach((button) => {
    button.setAttribute('aria-pressed', String(button.dataset.tool === tool));
    if (button.dataset.tool === 'click') button.hidden = !props.finder;
  });
  part('add').hidden = !layout || regions.length >= COLOURS.length || !regions.length;
  part('undo').disabled = !undo.length;
  part('clear').disabled = !regions.some((one) => layout || share(one.mask));
  draw();
}

function read() {
  if (props.value === written) return;
  written = props.value;
  const data = props.value ? JSON.parse(props.value) : {size, regions: []};
  size = data.size;
  regions = data.regions.map(({runs, ...one}) => ({...one, mask: maskOf(runs, size[0] * size[1])}));
  [undo, drag] = [[], null];
  refit();
  show();
}

function lay() {
  under = null;
  if (!props.picture) return show();
  const image = new Image();
  image.onload = () => { under = image; show(); };
  image.src = props.picture;
}

// Hands

const place = (event) => {
  const frame = canvas.getBoundingClientRect();
  return [(event.clientX - frame.left) / frame.width * size[0], (event.clientY - frame.top) / frame.height * size[1]];
};

canvas.addEventListener('pointerdown', (event) => {
  if (event.button) return;
  if (!regions.length) { if (!layout) return; add(); }
  event.preventDefault();
  canvas.focus({preventScroll: true});
  canvas.setPointerCapture(event.pointerId);
  remember();
  const from = place(event);
  drag = {from, to: from, box: tool === 'box' || tool === 'click'};
  if (!drag.box) dab(from, from, tool === 'brush' ? 1 : 0);
  draw();
});
canvas.addEventListener('pointermove', (event) => {
  if (!drag) return;
  const to = place(event);
  if (!drag.box) dab(drag.to, to, tool === 'brush' ? 1 : 0);
  drag.to = to;
  draw();
});
canvas.addEventListener('pointerup', () => {
  if (!drag) return;
  const {from, to} = drag, corners = box(from, to), flat = corners[2] - corners[0] < 4 || corners[3] - corners[1] < 4;
  drag = null;
  if (tool === 'click') {
    undo.pop();
    trigger('find', {number: chosen, at: flat ? from : corners, size});
  } else {
    if (tool === 'box') { if (flat) undo.pop(); else fill(corners); }
    if (tool !== 'box' || !flat) tell();
  }
  show();
});
canvas.addEventListener('pointercancel', () => { if (drag) { drag = null; back(); } });
element.addEventListener('keydown', (event) => {
  if (event.target.matches('input, select')) return;
  if (event.key === 'z' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); back(); }
  if (event.key === 'Escape' && drag) { event.preventDefault(); drag = null; back(); }
});
element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  const line = event.target.closest('.region');
  if (line) chosen = Number(line.dataset.number);
  if (button && button.dataset.tool) tool = button.dataset.tool;
  else if (button && button.dataset.part === 'undo') return back();
  else if (button && button.dataset.part === 'add') { remember(); add(); tell(); }
  else if (button && button.dataset.part === 'gone') { remember(); regions.splice(chosen, 1); tell(); }
  else if (button && button.dataset.part === 'clear') {
    remember();
    if (layout) regions = []; else regions.forEach((one) => { one.mask = empty(); });
    tell();
  } else if (event.target.matches('select, option, input')) {  // not redrawn while it is being used
    element.querySelectorAll('.region').forEach((each, number) => each.classList.toggle('chosen', number === chosen));
    return draw();
  }
  if (button || line) show();
});
element.addEventListener('change', (event) => {
  const line = event.target.closest('.region');
  if (!line) return;
  const one = regions[Number(line.dataset.number)];
  if (event.target.dataset.part === 'weight' && event.target.value === '') { event.target.value = one.weight; return; }  // cleared: it stays
  remember();
  if (event.target.dataset.part === 'word') [one.words, one.occurrence] = JSON.parse(event.target.value);
  else one.weight = Number(event.target.value);
  tell();
  show();
});
watch('value', read);
window.addEventListener('attune-prompt', () => {
  words = choicesOf(window.attunePrompt);
  if (layout && element.isConnected) show();
});
watch('finder', show);
watch('shape', () => { refit(); show(); });
watch('picture', lay);
read();
lay();
