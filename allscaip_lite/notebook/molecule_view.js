// Atoms, bonds and links in three dimensions, drawn on a 2D canvas. Mouse, touch and keys rotate,
// move and zoom the view. explorer.js says what is drawn. No library and no network is needed.

// --- colours and the theme of the page -----------------------------------------------------------

const channels = text => [1, 3, 5].map(at => parseInt(text.slice(at, at + 2), 16) / 255);
const css = color => `rgb(${color.map(c => Math.round(255 * c)).join(" ")})`;

function styleColor(root, name) { // a #rgb or #rrggbb colour of the style sheet → channels in 0..1
  const text = getComputedStyle(root).getPropertyValue(name).trim();
  return channels(text.length === 4 ? text.replace(/[^#]/g, "$&$&") : text);
}

function backgroundTheme(root) { // from the first parent with an opaque background
  const isBright = element => { // null where the background is transparent
    const [r, g, b, a = 1] = getComputedStyle(element).backgroundColor.match(/[\d.]+/g).map(Number);
    return a < 0.5 ? null : 0.3 * r + 0.6 * g + 0.1 * b > 128;
  };
  for (let element = root.parentElement; element; element = element.parentElement) {
    const found = isBright(element);
    if (found !== null) return found ? "light" : "dark";
  }
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.background = "Canvas"; // the default background, by the preference of the reader
  const found = isBright(probe);
  probe.remove();
  return found ? "light" : "dark";
}

// Call `redraw` now, and when the theme or the width of the page may have changed.
function followPage(root, redraw) {
  const redrawNow = () => {
    if (!root.isConnected) return;
    root.dataset.theme = backgroundTheme(root);
    redraw();
  };
  const redrawLater = () => { // some styles are loaded with a delay
    for (const delay of [0, 300, 1500]) setTimeout(redrawNow, delay);
  };
  redrawNow();
  new ResizeObserver(redrawNow).observe(root);
  const observer = new MutationObserver(redrawLater);
  for (const element of [document.documentElement, document.body]) {
    observer.observe(element, {attributes: true});
  }
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawLater);
}

// --- the view ------------------------------------------------------------------------------------

// `size()` returns the size of the scene, in Å from the origin: {reach, width, height}.
// `clicked(ball, event)` and `hovered(ball or null, event)` are called with the index of a ball.
// Returns {draw, turn, zoom, move, aim, reset}.
//
// draw(scene), with the scene
//   balls   [{at: [x, y, z], radius, color: [r, g, b], label, pale, labelled}]; Å, colours in 0..1
//   sticks  [{from, to, pale}] between balls, each half in the colour of its ball
//   lines   [[from, to]] between points: the cell
//   dashed  [{from, to}] between balls, thin dashed lines
//   links   [{from, to, width, color}] between balls, thin at `from`; width in pixels
//   marks   [{from, to, color}] thick lines that mark a pair of balls
//   rings   [{ball, gap, width, color}] around balls
//   background, text  colours of the background, and of labels and lines
function moleculeView(canvas, {size, clicked, hovered}) {
  const context = canvas.getContext("2d");
  let scene = null, screen = [], width = 0, height = 0, scale = 1, pixelRatio = 1, sceneSize = null;
  let camera = {};

  function reset() {
    camera = {rotation: [[1, 0, 0], [0, 1, 0], [0, 0, 1]], aim: [0, 0, 0], zoom: 1, x: 0, y: 0};
  }

  function turn(dx, dy) { // radians about the screen's vertical and horizontal axis
    const [ca, sa, cb, sb] = [Math.cos(dx), Math.sin(dx), Math.cos(dy), Math.sin(dy)];
    const step = [[ca, 0, sa], [sb * sa, cb, -sb * ca], [-cb * sa, sb, cb * ca]];
    camera.rotation = step.map(row => [0, 1, 2].map(j =>
      row.reduce((sum, value, k) => sum + value * camera.rotation[k][j], 0)));
  }

  function zoom(factor) {
    camera.zoom = Math.min(20, Math.max(0.2, camera.zoom * factor));
  }

  function move(dx, dy) { // pixels
    camera.x += dx;
    camera.y += dy;
  }

  function aim(point) { // put a point into the centre of the view
    Object.assign(camera, {aim: point, x: 0, y: 0});
  }

  function fit() { // adapt the canvas to the size with which it is displayed
    const sides = [canvas.clientWidth, canvas.clientHeight];
    pixelRatio = Math.max(2, window.devicePixelRatio || 1);
    if (sides[0] !== width || sides[1] !== height) {
      [width, height] = sides;
      canvas.width = width * pixelRatio;
      canvas.height = height * pixelRatio;
    }
    sceneSize = size();
    scale = 0.48 * Math.min(width / sceneSize.width, height / sceneSize.height); // pixels per Å
  }

  function project(p) { // Å → pixels; z points at the viewer; near objects are larger
    const [x, y, z] = camera.rotation.map(row =>
      row.reduce((sum, value, k) => sum + value * (p[k] - camera.aim[k]), 0));
    const eye = 6 * sceneSize.reach; // z of the viewer, Å
    const zoom = scale * camera.zoom * eye / Math.max(eye / 6, eye - z);
    return {x: width / 2 + camera.x + zoom * x, y: height / 2 + camera.y - zoom * y, z, zoom};
  }

  const mix = (a, b, fraction) => a.map((c, i) => c + fraction * (b[i] - c));

  function fading(ball, z) { // fraction of the background colour: larger for far atoms and images
    const depth = 0.3 * Math.min(1, Math.max(0, 0.5 - z / (2 * sceneSize.reach)));
    return ball.pale ? 0.62 + 0.2 * depth : depth;
  }

  function drawBall(ball, {x, y, z, zoom}) {
    const r = ball.radius * zoom, color = mix(ball.color, scene.background, fading(ball, z));
    const gradient = context.createRadialGradient(x - r / 3, y - r / 3, r / 10, x, y, r);
    gradient.addColorStop(0, css(mix(color, [1, 1, 1], ball.pale ? 0.2 : 0.6)));
    gradient.addColorStop(1, css(color));
    circle(x, y, r);
    context.fillStyle = gradient;
    context.fill();
    context.lineWidth = 1;
    context.strokeStyle = css(mix(color, scene.text, 0.45));
    if (ball.pale) context.setLineDash([3, 3]);
    context.stroke();
    context.setLineDash([]);
    if (!ball.labelled) return;
    const light = 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2];
    context.fillStyle = light > 0.5 ? "#111" : "#fff";
    context.font = `600 ${Math.max(9, Math.min(0.8 * r, 18))}px sans-serif`;
    context.fillText(ball.label, x, y);
  }

  function circle(x, y, r) {
    context.beginPath();
    context.arc(x, y, r, 0, 7);
  }

  function drawLine(from, to, lineWidth, style) {
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y);
    context.lineWidth = lineWidth;
    context.strokeStyle = style;
    context.stroke();
  }

  function between({from, to}) { // a line on the screen, from surface to surface of two balls
    const [a, b] = [screen[from], screen[to]], length = Math.hypot(b.x - a.x, b.y - a.y) || 1;
    const at = (ball, i, sign) => {
      const part = sign * Math.min(length / 2, scene.balls[i].radius * ball.zoom) / length;
      return {x: ball.x + part * (b.x - a.x), y: ball.y + part * (b.y - a.y), zoom: ball.zoom};
    };
    return {ends: [at(a, from, 1), at(b, to, -1)], z: (a.z + b.z) / 2};
  }

  function drawLink({from, to, width: endWidth, color}) { // curved, to be apart from the bonds
    const [a, b] = [screen[from], screen[to]], [dx, dy] = [b.x - a.x, b.y - a.y];
    const middle = {x: (a.x + b.x) / 2 - 0.14 * dy, y: (a.y + b.y) / 2 + 0.14 * dx};
    const edge = (ball, i) => { // the point where the curve leaves the ball
      const length = Math.hypot(middle.x - ball.x, middle.y - ball.y) || 1;
      const part = Math.min(0.9, (scene.balls[i].radius * ball.zoom + 1) / length);
      return {x: ball.x + part * (middle.x - ball.x), y: ball.y + part * (middle.y - ball.y)};
    };
    const [start, end] = [edge(a, from), edge(b, to)], length = Math.hypot(dx, dy) || 1;
    const [nx, ny] = [-dy / length * endWidth / 2, dx / length * endWidth / 2];
    context.beginPath();
    context.moveTo(start.x + nx / 4, start.y + ny / 4);
    context.quadraticCurveTo(middle.x + nx / 2, middle.y + ny / 2, end.x + nx, end.y + ny);
    context.lineTo(end.x - nx, end.y - ny);
    context.quadraticCurveTo(
      middle.x - nx / 2, middle.y - ny / 2, start.x - nx / 4, start.y - ny / 4);
    context.closePath();
    context.globalAlpha = 0.88;
    context.fillStyle = css(color);
    context.fill();
    context.lineWidth = 0.8; // makes pale links visible on the background
    context.strokeStyle = css(mix(color, scene.text, 0.35));
    context.stroke();
    context.globalAlpha = 1;
  }

  function stickHalves({from, to, pale}) { // each from the surface of a ball to the middle
    const [a, b] = [scene.balls[from].at, scene.balls[to].at];
    const between = part => project(mix(a, b, part));
    const length = Math.hypot(...a.map((x, axis) => b[axis] - x)) || 1, middle = between(0.5);
    const place = [[from, 0.9 * scene.balls[from].radius / length],
      [to, 1 - 0.9 * scene.balls[to].radius / length]];
    return place.map(([i, part]) => {
      const end = between(part), ball = scene.balls[i];
      const color = mix(mix(ball.color, scene.text, 0.2), scene.background,
        fading({pale: pale || ball.pale}, end.z));
      return {z: (end.z + middle.z) / 2 - 0.01,
        paint: () => drawLine(end, middle, 0.16 * end.zoom, css(color))};
    });
  }

  function draw(next) { // from back to front (painter's algorithm)
    scene = next || scene;
    if (!scene) return;
    fit();
    if (!width || !height) return; // not displayed yet
    screen = scene.balls.map(ball => project(ball.at));
    const items = scene.balls.map((ball, i) =>
      ({z: screen[i].z, paint: () => drawBall(ball, screen[i])}));
    for (const stick of scene.sticks) items.push(...stickHalves(stick));
    for (const [from, to] of scene.lines.map(ends => ends.map(project))) {
      const paint = () => drawLine(from, to, 1.2, css(mix(scene.background, scene.text, 0.35)));
      items.push({z: (from.z + to.z) / 2, paint});
    }
    const grey = css(mix(scene.background, scene.text, 0.4));
    for (const line of scene.dashed) {
      const {ends, z} = between(line);
      const paint = () => {
        context.setLineDash([2, 5]);
        drawLine(...ends, 1, grey);
        context.setLineDash([]);
      };
      items.push({z: z - 0.03, paint});
    }
    for (const mark of scene.marks) {
      const {ends, z} = between(mark), lineWidth = 0.3 * ends[0].zoom;
      items.push({z: z - 0.02, paint: () => drawLine(...ends, lineWidth, css(mark.color))});
    }
    for (const link of scene.links) {
      items.push({z: between(link).z, paint: () => drawLink(link)});
    }
    for (const ring of scene.rings) {
      const {x, y, z, zoom} = screen[ring.ball];
      const paint = () => {
        circle(x, y, scene.balls[ring.ball].radius * zoom + ring.gap + ring.width / 2);
        context.lineWidth = ring.width;
        context.strokeStyle = css(ring.color);
        context.stroke();
      };
      items.push({z: z + 0.01, paint});
    }
    context.setTransform(pixelRatio, 0, 0, pixelRatio, 0, 0);
    context.clearRect(0, 0, width, height);
    Object.assign(context, {textAlign: "center", textBaseline: "middle", lineCap: "round"});
    items.sort((a, b) => a.z - b.z).forEach(item => item.paint());
  }

  function ballAt(event) {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const least = event.pointerType === "touch" ? 16 : 8;
    let best = null;
    screen.forEach((p, i) => {
      const r = Math.max(least, scene.balls[i].radius * p.zoom + 2);
      if (Math.hypot(p.x - x, p.y - y) > r) return;
      const better = best === null || (scene.balls[best].pale && !scene.balls[i].pale)
        || (scene.balls[best].pale === scene.balls[i].pale && p.z > screen[best].z);
      if (better) best = i;
    });
    return best;
  }

  // One pointer rotates (with Shift or another button it moves); two pointers move and zoom.
  const pointers = new Map();
  let dragLength = 0, several = false;
  const span = () => { // centre and distance of two pointers
    const [a, b] = [...pointers.values()];
    return {x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, size: Math.hypot(a.x - b.x, a.y - b.y) || 1};
  };
  canvas.addEventListener("pointerdown", event => {
    if (!pointers.size) [dragLength, several] = [0, false];
    pointers.set(event.pointerId, {x: event.clientX, y: event.clientY});
    several = several || pointers.size > 1;
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({preventScroll: true});
  });
  canvas.addEventListener("pointermove", event => {
    const last = pointers.get(event.pointerId);
    if (!last) {
      const ball = ballAt(event);
      canvas.style.cursor = ball === null ? "grab" : "pointer";
      return hovered(ball, event);
    }
    const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
    dragLength += Math.hypot(dx, dy);
    const before = pointers.size > 1 ? span() : null;
    pointers.set(event.pointerId, {x: event.clientX, y: event.clientY});
    if (before) {
      const after = span();
      move(after.x - before.x, after.y - before.y);
      zoom(after.size / before.size);
    } else if (several) {
      return; // one of two fingers was lifted: ignore the other
    } else if (event.shiftKey || event.buttons > 1) {
      move(dx, dy);
    } else {
      turn(dx / 120, dy / 120);
    }
    draw();
  });
  const released = event => {
    if (!pointers.delete(event.pointerId) || event.type === "pointercancel") return;
    const ball = dragLength < 5 && !several ? ballAt(event) : null;
    if (ball !== null) clicked(ball, event);
  };
  canvas.addEventListener("pointerup", released);
  canvas.addEventListener("pointercancel", released);
  canvas.addEventListener("pointerleave", event => hovered(null, event));
  canvas.addEventListener("contextmenu", event => { // the right button moves the view
    event.preventDefault();
    event.stopPropagation();
  });
  canvas.addEventListener("wheel", event => { // only with focus, so that the page can scroll
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)));
    draw();
  }, {passive: false});

  reset();
  return {draw, turn, zoom, move, aim, reset};
}
