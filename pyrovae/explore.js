// The page: z, the picture it gives, and the controls. Every control sets z and calls `moved`; one
// frame later the picture, the map and the sliders show it.
"use strict";

const explorer = (() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const D = data.latentDim;
  const [channels, height, width] = data.shape;

  const decode = networks.build(data.layers, networks.floats(data.weights));
  const likelihood = likelihoods.build(data.likelihood);
  const points = networks.floats(data.points.z);
  const encoding = (point) => points.subarray(point * D, (point + 1) * D);

  const z = new Float64Array(D);
  const x = new Float64Array(data.likelihood.elements);
  let drawing = false;
  let seed = 0;
  let now = "";

  // A function that paints x, times `scale`, on a canvas of as many pixels.
  function painter(canvas) {
    [canvas.width, canvas.height] = [width, height];
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const area = width * height;
    return (value, scale, offset = 0) => {
      for (let i = 0; i < area; i++) {
        for (let c = 0; c < 3; c++)
          image.data[4 * i + c] = value[offset + (channels === 3 ? c * area : 0) + i] * scale;
        image.data[4 * i + 3] = 255;
      }
      context.putImageData(image, 0, 0);
    };
  }

  const paint = painter($("picture"));
  function decodePicture() {
    const params = decode(z);
    if (drawing) likelihood.sample(params, x, seed);
    else likelihood.mean(params, x);
    paint(x, 255);
  }

  let waiting = false;
  let announcing = 0;
  function moved(what = now) {
    now = what;
    if (!waiting) requestAnimationFrame(frame);
    waiting = true;
  }
  const sentence = () => `${now[0].toUpperCase()}${now.slice(1)}.`;
  function frame() {
    waiting = false;
    decodePicture();
    map.show();
    showLatents();
    $("now").textContent = sentence();
    clearTimeout(announcing);
    announcing = setTimeout(announce, 700);
  }

  // Said once z has come to rest, for whoever does not see the picture.
  function announce() {
    let nearest = 0;
    let least = Infinity;
    for (let p = 0; p < points.length / D; p++) {
      let distance = 0;
      for (let d = 0; d < D; d++) distance += (points[p * D + d] - z[d]) ** 2;
      if (distance < least) [nearest, least] = [p, distance];
    }
    const labels = data.points.labels;
    const what = drawing ? "A draw x from p(x | z)" : "The mean E[x | z]";
    const far = Math.sqrt(least).toFixed(1);
    const text =
      `${what}. ${sentence()} The nearest encoding of a test image is ${far} away` +
      `${labels ? ` and has label ${labels[nearest]}` : ""}.`;
    $("picture").setAttribute("aria-label", text);
    $("live").textContent = text;
  }

  const sliders = [];
  function addSlider(d) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    const output = document.createElement("output");
    const [min, max] = [data.latents.low[d], data.latents.high[d]];
    Object.assign(input, { type: "range", step: "any", min, max });
    label.title = `variance of its encodings: ${data.latents.variance[d].toFixed(3)}`;
    label.append(`z${d}`, input, output);
    input.addEventListener("input", () => {
      z[d] = Number(input.value);
      moved(`z${d} turned to ${z[d].toFixed(2)}`);
    });
    $("latents").append(label);
    sliders.push({ d, input, output, shown: NaN });
  }
  function showLatents() {
    for (const slider of sliders) {
      const value = z[slider.d];
      if (slider.shown === value) continue;
      slider.shown = value;
      slider.input.value = value;
      slider.output.textContent = value.toFixed(2);
    }
  }
  function addLatents() {
    const { order, active } = data.latents;
    $("latents-help").textContent = active
      ? `${active} of ${D} are active: their encodings vary, by 0.01 or more. ` +
        "The most active come first."
      : `None of ${D} is active: the encodings hardly vary, so z tells nothing of x.`;
    for (const d of order.slice(0, Math.max(active, 4))) addSlider(d);
  }

  let draws = 0;
  function samplePrior() {
    if (data.prior === null) {
      likelihoods.start(Math.floor(Math.random() * 2 ** 31), draws);
      for (let d = 0; d < D; d++) z[d] = likelihoods.normal();
    } else {
      const kept = networks.floats(data.prior);
      const first = (draws * D) % kept.length;
      z.set(kept.subarray(first, first + D));
    }
    draws += 1;
    moved(`draw ${draws} from the prior p(z)`);
  }

  // torch decoded this z when the page was made.
  function check() {
    const expected = networks.floats(data.check);
    z.set(images.place(0));
    decodePicture();
    let worst = 0;
    for (let i = 0; i < x.length; i++)
      worst = Math.max(worst, Math.abs(x[i] - expected[i]) / Math.max(1, Math.abs(expected[i])));
    const began = performance.now();
    for (let n = 0; n < 5; n++) decodePicture();
    const took = (performance.now() - began) / 5;
    const error = worst.toExponential(0);
    $("check").textContent =
      worst <= 1e-5
        ? `Checked on opening: the decoder in this browser agrees with PyTorch's to ${error}, ` +
          `and makes a picture in ${took.toFixed(1)} ms.`
        : `Warning: the decoder in this browser differs from PyTorch's by ${error}.`;
    return { worst, took };
  }

  const shared = { $, data, z, points, encoding, painter, moved };
  const map = latentMap(shared);
  const images = testImages(shared);
  addLatents();
  for (const radio of document.querySelectorAll("input[name=show]"))
    radio.addEventListener("change", () => {
      drawing = $("draw").checked;
      $("again").disabled = !drawing;
      moved();
    });
  $("again").addEventListener("click", () => {
    seed += 1;
    moved();
  });
  $("prior").addEventListener("click", samplePrior);
  $("dim").textContent = `${D}-dimensional latent`;
  const facts = [data.description, data.protocol, `Made by pyrovae ${data.version}`];
  $("model").textContent = `${facts.filter(Boolean).join(". ")}.`;

  const checked = check();
  images.startFrom(0);
  map.setPlane();
  return { z, x, moved, checked };
})();
