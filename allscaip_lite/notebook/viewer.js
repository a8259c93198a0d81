// A molecule that can be rotated, or the frames of a trajectory as a movie.
// viewer.py puts this file, molecule_view.js, viewer.html and the data into a page.

function framesView(root, data) {
  root.querySelector("[data-part=message]").hidden = true;
  root.insertAdjacentHTML("beforeend", data.markup);
  const part = name => root.querySelector(`[data-part=${name}]`);
  const {scene} = data, count = scene.frames.length, labelled = scene.labels.length <= 80;
  const view = moleculeView(part("canvas"), {size: () => scene.size});
  let number = 0, player = null;

  function draw() {
    const {positions, bonds, lines} = scene.frames[number];
    const balls = positions.map((at, atom) => ({at, radius: scene.radii[atom],
      color: scene.colors[atom], label: scene.labels[atom], pale: false, labelled}));
    const sticks = [...scene.bonds, ...bonds].map(([from, to]) => ({from, to}));
    const [background, text] = ["--background", "--text"].map(name => styleColor(root, name));
    view.draw({balls, sticks, lines, arrows: data.arrows, background, text});
    part("frame").value = number;
    part("caption").textContent = `frame ${number + 1} of ${count}`;
    root.dataset.frame = number;
  }

  function play(on) {
    clearInterval(player);
    player = on ? setInterval(() => {
      if (!root.isConnected) return play(false);
      number = (number + 1) % count;
      draw();
    }, data.interval) : null;
    part("play").textContent = on ? "Pause" : "Play";
  }

  part("controls").hidden = count < 2;
  part("canvas").setAttribute("aria-label", data.title);
  part("frame").max = count - 1;
  part("frame").oninput = () => {
    play(false);
    number = Number(part("frame").value);
    draw();
  };
  part("play").onclick = () => play(!player);
  for (const element of root.querySelectorAll("canvas, button, input")) {
    element.dataset.lmSuppressShortcuts = "true"; // else JupyterLab uses the keys
  }
  followPage(root, draw);
}
