// A molecule that can be turned, on a plain 2D canvas, and on it the attention of one atom.
// views.py puts this file into a page together with the data; it needs no library and no network.

// Balls, sticks and links. scene: {positions: [[x, y, z]], radii, colors, labels, bonds: [[i, j]]}.
// `links()` gives [{from, to, width, alpha}], `marked()` the atom to circle with the width of its
// ring; `picked(atom)` and `hovered(atom or null)` are called back. Returns {draw}.
function moleculeView(canvas, scene, {links, marked, picked, hovered}) {
  const n = scene.positions.length, context = canvas.getContext("2d");
  const reach = Math.max(1.5, ...scene.positions.map((p, i) => Math.hypot(...p) + scene.radii[i]));
  const extent = axis => Math.max(1.5, ...scene.positions.map((p, i) =>
    Math.abs(p[axis]) + scene.radii[i]));
  const width = canvas.width, height = canvas.height; // as the page says, in CSS pixels
  const scale = 0.85 * Math.min(width / extent(0), height / extent(1)) / 2; // pixels an Å
  const sharp = Math.max(2, window.devicePixelRatio || 1);
  canvas.width = width * sharp;
  canvas.height = height * sharp;
  let rotation = [[1, 0, 0], [0, 1, 0], [0, 0, 1]], screen = [];

  function turn(dx, dy) { // radians about the screen's vertical and horizontal axis
    const [ca, sa, cb, sb] = [Math.cos(dx), Math.sin(dx), Math.cos(dy), Math.sin(dy)];
    const step = [[ca, 0, sa], [sb * sa, cb, -sb * ca], [-cb * sa, sb, cb * ca]];
    rotation = step.map(row => [0, 1, 2].map(j =>
      row.reduce((sum, value, k) => sum + value * rotation[k][j], 0)));
  }

  function project(p) { // Å → pixels; z points at the viewer, near things are larger
    const [x, y, z] = rotation.map(row => row[0] * p[0] + row[1] * p[1] + row[2] * p[2]);
    const zoom = scale * 6 * reach / (6 * reach - z);
    return {x: width / 2 + zoom * x, y: height / 2 - zoom * y, z, zoom};
  }

  const shade = (color, by) => // towards white (by > 0) or black
    `rgb(${color.map(c => Math.round(255 * (by > 0 ? c + (1 - c) * by : c * (1 + by))))})`;
  const fog = z => 0.3 * (1 - (z + reach) / (2 * reach)); // what is far away is paler

  function drawBall(i) {
    const {x, y, z, zoom} = screen[i], r = scene.radii[i] * zoom, color = scene.colors[i];
    const gradient = context.createRadialGradient(x - r / 3, y - r / 3, r / 10, x, y, r);
    gradient.addColorStop(0, shade(color, 0.6));
    gradient.addColorStop(1, shade(color, fog(z)));
    context.beginPath();
    context.arc(x, y, r, 0, 7);
    context.fillStyle = gradient;
    context.fill();
    context.lineWidth = 1;
    context.strokeStyle = shade(color, -0.45);
    context.stroke();
    const ring = marked();
    if (ring.atom === i) {
      context.beginPath();
      context.arc(x, y, r + 1 + ring.width / 2, 0, 7);
      context.lineWidth = ring.width;
      context.strokeStyle = scene.linkColor;
      context.stroke();
    }
    if (n > 60) return;
    const light = 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2];
    context.fillStyle = light > 0.5 ? "#222" : "#fff";
    context.font = `${Math.max(8, Math.min(0.75 * r, 15))}px sans-serif`;
    context.fillText(scene.labels[i], x, y);
  }

  function drawStick(from, to, lineWidth, style) {
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y);
    context.lineWidth = lineWidth;
    context.strokeStyle = style;
    context.stroke();
  }

  function drawLink({from, to, width: wide, alpha}) { // thin at `from`, wide at `to`, off the bonds
    const [a, b] = [screen[from], screen[to]], [dx, dy] = [b.x - a.x, b.y - a.y];
    const middle = {x: (a.x + b.x) / 2 - 0.14 * dy, y: (a.y + b.y) / 2 + 0.14 * dx};
    const edge = (ball, i) => { // where the curve leaves the ball
      const length = Math.hypot(middle.x - ball.x, middle.y - ball.y) || 1;
      const part = Math.min(0.9, (scene.radii[i] * ball.zoom + 1) / length);
      return {x: ball.x + part * (middle.x - ball.x), y: ball.y + part * (middle.y - ball.y)};
    };
    const [start, end] = [edge(a, from), edge(b, to)], length = Math.hypot(dx, dy) || 1;
    const [nx, ny] = [-dy / length * wide / 2, dx / length * wide / 2];
    context.beginPath();
    context.moveTo(start.x + nx / 4, start.y + ny / 4);
    context.quadraticCurveTo(middle.x + nx / 2, middle.y + ny / 2, end.x + nx, end.y + ny);
    context.lineTo(end.x - nx, end.y - ny);
    context.quadraticCurveTo(
      middle.x - nx / 2, middle.y - ny / 2, start.x - nx / 4, start.y - ny / 4);
    context.globalAlpha = alpha;
    context.fillStyle = scene.linkColor;
    context.fill();
    context.globalAlpha = 1;
  }

  function draw() { // the painter's way: what is farthest first
    screen = scene.positions.map(project);
    const items = screen.map((p, i) => ({z: p.z, paint: () => drawBall(i)}));
    for (const [i, j] of scene.bonds) {
      const [a, b] = [scene.positions[i], scene.positions[j]];
      const between = part => project(a.map((x, axis) => x + part * (b[axis] - x)));
      const length = Math.hypot(...a.map((x, axis) => b[axis] - x)), middle = between(0.5);
      const ends = [[i, 0.9 * scene.radii[i] / length], [j, 1 - 0.9 * scene.radii[j] / length]];
      for (const [atom, part] of ends) { // from the surface of its ball
        const end = between(part), color = scene.colors[atom];
        const style = shade(color, color[0] > 0.9 ? -0.15 : 0.15);
        const paint = () => drawStick(end, middle, 0.16 * end.zoom, style);
        items.push({z: (end.z + middle.z) / 2, paint});
      }
    }
    for (const link of links()) {
      const z = (screen[link.from].z + screen[link.to].z) / 2;
      items.push({z, paint: () => drawLink(link)});
    }
    context.setTransform(sharp, 0, 0, sharp, 0, 0);
    context.clearRect(0, 0, width, height);
    Object.assign(context, {textAlign: "center", textBaseline: "middle", lineCap: "round"});
    items.sort((a, b) => a.z - b.z).forEach(item => item.paint());
  }

  function atomAt(event) {
    const box = canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) * width / box.width; // a narrow page shrinks the canvas
    const y = (event.clientY - box.top) * height / box.height;
    const hit = screen.map((p, i) => ({i, ...p})).filter(p =>
      Math.hypot(p.x - x, p.y - y) < Math.max(8, scene.radii[p.i] * p.zoom + 2));
    return hit.length ? hit.reduce((a, b) => (a.z > b.z ? a : b)).i : null;
  }

  let held = null;
  canvas.onpointerdown = event => {
    held = {x: event.clientX, y: event.clientY, moved: 0};
    canvas.setPointerCapture(event.pointerId);
  };
  canvas.onpointermove = event => {
    if (!held) {
      const atom = atomAt(event);
      canvas.style.cursor = atom === null ? "grab" : "pointer";
      return hovered(atom);
    }
    const [dx, dy] = [event.clientX - held.x, event.clientY - held.y];
    held = {x: event.clientX, y: event.clientY, moved: held.moved + Math.hypot(dx, dy)};
    turn(dx / 120, dy / 120);
    draw();
  };
  canvas.onpointerup = event => {
    const atom = held && held.moved < 5 ? atomAt(event) : null;
    held = null;
    if (atom !== null) picked(atom);
  };
  canvas.onpointercancel = () => { held = null; };
  return {draw};
}

