// The attention explorer: a molecule with links for one row of weights, and the whole matrix.
// explorer.py puts this file, molecule_view.js, explorer.html and the data into a page.

// --- the data ----------------------------------------------------------------------------------

async function decode(text, bits, deflated) { // base64 → typed array, little-endian
  let bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  if (deflated) {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  }
  return bits === 16 ? new Uint16Array(bytes.buffer) : bytes;
}

// `slots(frame, atom)` lists the edges of an atom, the self-edge first: [{atom, image, envelope}].
// `matrix(kind, frame, block, head, atom)` is {size, values}, row by row; head -1 is the mean over
// heads. Node attention has one matrix for all atoms, neighbourhood attention one for each atom,
// whose size is the number of edges of the atom.
async function attentionMaps(data) {
  const n = data.scene.labels.length, weights = {}, graphs = [];
  for (const kind of data.kinds) {
    const text = kind === "node" ? data.weights : data[kind];
    weights[kind] = await decode(text, data.bits, data.deflated);
  }
  let start = 0;
  for (const packed of data.graphs) {
    const counts = await decode(packed.counts, 16);
    const neighbor = await decode(packed.neighbor, 16);
    const image = new Int8Array((await decode(packed.image, 8)).buffer);
    const envelope = await decode(packed.envelope, 8);
    const rows = [0], matrixStarts = [0]; // index of each atom's first edge, and first weight
    for (const count of counts) {
      rows.push(rows.at(-1) + count);
      matrixStarts.push(matrixStarts.at(-1) + count * count);
    }
    graphs.push({counts, neighbor, image, envelope, rows, matrixStarts, start});
    start += data.blocks * data.heads * matrixStarts[n];
  }
  const largest = data.bits === 16 ? 65535 : 255; // the integer that stands for a weight of 1

  function slots(frame, atom) {
    const graph = graphs[frame];
    return Array.from({length: graph.counts[atom]}, (_, slot) => {
      const e = graph.rows[atom] + slot;
      return {atom: graph.neighbor[e], image: [...graph.image.subarray(3 * e, 3 * e + 3)],
        envelope: graph.envelope[e] / 255};
    });
  }

  function matrix(kind, frame, block, head, atom) {
    const node = kind === "node", graph = node ? null : graphs[frame];
    const size = node ? n : graph.counts[atom];
    const startOf = head => { // index of the first weight of a head's matrix
      if (node) return ((frame * data.blocks + block) * data.heads + head) * n * n;
      const {start, matrixStarts} = graph;
      return start + (block * data.heads + head) * matrixStarts[n] + matrixStarts[atom];
    };
    const headsUsed = head < 0 ? [...Array(data.heads).keys()] : [head];
    const values = new Float32Array(size * size);
    for (const head of headsUsed) {
      const first = startOf(head);
      for (let i = 0; i < values.length; i++) values[i] += weights[kind][first + i];
    }
    return {size, values: values.map(value => value / headsUsed.length / largest)};
  }

  return {slots, matrix};
}

// --- colours -----------------------------------------------------------------------------------

const RAMPS = { // from weight 0 to the largest; in the dark theme the largest is the brightest
  light: ["#fdf3ea", "#f7c08a", "#d55e00", "#8a3200", "#2e1000"],
  dark: ["#2a1f18", "#6b3410", "#d55e00", "#f7a35c", "#fff4c9"],
};
function rampColor(theme, fraction) { // fraction in 0..1 → [r, g, b] in 0..1
  const stops = RAMPS[theme].map(channels), at = Math.min(1, Math.max(0, fraction)) * 4;
  const i = Math.min(3, Math.floor(at));
  return stops[i].map((c, k) => c + (at - i) * (stops[i + 1][k] - c));
}

// --- geometry ----------------------------------------------------------------------------------

