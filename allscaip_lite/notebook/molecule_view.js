// Atoms, bonds and links in space, on a plain 2D canvas: turned, moved and zoomed by mouse, touch
// and keys. explorer.js says what is drawn; neither needs a library or a network.

// `size()` gives what must fit, in Å from the origin to the side: {reach, width, height}.
// `picked(ball, event)` and `hovered(ball or null, event)` are called with the index of a ball.
// Returns {draw, turn, zoom, move, aim, reset}.
//
// draw(scene), and scene is
//   balls    [{at: [x, y, z], radius, color: [r, g, b], label, faint, named}], Å, colours in 0..1
//   sticks   [{from, to, faint}] between balls, each half in the colour of its ball
//   lines    [[from, to]] between points: the cell
//   threads  [{from, to}] between balls, thin and broken
//   links    [{from, to, width, color}] between balls, thin at `from`; width in pixels
//   tubes    [{from, to, color}] mark a pair of balls
//   rings    [{ball, gap, width, color}] around balls
//   paper, ink  colours of the background and of lines on it
function moleculeView(canvas, {size, picked, hovered}) {
  const context = canvas.getContext("2d");
  let scene = null, screen = [], width = 0, height = 0, scale = 1, sharp = 1, fitted = null;
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

  function aim(point) { // what stands in the middle
    Object.assign(camera, {aim: point, x: 0, y: 0});
  }

  function fit() { // the canvas has the pixels it is shown with
    const sides = [canvas.clientWidth, canvas.clientHeight];
    sharp = Math.max(2, window.devicePixelRatio || 1);
    if (sides[0] !== width || sides[1] !== height) {
      [width, height] = sides;
      canvas.width = width * sharp;
      canvas.height = height * sharp;
    }
    fitted = size();
    scale = 0.48 * Math.min(width / fitted.width, height / fitted.height); // pixels an Å
  }

  function project(p) { // Å → pixels; z points at the viewer, near things are larger
    const [x, y, z] = camera.rotation.map(row =>
      row.reduce((sum, value, k) => sum + value * (p[k] - camera.aim[k]), 0));
    const far = 6 * fitted.reach;
    const zoom = scale * camera.zoom * far / Math.max(far / 6, far - z);
    return {x: width / 2 + camera.x + zoom * x, y: height / 2 + camera.y - zoom * y, z, zoom};
  }

  const mixed = (a, b, part) => a.map((c, i) => c + part * (b[i] - c));
  const css = color => `rgb(${color.map(c => Math.round(255 * c))})`;

  function haze(ball, z) { // what is far away, or only an image, is nearer to the paper
    const depth = 0.3 * Math.min(1, Math.max(0, 0.5 - z / (2 * fitted.reach)));
    return ball.faint ? 0.62 + 0.2 * depth : depth;
  }

  function drawBall(ball, {x, y, z, zoom}) {
    const r = ball.radius * zoom, color = mixed(ball.color, scene.paper, haze(ball, z));
    const gradient = context.createRadialGradient(x - r / 3, y - r / 3, r / 10, x, y, r);
    gradient.addColorStop(0, css(mixed(color, [1, 1, 1], ball.faint ? 0.2 : 0.6)));
    gradient.addColorStop(1, css(color));
    circle(x, y, r);
    context.fillStyle = gradient;
    context.fill();
    context.lineWidth = 1;
    context.strokeStyle = css(mixed(color, scene.ink, 0.45));
    if (ball.faint) context.setLineDash([3, 3]);
    context.stroke();
    context.setLineDash([]);
    if (!ball.named) return;
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

  function between({from, to}) { // a line from surface to surface on the screen
    const [a, b] = [screen[from], screen[to]], length = Math.hypot(b.x - a.x, b.y - a.y) || 1;
    const at = (ball, i, sign) => {
      const part = sign * Math.min(length / 2, scene.balls[i].radius * ball.zoom) / length;
      return {x: ball.x + part * (b.x - a.x), y: ball.y + part * (b.y - a.y), zoom: ball.zoom};
    };
    return {ends: [at(a, from, 1), at(b, to, -1)], z: (a.z + b.z) / 2};
  }

  function drawLink({from, to, width: wide, color}) { // thin at `from`, wide at `to`, off the bonds
    const [a, b] = [screen[from], screen[to]], [dx, dy] = [b.x - a.x, b.y - a.y];
    const middle = {x: (a.x + b.x) / 2 - 0.14 * dy, y: (a.y + b.y) / 2 + 0.14 * dx};
    const edge = (ball, i) => { // where the curve leaves the ball
      const length = Math.hypot(middle.x - ball.x, middle.y - ball.y) || 1;
      const part = Math.min(0.9, (scene.balls[i].radius * ball.zoom + 1) / length);
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
    context.closePath();
    context.globalAlpha = 0.88;
    context.fillStyle = css(color);
    context.fill();
    context.lineWidth = 0.8; // what is pale shows on paper too
    context.strokeStyle = css(mixed(color, scene.ink, 0.35));
    context.stroke();
    context.globalAlpha = 1;
  }

  function stickHalves({from, to, faint}) { // two halves, from the surface of a ball to the middle
    const [a, b] = [scene.balls[from].at, scene.balls[to].at];
    const between = part => project(mixed(a, b, part));
    const length = Math.hypot(...a.map((x, axis) => b[axis] - x)) || 1, middle = between(0.5);
    const place = [[from, 0.9 * scene.balls[from].radius / length],
      [to, 1 - 0.9 * scene.balls[to].radius / length]];
    return place.map(([i, part]) => {
      const end = between(part), ball = scene.balls[i];
      const color = mixed(mixed(ball.color, scene.ink, 0.2), scene.paper,
        haze({faint: faint || ball.faint}, end.z));
      return {z: (end.z + middle.z) / 2 - 0.01,
        paint: () => drawLine(end, middle, 0.16 * end.zoom, css(color))};
    });
  }

  function draw(next) { // the painter's way: what is farthest first
    scene = next || scene;
    if (!scene) return;
    fit();
    if (!width || !height) return; // not shown yet
    screen = scene.balls.map(ball => project(ball.at));
    const items = scene.balls.map((ball, i) =>
      ({z: screen[i].z, paint: () => drawBall(ball, screen[i])}));
    for (const stick of scene.sticks) items.push(...stickHalves(stick));
    for (const [from, to] of scene.lines.map(ends => ends.map(project))) {
      const paint = () => drawLine(from, to, 1.2, css(mixed(scene.paper, scene.ink, 0.35)));
      items.push({z: (from.z + to.z) / 2, paint});
    }
    const pale = css(mixed(scene.paper, scene.ink, 0.4));
    for (const thread of scene.threads) {
      const {ends, z} = between(thread);
      const paint = () => {
        context.setLineDash([2, 5]);
        drawLine(...ends, 1, pale);
        context.setLineDash([]);
      };
      items.push({z: z - 0.03, paint});
    }
    for (const tube of scene.tubes) {
      const {ends, z} = between(tube), thick = 0.3 * ends[0].zoom;
      items.push({z: z - 0.02, paint: () => drawLine(...ends, thick, css(tube.color))});
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
    context.setTransform(sharp, 0, 0, sharp, 0, 0);
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
      const better = best === null || (scene.balls[best].faint && !scene.balls[i].faint)
        || (scene.balls[best].faint === scene.balls[i].faint && p.z > screen[best].z);
      if (better) best = i;
    });
    return best;
  }

  // One pointer turns (moves, with Shift or another button than the first); two move and zoom.
  const held = new Map();
  let travelled = 0, several = false;
  const spread = () => {
    const [a, b] = [...held.values()];
    return {x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, size: Math.hypot(a.x - b.x, a.y - b.y) || 1};
  };
  canvas.addEventListener("pointerdown", event => {
    if (!held.size) [travelled, several] = [0, false];
    held.set(event.pointerId, {x: event.clientX, y: event.clientY});
    several = several || held.size > 1;
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({preventScroll: true});
  });
  canvas.addEventListener("pointermove", event => {
    const last = held.get(event.pointerId);
    if (!last) {
      const ball = ballAt(event);
      canvas.style.cursor = ball === null ? "grab" : "pointer";
      return hovered(ball, event);
    }
    const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
    travelled += Math.hypot(dx, dy);
    const before = held.size > 1 ? spread() : null;
    held.set(event.pointerId, {x: event.clientX, y: event.clientY});
    if (before) {
      const after = spread();
      move(after.x - before.x, after.y - before.y);
      zoom(after.size / before.size);
    } else if (several) {
      return; // one of two fingers has left: the other no longer does anything
    } else if (event.shiftKey || event.buttons > 1) {
      move(dx, dy);
    } else {
      turn(dx / 120, dy / 120);
    }
    draw();
  });
  const released = event => {
    if (!held.delete(event.pointerId) || event.type === "pointercancel") return;
    const ball = travelled < 5 && !several ? ballAt(event) : null;
    if (ball !== null) picked(ball, event);
  };
  canvas.addEventListener("pointerup", released);
  canvas.addEventListener("pointercancel", released);
  canvas.addEventListener("pointerleave", event => hovered(null, event));
  canvas.addEventListener("contextmenu", event => { // the right button moves
    event.preventDefault();
    event.stopPropagation();
  });
  canvas.addEventListener("wheel", event => { // a page that scrolls past must not catch
    if (!event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)));
    draw();
  }, {passive: false});

  reset();
  return {draw, turn, zoom, move, aim, reset};
}
