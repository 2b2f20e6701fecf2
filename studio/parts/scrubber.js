// The attention scrubber: step, layer, head and opacity move in the browser, on one atlas of grey cells.
// props.value is JSON: {picture, atlas, words, word, cell: [height, width], steps: [...], columns, tracks: [{site, head, top}], sites: [[name, title], ...]}.
// Column 0 of a track is the mean over the steps; a track without site is the mean over all layers, without head over all heads.
const STOPS = [[0, 8, 6, 40], [0.25, 72, 18, 110], [0.5, 187, 55, 84], [0.75, 249, 142, 9], [1, 252, 255, 164]];
const at = (name) => element.querySelector('[data-part=' + name + ']');
const state = {step: null, site: null, head: null};
let data = null, picture = null, atlas = null;

function heat(value) {
  const upper = Math.max(1, STOPS.findIndex((stop) => stop[0] >= value));
  const [low, high] = [STOPS[upper - 1], STOPS[upper]];
  const part = (value - low[0]) / (high[0] - low[0]);
  return [1, 2, 3].map((channel) => low[channel] + part * (high[channel] - low[channel]));
}
const COLOURS = Array.from({length: 256}, (_, grey) => heat(grey / 255));

function load(uri) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error('a picture of the attention view could not be read'));
    image.src = uri;
  });
}

const headsOf = (site) => data.tracks.filter((track) => site !== null && track.site === site && track.head !== null).map((track) => track.head);
const trackNow = () => data.tracks.findIndex((track) => track.site === state.site && track.head === state.head);

// The chosen map as a small canvas in colours; transparent where there is no attention.
function coloured(row, column) {
  const [height, width] = data.cell;
  const canvas = document.createElement('canvas');
  canvas.width = width;
  canvas.height = height;
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  pen.drawImage(atlas, column * width, row * height, width, height, 0, 0, width, height);
  const pixels = pen.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    const grey = pixels.data[i];
    [pixels.data[i], pixels.data[i + 1], pixels.data[i + 2]] = COLOURS[grey];
    pixels.data[i + 3] = grey;  // the more attention, the more opaque
  }
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

function draw() {
  const canvas = at('canvas');
  const scale = Math.max(1, Math.round(640 / Math.max(picture.width, picture.height)));
  canvas.width = picture.width * scale;
  canvas.height = picture.height * scale;
  const pen = canvas.getContext('2d');
  pen.imageSmoothingQuality = 'high';
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const row = trackNow(), column = state.step === null ? 0 : 1 + data.steps.indexOf(state.step);
  pen.globalAlpha = Number(at('opacity').value) / 100;
  pen.drawImage(coloured(row, column), 0, 0, canvas.width, canvas.height);
  canvas.dataset.cell = row + '/' + column;
  canvas.setAttribute('aria-label', 'Where “' + data.word + '” looks');
  at('top').textContent = (100 * data.tracks[row].top).toFixed(1) + ' %';
}

// Position 0 of a slider is the mean, then come the single values.
function slide(name, values, titles) {
  const input = at(name), row = input.closest('label');
  row.hidden = values.length === 0;
  input.max = values.length;
  const position = values.indexOf(state[name]) + 1;
  if (!position) state[name] = null;
  input.value = position;
  row.querySelector('output').textContent = position ? titles(position - 1) : 'mean';
}

function refresh() {
  slide('step', data.steps, (index) => data.steps[index] + 1 + ' of ' + (data.steps.at(-1) + 1));
  slide('site', data.sites.map((site) => site[0]), (index) => data.sites[index][1]);
  const barred = state.step !== null && !data.heads_by_step;  // single heads were kept for the mean over the steps only
  slide('head', barred ? [] : headsOf(state.site), (index) => index + 1 + ' of ' + headsOf(state.site).length);
  draw();
}

async function show() {
  const next = props.value ? JSON.parse(props.value) : null;
  at('body').hidden = !next;
  at('nothing').hidden = Boolean(next);
  if (!next) return;
  const [newPicture, newAtlas] = await Promise.all([load(next.picture), load(next.atlas)]);
  [data, picture, atlas] = [next, newPicture, newAtlas];
  at('words').replaceChildren(...data.words.map((word) => {
    const chip = document.createElement('button');
    chip.type = 'button';
    chip.className = 'chip' + (word === data.word ? ' watched' : '');
    chip.textContent = word;
    chip.dataset.word = word;
    chip.setAttribute('aria-pressed', String(word === data.word));
    return chip;
  }));
  refresh();
}

element.addEventListener('input', (event) => {
  const name = event.target.dataset.part;
  if (!data) return;
  if (name === 'opacity') return draw();
  const values = {step: data.steps, site: data.sites.map((site) => site[0]), head: headsOf(state.site)}[name];
  const position = Number(event.target.value);
  state[name] = position ? values[position - 1] : null;
  refresh();
});
element.addEventListener('click', (event) => {
  const word = event.target.dataset.word;
  if (word !== undefined) {
    trigger('pick', {id: word});
  } else if (event.target.dataset.part === 'save' && data) {
    const link = document.createElement('a');
    link.href = at('canvas').toDataURL('image/png');
    link.download = 'attention-' + data.word.replace(/[^\p{L}\p{N}-]+/gu, '') + '.png';
    link.click();
  }
});
watch('value', show);
show();