const add = (a, b) => a.map((x, i) => x + b[i]);
const subtract = (a, b) => a.map((x, i) => x - b[i]);
const rowTimesMatrix = (row, matrix) => // (3,) times (3, 3)
  [0, 1, 2].map(k => row[0] * matrix[0][k] + row[1] * matrix[1][k] + row[2] * matrix[2][k]);
const HOME_CELL = [0, 0, 0];
const isHomeCell = image => !image[0] && !image[1] && !image[2];

function imagePosition(frame, atom, image) { // Å
  return isHomeCell(image) ? frame.positions[atom]
    : add(frame.positions[atom], rowTimesMatrix(image, frame.cell));
}

function nearestImage(frame, from, to) { // the image of atom `to` that is nearest to atom `from`
  if (!frame.cell) return HOME_CELL;
  const vector = subtract(frame.positions[to], frame.positions[from]);
  const rounded = rowTimesMatrix(vector, frame.inverse).map((x, k) =>
    (frame.pbc[k] ? -Math.round(x) : 0));
  const steps = frame.pbc.map(periodic => (periodic ? [0, -1, 1] : [0]));
  let best = HOME_CELL, least = Infinity;
  for (const a of steps[0]) for (const b of steps[1]) for (const c of steps[2]) {
    const image = add(rounded, [a, b, c]);
    const length = Math.hypot(...add(vector, rowTimesMatrix(image, frame.cell)));
    if (length < least - 1e-6) [best, least] = [image, length];
  }
  return best;
}

// --- the explorer ------------------------------------------------------------------------------

async function attentionView(root, data) {
  const message = root.querySelector("[data-part=message]");
  try {
    const maps = await attentionMaps(data);
    message.hidden = true;
    root.insertAdjacentHTML("beforeend", data.markup);
    explore(root, data, maps);
  } catch (error) {
    message.hidden = false;
    message.textContent = `The attention explorer could not start: ${error}`;
    throw error;
  }
}

