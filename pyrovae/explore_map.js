// The map: a plane of the latent space with the encodings on it, and a ring where z is.
"use strict";

function latentMap({ $, data, z, points, encoding, moved }) {
  const D = data.latentDim;
  const labels = data.points.labels;
  const canvas = $("map");
  const pen = canvas.getContext("2d");
  const dots = document.createElement("canvas"); // drawn once for a plane, copied every frame
  const axes = [new Float64Array(D), new Float64Array(D)];
  const origin = new Float64Array(D);
  const colours = new Map();
  let names = ["", ""];
  let reach = 1; // half the width of the map, in units of z
  let ratio = 1; // pixels of the screen to one of the page
  let highlighted = null;

  const along = (place, axis) => {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += (place[d] - origin[d]) * axis[d];
    return sum;
  };
  const toPixel = (value, size) => ((value / reach + 1) / 2) * size;

  let inks = {};
  function readInks() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["line", "soft", "blue", "card", "ink"])
      inks[name] = style.getPropertyValue(`--${name}`).trim();
  }

  function drawDots() {
    readInks();
    ratio = window.devicePixelRatio || 1;
    const wide = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const tall = Math.max(1, Math.round(canvas.clientHeight * ratio));
    for (const one of [canvas, dots]) [one.width, one.height] = [wide, tall];
    const draw = dots.getContext("2d");
    draw.strokeStyle = inks.line;
    draw.lineWidth = ratio;
    draw.beginPath();
    draw.moveTo(wide / 2, 0);
    draw.lineTo(wide / 2, tall);
    draw.moveTo(0, tall / 2);
    draw.lineTo(wide, tall / 2);
    draw.stroke();
    for (let p = 0; p < points.length / D; p++) {
      draw.globalAlpha = highlighted !== null && labels[p] !== highlighted ? 0.08 : 0.8;
      draw.fillStyle = labels ? colours.get(labels[p]) : inks.blue;
      const left = toPixel(along(encoding(p), axes[0]), wide);
      const top = tall - toPixel(along(encoding(p), axes[1]), tall);
      draw.beginPath();
      draw.arc(left, top, 3 * ratio, 0, 2 * Math.PI);
      draw.fill();
    }
    draw.globalAlpha = 1;
    draw.fillStyle = inks.soft;
    draw.font = `${12 * ratio}px system-ui, sans-serif`;
    draw.textAlign = "right";
    draw.fillText(`${names[0]} →`, wide - 8 * ratio, tall - 8 * ratio);
    draw.rotate(-Math.PI / 2);
    draw.fillText(`${names[1]} →`, -8 * ratio, 16 * ratio);
  }

  function show() {
    const across = along(z, axes[0]);
    const up = along(z, axes[1]);
    const inside = (value) => Math.min(reach, Math.max(-reach, value));
    const left = toPixel(inside(across), canvas.width);
    const top = canvas.height - toPixel(inside(up), canvas.height);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.drawImage(dots, 0, 0);
    const ring = (colour, line) => {
      pen.strokeStyle = colour;
      pen.lineWidth = line * ratio;
      pen.beginPath();
      pen.arc(left, top, 9 * ratio, 0, 2 * Math.PI);
      pen.stroke();
    };
    ring(inks.card, 7);
    ring(inks.ink, 3);
    const [first, second] = names.map((name) => name.split(",")[0]);
    $("position").textContent =
      `z is at ${first} = ${across.toFixed(2)}, ${second} = ${up.toFixed(2)}`;
  }

  function setPlane() {
    const pair = $("plane").value === "pair";
    $("pair").hidden = !pair;
    const chosen = [Number($("across").value), Number($("up").value)];
    origin.set(pair ? origin.fill(0) : data.plane.mean);
    axes.forEach((axis, i) => {
      axis.set(data.plane.axes[i]);
      if (pair) axis.fill(0)[chosen[i]] = 1;
    });
    const share = (i) => `${Math.round(100 * data.plane.explained[i])}% of the variance`;
    names = chosen.map((d, i) => (pair ? `z${d}` : `axis ${i + 1}, ${share(i)}`));
    let furthest = 0;
    for (let p = 0; p < points.length / D; p++)
      for (const axis of axes)
        furthest = Math.max(furthest, Math.abs(along(encoding(p), axis)));
    reach = 1.08 * furthest || 3;
    redraw();
  }

  function redraw() {
    drawDots();
    moved();
  }

  // Within the plane alone: what z has in other directions stays.
  function moveTo(across, up) {
    for (const [axis, value] of [[axes[0], across], [axes[1], up]]) {
      const step = Math.min(reach, Math.max(-reach, value)) - along(z, axis);
      for (let d = 0; d < D; d++) z[d] += step * axis[d];
    }
    moved("moved on the map");
  }

  function point(event) {
    const box = canvas.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * 2 - 1;
    const up = 1 - ((event.clientY - box.top) / box.height) * 2;
    moveTo(across * reach, up * reach);
  }
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    point(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (canvas.hasPointerCapture(event.pointerId)) point(event);
  });
  const arrows = {
    ArrowLeft: [-1, 0],
    ArrowRight: [1, 0],
    ArrowUp: [0, 1],
    ArrowDown: [0, -1],
  };
  canvas.addEventListener("keydown", (event) => {
    const arrow = arrows[event.key];
    if (!arrow && event.key !== "Home") return;
    event.preventDefault();
    if (!arrow) return moveTo(0, 0);
    const step = (event.shiftKey ? 0.2 : 0.02) * reach;
    moveTo(along(z, axes[0]) + step * arrow[0], along(z, axes[1]) + step * arrow[1]);
  });

  const known = labels ? [...new Set(labels)].sort((a, b) => a - b) : [];
  const palette =
    "#4e79a7 #e07b14 #4c9146 #e15759 #a868a0 #b58a10 #2f968c #e8559a #8f6a51 #7d828a".split(" ");
  known.forEach((label, i) => {
    const hue = `hsl(${(360 * i) / known.length} 60% ${45 + 15 * (i % 2)}%)`;
    colours.set(label, known.length <= palette.length ? palette[i] : hue);
  });
  for (const label of known.length <= 20 ? known : []) {
    const button = document.createElement("button");
    const dot = document.createElement("i");
    dot.style.background = colours.get(label);
    button.append(dot, String(label));
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      highlighted = highlighted === label ? null : label;
      for (const other of $("legend").querySelectorAll("button"))
        other.setAttribute("aria-pressed", String(other === button && highlighted !== null));
      redraw();
    });
    $("legend").append(button);
  }
  $("legend").hidden = known.length === 0 || known.length > 20;
  $("coloured").hidden = !labels;

  const selects = [$("across"), $("up")];
  selects.forEach((select, i) => {
    for (const d of data.latents.order) select.append(new Option(`z${d}`, d));
    select.selectedIndex = Math.min(i, D - 1);
    select.addEventListener("change", () => {
      const other = selects[1 - i];
      // A plane needs two directions.
      if (other.value === select.value) other.selectedIndex = select.selectedIndex === 0 ? 1 : 0;
      setPlane();
    });
  });
  $("plane").disabled = D < 2;
  $("plane").addEventListener("change", setPlane);
  new ResizeObserver(redraw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  return { show, setPlane };
}