// The attention of one atom in one block and head. data: {scene, blocks, heads, weights, query,
// block, head}; weights is base64 of little-endian uint16 (block, head, query, key), 65535 = 1.
function attentionView(root, data) {
  const {scene, blocks, heads} = data, n = scene.positions.length;
  const bytes = Uint8Array.from(atob(data.weights), c => c.charCodeAt(0));
  const weights = new Uint16Array(bytes.buffer);
  const part = name => root.querySelector(`[data-part=${name}]`);
  const state = {query: data.query, block: data.block, head: data.head}; // head -1: the mean
  let hover = null;

  function row() { // (n,) what the query takes from every atom
    const of = head => weights.subarray(
      ((state.block * heads + head) * n + state.query) * n).subarray(0, n);
    const chosen = state.head < 0 ? [...Array(heads).keys()] : [state.head];
    return scene.labels.map((_, j) =>
      chosen.reduce((sum, head) => sum + of(head)[j], 0) / chosen.length / 65535);
  }

  const most = values => // of what comes from others, so that a large own share hides no link
    Math.max(1e-9, ...values.filter((_, j) => j !== state.query));
  const view = moleculeView(part("canvas"), scene, {
    links: () => {
      const values = row(), top = most(values);
      return values.map((value, to) => ({from: state.query, to, strength: value / top}))
        .filter(link => link.to !== state.query && link.strength > 0.02)
        .map(link => ({...link, width: 12 * link.strength, alpha: 0.2 + 0.6 * link.strength}));
    },
    marked: () => {
      const values = row();
      return {atom: state.query, width: 1 + 6 * Math.min(1, values[state.query] / most(values))};
    },
    picked: atom => show({query: atom}),
    hovered: atom => { hover = atom; tell(); },
  });

  function tell() {
    const values = row(), order = values.map((_, j) => j).sort((a, b) => values[b] - values[a]);
    const name = j => scene.labels[j] + (j === state.query ? " (itself)" : "");
    const list = order.slice(0, 5).map(j => `${name(j)} ${values[j].toFixed(3)}`).join(", ");
    const pointed = hover === null ? `an equal share would be ${(1 / n).toFixed(3)}`
      : `${name(hover)}: ${values[hover].toFixed(3)}`;
    part("text").textContent = `${scene.labels[state.query]} takes most from ${list}; ${pointed}`;
  }

  function show(change) {
    Object.assign(state, change);
    for (const name of ["query", "block", "head"]) {
      part(name).value = state[name];
      root.dataset[name] = state[name];
    }
    tell();
    view.draw();
  }

  const fill = (name, options) => {
    part(name).replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    part(name).onchange = () => show({[name]: Number(part(name).value)});
  };
  const counted = count => [...Array(count).keys()].map(i => [i, i]);
  fill("query", scene.labels.map((label, i) => [i, label]));
  fill("block", counted(blocks));
  fill("head", [[-1, "mean"], ...counted(heads)]);
  show({});
}