function explore(root, data, maps) {
  const {scene, blocks, heads, kinds} = data, n = scene.labels.length;
  const several = scene.frames.length > 1;
  const part = name => root.querySelector(`[data-part=${name}]`);
  const all = selector => [...root.querySelectorAll(selector)];
  const canvas = part("canvas"), matrixCanvas = part("matrix"), tip = part("tip");
  const {kind, query, block, head, threshold, scale} = data; // selected at the start
  const state = {kind, query, edge: null, block, head, frame: data.frame, threshold, scale,
    picks: "atom"};
  let theme = "light", hover = null, view = null, balls = [], player = null;
  let shown = null; // rows, columns and weights for this state, from `currentRows`

  // The rows and columns of the matrix: atoms, or the edges of the query atom.
  const frame = () => scene.frames[state.frame];
  const signed = x => (x > 0 ? `+${x}` : `${x}`.replace("-", "−"));
  const fullName = (atom, image) =>
    scene.labels[atom] + (isHomeCell(image) ? "" : ` (${image.map(signed).join(", ")})`);

  function currentRows() {
    const node = state.kind === "node", here = scene.labels[state.query];
    const entries = node
      ? scene.labels.map((label, atom) => ({atom, image: HOME_CELL, short: label, long: label}))
      : maps.slots(state.frame, state.query).map((entry, slot) => {
        const name = fullName(entry.atom, entry.image);
        const long = state.kind === "source" ? `${here}→${name}` : `${name}→${here}`;
        const short = scene.labels[entry.atom] + (isHomeCell(entry.image) ? "" : "′");
        return slot ? {...entry, short, long}
          : {...entry, short: "self", long: `self-edge of ${here}`};
      });
    let row = state.query;
    if (!node) { // the slot of an edge can differ between frames, so find it by its neighbour
      const same = entry => entry.atom === state.edge.atom
        && entry.image.every((x, k) => x === state.edge.image[k]);
      row = state.edge === null ? 0 : Math.max(0, entries.findIndex(same));
    }
    const {size, values} = maps.matrix(state.kind, state.frame, state.block, state.head,
      state.query);
    const largest = (from, to) => { // without the weights of queries on themselves
      let found = 0;
      for (let i = from; i < to; i++) {
        if (i % (size + 1)) found = Math.max(found, values[i]);
      }
      return found;
    };
    const maximum = values.reduce((a, b) => Math.max(a, b), 0);
    let top = 1;
    const positive = value => (value > 1e-6 ? value : Math.max(maximum, 1e-6));
    const rowLargest = positive(largest(row * size, (row + 1) * size));
    if (state.scale === "row") top = rowLargest;
    if (state.scale === "matrix") top = largest(0, size * size);
    top = positive(top);
    return {node, entries, row, size, values, top, rowLargest, clipped: maximum > top * 1.001};
  }

  const weight = (row, column) => shown.values[row * shown.size + column];

  function distance(row, column) { // Å
    if (shown.node) {
      const image = nearestImage(frame(), row, column);
      return Math.hypot(...subtract(imagePosition(frame(), column, image),
        frame().positions[row]));
    }
    const {atom, image} = shown.entries[column];
    return Math.hypot(...subtract(imagePosition(frame(), atom, image),
      frame().positions[state.query]));
  }

  function nameOf(column, row = shown.row) {
    const {long} = shown.entries[column];
    return column === row ? `${long} (itself)` : long;
  }

  // --- the molecule ---

  function makeScene() { // the scene for molecule_view.js
    const {positions} = frame(), labelled = n <= 80, index = new Map();
    balls = positions.map((at, atom) => ({at, atom, image: HOME_CELL, radius: scene.radii[atom],
      color: scene.colors[atom], label: scene.labels[atom], pale: false, labelled}));
    const ballOf = (atom, image) => {
      if (isHomeCell(image)) return atom;
      const key = [atom, ...image].join();
      if (!index.has(key)) {
        index.set(key, balls.length);
        balls.push({...balls[atom], at: imagePosition(frame(), atom, image), image, pale: true,
          labelled: false});
      }
      return index.get(key);
    };
    const sticks = [...scene.bonds, ...frame().bonds].map(([from, to]) => ({from, to}));
    for (const [i, j, ...image] of frame().imageBonds) {
      sticks.push({from: i, to: ballOf(j, image), pale: true});
    }
    const links = [], rings = [], marks = [], dashed = [], accent = styleColor(root, "--accent");
    shown.entries.forEach((entry, column) => {
      const image = shown.node ? nearestImage(frame(), state.query, column) : entry.image;
      const value = weight(shown.row, column), strength = Math.min(1, value / shown.rowLargest);
      const itself = entry.atom === state.query && isHomeCell(image);
      const hovered = hover && hover.column === column;
      const visible = strength > state.threshold;
      if (shown.node && !visible && !hovered) return; // edges to neighbours are always drawn
      const ball = ballOf(entry.atom, image);
      entry.ball = ball;
      if (!isHomeCell(image) && (visible || hovered)) balls[ball].labelled = labelled;
      const color = rampColor(theme, value / shown.top);
      const width = 1.5 + 12 * strength;
      if (!shown.node && !itself) dashed.push({from: state.query, to: ball});
      if (visible && itself) rings.push({ball, gap: 4, width: 0.5 * width, color});
      if (visible && !itself) links.push({from: state.query, to: ball, width, color});
      if (hovered) rings.push({ball, gap: itself ? 12 : 3, width: 2, color: accent});
    });
    rings.push({ball: state.query, gap: 1, width: 3, color: accent});
    if (!shown.node && shown.row) {
      const {ball} = shown.entries[shown.row];
      marks.push({from: state.query, to: ball, color: accent});
      rings.push({ball, gap: 1, width: 3, color: accent});
    }
    const [background, text] = ["--background", "--text"].map(name => styleColor(root, name));
    return {balls, sticks, dashed, links, rings, marks, lines: frame().lines, background, text};
  }

  function columnOf(ball) { // the column of the atom or edge that a ball belongs to, or null
    if (ball === null) return null;
    const {atom, image} = balls[ball];
    if (shown.node) return atom;
    const found = shown.entries.findIndex(entry => entry.atom === atom
      && entry.image.every((x, k) => x === image[k]));
    return found < 0 ? null : found;
  }

  function atomClicked(ball, event) {
    const column = columnOf(ball), asEdge = state.picks === "edge" || event.shiftKey;
    if (!shown.node && (asEdge || balls[ball].pale)) {
      if (column === null) {
        return writeSummary(`There is no edge between ${scene.labels[state.query]} and `
          + `${fullName(balls[ball].atom, balls[ball].image)}.`);
      }
      return update({edge: column ? shown.entries[column] : null});
    }
    selectAtom(balls[ball].atom);
  }

  const selectAtom = atom => update({query: atom, edge: null});

  // --- the matrix ---

  let matrixLayout = null; // {left, cell}: left end and size of the cells, in pixels

  function drawWeights(canvas, {size, values}, top) { // one pixel for each weight
    const image = new ImageData(size, size);
    const table = Array.from({length: 256}, (_, i) => rampColor(theme, i / 255).map(c => 255 * c));
    for (let i = 0; i < values.length; i++) {
      const [r, g, b] = table[Math.min(255, Math.round(255 * values[i] / top))];
      image.data[4 * i] = r;
      image.data[4 * i + 1] = g;
      image.data[4 * i + 2] = b;
      image.data[4 * i + 3] = 255;
    }
    canvas.width = canvas.height = size;
    canvas.getContext("2d").putImageData(image, 0, 0);
  }

  function matrixImage() { // stored until the state or the theme changes
    if (shown.imageTheme !== theme) {
      shown.image = document.createElement("canvas");
      drawWeights(shown.image, shown, shown.top);
      shown.imageTheme = theme;
    }
    return shown.image;
  }

  function drawGallery() { // all heads of all blocks, each on its own scale
    if (!part("gallery").open) return;
    const grid = part("heads"), cells = [];
    grid.style.gridTemplateColumns = `auto repeat(${heads}, minmax(24px, 76px))`;
    if (!grid.children.length) {
      const word = text => Object.assign(document.createElement("span"), {textContent: text});
      for (const head of Array(heads).keys()) cells.push(word(`head ${head}`));
      for (const block of Array(blocks).keys()) {
        cells.push(word(`block ${block}`));
        for (const head of Array(heads).keys()) {
          const button = document.createElement("button");
          button.append(document.createElement("canvas"));
          button.setAttribute("aria-label", `block ${block}, head ${head}`);
          button.dataset.lmSuppressShortcuts = "true";
          button.onclick = () => update({block, head});
          cells.push(button);
        }
      }
      grid.replaceChildren(word(""), ...cells);
    }
    [...grid.querySelectorAll("button")].forEach((button, i) => {
      const [block, head] = [Math.floor(i / heads), i % heads];
      const found = maps.matrix(state.kind, state.frame, block, head, state.query);
      const top = found.values.reduce((a, b) => Math.max(a, b), 1e-6);
      drawWeights(button.firstChild, found, top);
      button.setAttribute("aria-pressed", block === state.block && head === state.head);
    });
  }

  function drawMatrix() {
    if (!data.matrix) return;
    const context = matrixCanvas.getContext("2d"), {size, entries} = shown;
    const side = matrixCanvas.clientWidth, pixelRatio = Math.max(2, window.devicePixelRatio || 1);
    if (!side) return;
    if (matrixCanvas.width !== Math.round(side * pixelRatio)) {
      matrixCanvas.width = matrixCanvas.height = Math.round(side * pixelRatio);
    }
    context.setTransform(pixelRatio, 0, 0, pixelRatio, 0, 0);
    context.clearRect(0, 0, side, side);
    const cellEstimate = (side - 36) / size, font = Math.max(10, Math.min(14, 0.85 * cellEstimate));
    context.font = `${font}px sans-serif`;
    const longest = Math.max(...entries.map(entry => context.measureText(entry.short).width));
    const left = Math.ceil(longest) + 7, cell = (side - left - 2) / size;
    matrixLayout = {left, cell};
    context.imageSmoothingEnabled = cell < 1;
    context.drawImage(matrixImage(), left, left, cell * size, cell * size);
    const text = css(styleColor(root, "--text")), accent = css(styleColor(root, "--accent"));
    context.strokeStyle = css(styleColor(root, "--line"));
    context.lineWidth = 1;
    context.strokeRect(left - 0.5, left - 0.5, cell * size + 1, cell * size + 1);
    const every = Math.ceil((font + 1) / cell), marked = [shown.row];
    if (hover) marked.push(hover.row, hover.column);
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let i = 0; i < size; i++) { // row labels at the left, column labels above
      const asRow = i === (hover ? hover.row : shown.row), asColumn = hover && i === hover.column;
      const near = other => other !== i && Math.abs(other - i) * cell < font + 1;
      const centre = left + (i + 0.5) * cell, plain = i % every === 0;
      const label = (strong, rotated) => {
        context.save();
        context.font = `${strong ? "bold " : ""}${font}px sans-serif`;
        context.fillStyle = strong ? accent : text;
        if (rotated) {
          context.translate(centre, left - 4);
          context.rotate(Math.PI / 2);
          context.fillText(entries[i].short, 0, 0);
        } else {
          context.fillText(entries[i].short, left - 4, centre);
        }
        context.restore();
      };
      if (asRow || (plain && !near(marked[hover ? 1 : 0]))) label(asRow, false);
      if (asColumn || (plain && !(hover && near(hover.column)))) label(asColumn, true);
    }
    context.strokeStyle = accent;
    context.lineWidth = 2.5;
    context.strokeRect(left, left + shown.row * cell, cell * size, cell);
    if (!hover) return;
    context.lineWidth = 2;
    const frameSize = Math.max(cell, 3);
    context.strokeRect(left + hover.column * cell, left + hover.row * cell, frameSize, frameSize);
  }

  // --- the energies of the frames ---

  function drawCurve() {
    const curve = part("curve"), side = curve.clientWidth, height = curve.clientHeight;
    const pixelRatio = Math.max(2, window.devicePixelRatio || 1), context = curve.getContext("2d");
    if (!side) return;
    [curve.width, curve.height] = [side * pixelRatio, height * pixelRatio];
    context.setTransform(pixelRatio, 0, 0, pixelRatio, 0, 0);
    const energies = scene.frames.map(({energy}) => energy), last = energies.length - 1;
    const [low, high] = [Math.min(...energies), Math.max(...energies)];
    const at = i => [8 + (side - 16) * i / last,
      height - 8 - (height - 16) * (energies[i] - low) / Math.max(1e-9, high - low)];
    const dot = (i, r) => {
      context.beginPath();
      context.arc(...at(i), r, 0, 7);
      context.fill();
    };
    context.lineWidth = 2;
    context.strokeStyle = context.fillStyle = css(styleColor(root, "--muted"));
    context.beginPath();
    energies.forEach((_, i) => context.lineTo(...at(i)));
    context.stroke();
    if (side / last > 9) energies.forEach((_, i) => dot(i, 3));
    context.fillStyle = css(styleColor(root, "--accent"));
    dot(state.frame, 7);
  }

  function frameAt(event) {
    const box = part("curve").getBoundingClientRect();
    const along = (event.clientX - box.left - 8) / (box.width - 16) * (scene.frames.length - 1);
    play(false);
    update({frame: Math.max(0, Math.min(scene.frames.length - 1, Math.round(along)))});
  }

  // --- the matrix under the pointer ---

  function cellAt(event) {
    if (!matrixLayout) return null;
    const box = matrixCanvas.getBoundingClientRect();
    const [column, row] = [event.clientX - box.left, event.clientY - box.top].map(x =>
      Math.floor((x - matrixLayout.left) / matrixLayout.cell));
    const inside = [row, column].every(i => i >= 0 && i < shown.size);
    return inside ? {row, column} : null;
  }

  // --- texts ---

  const precise = value => value.toFixed(data.bits === 16 ? 4 : 3);

  function tooltipText({row, column}) { // of one cell
    const length = distance(row, column), {envelope} = shown.entries[column];
    const facts = [precise(weight(row, column))];
    if (length > 0) facts.push(`${length.toFixed(2)} Å`);
    if (!shown.node && column) facts.push(`envelope ${envelope.toFixed(2)}`);
    return `${nameOf(row, -1)} attends to ${nameOf(column, row)}\n${facts.join("   ")}`;
  }

  function setHover(where, event) { // show the tooltip of a cell at the pointer; null hides it
    const changed = JSON.stringify(where) !== JSON.stringify(hover);
    hover = where;
    tip.hidden = !where;
    if (where) {
      tip.textContent = tooltipText(where);
      const box = root.getBoundingClientRect();
      const [x, y] = [event.clientX - box.left, event.clientY - box.top];
      tip.style.left = `${Math.max(4, Math.min(x + 14, box.width - tip.offsetWidth - 6))}px`;
      tip.style.top = `${y > tip.offsetHeight + 20 ? y - tip.offsetHeight - 12 : y + 18}px`;
    }
    if (changed) draw();
  }

  function columnsByWeight() { // columns of the row, the largest weight first
    return shown.entries.map((_, column) => column).sort((a, b) =>
      weight(shown.row, b) - weight(shown.row, a));
  }

  function writeSummary(message) {
    const list = columnsByWeight().slice(0, 5).map(column =>
      `${nameOf(column)} ${weight(shown.row, column).toFixed(3)}`).join(", ");
    const query = (shown.node || shown.row ? "" : "The ") + nameOf(shown.row, -1);
    part("text").textContent = message || `${query} attends most to ${list}; `
      + `uniform weights would be ${(1 / shown.size).toFixed(3)}`;
  }

  function writeTable() {
    if (!part("details").open) return;
    const cells = (kind, texts) => texts.map(text =>
      Object.assign(document.createElement(kind), {textContent: text}));
    const line = children => {
      const element = document.createElement("tr");
      element.append(...children);
      return element;
    };
    const head = ["key", "weight", "distance, Å", ...(shown.node ? [] : ["envelope"])];
    part("table").replaceChildren(line(cells("th", head)), ...columnsByWeight().map(column => {
      const texts = [nameOf(column), precise(weight(shown.row, column)),
        distance(shown.row, column).toFixed(2)];
      if (!shown.node) texts.push(shown.entries[column].envelope.toFixed(2));
      return line(cells("td", texts));
    }));
  }

  // --- state and controls ---

  function draw() {
    view.draw(makeScene());
    drawMatrix();
    drawCurve();
  }

  const KINDS = {node: "node", source: "neighbourhood, source",
    destination: "neighbourhood, destination"};

  function update(change) {
    if ("query" in change || "kind" in change || "frame" in change || "edge" in change) {
      [hover, tip.hidden] = [null, true];
    }
    Object.assign(state, change);
    shown = currentRows();
    const edges = !shown.node;
    for (const element of all("[data-only=edges]")) element.hidden = !edges;
    if (edges) {
      const edgeNames = shown.entries.map(({long}, slot) => (slot ? long : "the self-edge"));
      setOptions("edge", [...edgeNames.entries()]);
      part("edge").value = shown.row;
    }
    for (const name of ["kind", "query", "block", "head", "scale", "threshold", "frame"]) {
      part(name).value = state[name];
      root.dataset[name] = state[name];
    }
    root.dataset.edge = edges ? shown.row : "";
    for (const button of all("[data-picks]")) {
      button.setAttribute("aria-pressed", button.dataset.picks === state.picks);
    }
    const here = scene.labels[state.query];
    part("heading").textContent = {
      node: "atoms; row: query, column: key",
      source: `edges that leave ${here}; row: query, column: key`,
      destination: `edges that arrive at ${here}; row: query, column: key`,
    }[state.kind];
    part("top").textContent = `${shown.top.toFixed(3)}${shown.clipped ? " and more" : ""}`;
    part("least").textContent = (state.threshold * shown.rowLargest).toFixed(3);
    part("caption").textContent = caption();
    const query = edges && shown.row ? `the edge ${nameOf(shown.row, -1)}` : here;
    canvas.setAttribute("aria-label",
      `The molecule; the query is ${query}. Arrow keys select the atom and the head.`);
    matrixCanvas.setAttribute("aria-label",
      `Matrix of ${shown.size} by ${shown.size} attention weights; the row of ${query} is marked.`);
    writeSummary();
    writeTable();
    drawGallery();
    draw();
  }

  function caption() {
    const {energy, name} = frame(), from = scene.frames[0].energy, count = scene.frames.length;
    const change = energy - from, sign = change < 0 ? "−" : "+";
    const place = `${state.frame + 1} of ${count}${name ? `, ${name}` : ""}`;
    return `${place}; E − E₁ = ${sign}${Math.abs(change).toFixed(3)} eV`;
  }

  function setOptions(name, options) {
    part(name).replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  }

  function redrawAll() { // when the theme or the width of the page may have changed
    theme = root.dataset.theme;
    const ramp = part("ramp").getContext("2d");
    for (let i = 0; i < 256; i++) {
      ramp.fillStyle = css(rampColor(theme, i / 255));
      ramp.fillRect(i, 0, 1, 1);
    }
    if (!shown) return;
    drawGallery();
    draw();
  }

  function play(on) {
    clearInterval(player);
    player = on ? setInterval(() => {
      if (!root.isConnected) return play(false);
      update({frame: (state.frame + 1) % scene.frames.length});
    }, data.interval) : null;
    part("play").textContent = on ? "Pause" : "Play";
    part("text").setAttribute("aria-live", on ? "off" : "polite"); // too fast to read out
  }

  const cycle = (name, by, count, least = 0) => // the next choice; after the last comes the first
    update({[name]: (state[name] - least + by + count - least) % (count - least) + least});
  const step = {
    block: by => cycle("block", by, blocks),
    head: by => cycle("head", by, heads, -1),
    atom: by => selectAtom((state.query + by + n) % n),
    frame: by => cycle("frame", by, scene.frames.length),
    kind: by => update({kind: kinds[(kinds.indexOf(state.kind) + by) % kinds.length]}),
    edge: by => {
      const slot = (shown.row + by + shown.size) % shown.size;
      if (!shown.node) update({edge: slot ? shown.entries[slot] : null});
    },
  };
  const rotateView = (dx, dy) => { view.turn(dx, dy); view.draw(); };
  const zoomView = factor => { if (factor) view.zoom(factor); else view.reset(); view.draw(); };
  const centreView = () => { view.aim(frame().positions[state.query]); view.draw(); };
  const KEYS = {
    ArrowLeft: () => step.atom(-1), ArrowRight: () => step.atom(1),
    ArrowUp: () => step.head(-1), ArrowDown: () => step.head(1),
    "Shift ArrowUp": () => step.block(-1), "Shift ArrowDown": () => step.block(1),
    "Shift ArrowLeft": () => step.edge(-1), "Shift ArrowRight": () => step.edge(1),
    k: () => step.kind(1), " ": () => several && play(!player),
    ",": () => step.frame(-1), ".": () => step.frame(1),
    a: () => rotateView(-0.15, 0), d: () => rotateView(0.15, 0),
    w: () => rotateView(0, -0.15), s: () => rotateView(0, 0.15),
    "+": () => zoomView(1.2), "=": () => zoomView(1.2), "-": () => zoomView(1 / 1.2),
    0: () => zoomView(0),
    c: centreView,
  };
  root.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("select, input, button, summary")) return; // they have their own keys
    const arrow = event.key.startsWith("Arrow"), shift = arrow && event.shiftKey ? "Shift " : "";
    const key = shift + (arrow ? event.key : event.key.toLowerCase());
    if (!KEYS[key]) return;
    event.preventDefault();
    event.stopPropagation();
    KEYS[key]();
  });

  const numbered = count => [...Array(count).keys()].map(i => [i, i]);
  setOptions("kind", kinds.map(kind => [kind, KINDS[kind]]));
  setOptions("query", scene.labels.map((label, i) => [i, label]));
  setOptions("block", numbered(blocks));
  setOptions("head", [[-1, "mean"], ...numbered(heads)]);
  setOptions("scale",
    [["matrix", "largest in the matrix"], ["row", "largest in the row"], ["one", "1"]]);
  part("frame").max = scene.frames.length - 1;
  const number = name => ({[name]: Number(part(name).value)});
  part("kind").onchange = () => update({kind: part("kind").value});
  part("query").onchange = () => selectAtom(Number(part("query").value));
  part("edge").onchange = () => {
    const slot = Number(part("edge").value);
    update({edge: slot ? shown.entries[slot] : null});
  };
  part("block").onchange = () => update(number("block"));
  part("head").onchange = () => update(number("head"));
  part("scale").onchange = () => update({scale: part("scale").value});
  part("threshold").oninput = () => update(number("threshold"));
  part("frame").oninput = () => { play(false); update(number("frame")); };
  part("curve").onpointerdown = frameAt;
  part("curve").onpointermove = event => event.buttons && frameAt(event);
  part("play").onclick = () => play(!player);
  part("details").ontoggle = writeTable;
  part("gallery").ontoggle = drawGallery;
  for (const button of all("[data-step]")) {
    button.onclick = () => step[button.dataset.step](Number(button.dataset.by));
  }
  const TOOLS = {in: () => zoomView(1.25), out: () => zoomView(0.8), reset: () => zoomView(0),
    centred: centreView};
  for (const button of all("[data-tool]")) button.onclick = TOOLS[button.dataset.tool];
  for (const button of all("[data-picks]")) {
    button.onclick = () => update({picks: button.dataset.picks});
  }
  matrixCanvas.addEventListener("pointermove", event => setHover(cellAt(event), event));
  matrixCanvas.addEventListener("pointerleave", event => setHover(null, event));
  matrixCanvas.addEventListener("pointerdown", event => {
    matrixCanvas.focus({preventScroll: true});
    const found = cellAt(event);
    if (!found) return;
    if (shown.node) selectAtom(found.row);
    else update({edge: found.row ? shown.entries[found.row] : null});
    setHover(found, event);
  });

  for (const element of all("canvas, button, select, input, summary")) {
    element.dataset.lmSuppressShortcuts = "true"; // else JupyterLab uses the keys (B: new cell)
  }
  part("kinds").hidden = part("kindHint").hidden = kinds.length < 2;
  part("side").hidden = !data.matrix;
  for (const element of all("[data-only=frames]")) element.hidden = !several;
  for (const element of all("[data-only=curve]")) element.hidden = scene.frames.length < 3;
  part("note").textContent = data.note;
  view = moleculeView(canvas, {
    size: () => scene.size,
    clicked: atomClicked,
    hovered: (ball, event) => {
      const column = columnOf(ball);
      setHover(column === null ? null : {row: shown.row, column}, event);
    },
  });
  if (data.edge) state.edge = maps.slots(state.frame, state.query)[data.edge];
  followPage(root, redrawAll);
  update({});
}
