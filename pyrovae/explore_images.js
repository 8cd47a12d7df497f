// The test images: one to start from, or two to walk between.
"use strict";

function testImages({ $, data, z, encoding, painter, moved }) {
  const pixels = networks.bytes(data.images.pixels);
  const size = data.likelihood.elements;
  const paint = (canvas, n) => painter(canvas)(pixels, 1, n * size);
  const place = (n) => encoding(data.images.index[n]);
  const buttons = [];

  function nameOf(n) {
    const labels = data.points.labels;
    return `image ${n + 1}${labels ? ` (label ${labels[data.images.index[n]]})` : ""}`;
  }

  function startFrom(n) {
    z.set(place(n));
    moved(`started from test ${nameOf(n)}`);
  }

  let playing = 0;
  const end = (name) => Number($(name).value);

  function walkTo(t) {
    $("walk").value = t;
    const [a, b] = [place(end("from")), place(end("to"))];
    for (let d = 0; d < z.length; d++) z[d] = (1 - t) * a[d] + t * b[d];
    moved(`${Math.round(100 * t)}% of the way from image ${end("from") + 1} to ${end("to") + 1}`);
  }

  function play() {
    cancelAnimationFrame(playing);
    // Whoever asked for less motion is taken to the other end at once.
    if (matchMedia("(prefers-reduced-motion: reduce)").matches)
      return walkTo(Number($("walk").value) < 1 ? 1 : 0);
    const began = performance.now();
    const step = (time) => {
      const t = Math.min(1, Math.max(0, (time - began) / 2500));
      walkTo(t);
      if (t < 1) playing = requestAnimationFrame(step);
    };
    playing = requestAnimationFrame(step);
  }

  function showEnds() {
    for (const name of ["from", "to"]) paint($(`${name}-picture`), end(name));
  }

  function walkBetween(from, to) {
    [$("from").value, $("to").value] = [from, to];
    showEnds();
    play();
  }

  function addImage(n) {
    const button = document.createElement("button");
    const canvas = document.createElement("canvas");
    canvas.className = "pixels";
    paint(canvas, n);
    button.append(canvas);
    button.setAttribute("aria-label", `Start from test ${nameOf(n)}`);
    button.addEventListener("click", () => startFrom(n));

    let target = null;
    const aim = (next) => {
      target?.classList.remove("over");
      target = next;
      target?.classList.add("over");
    };
    button.addEventListener("pointerdown", (event) => button.setPointerCapture(event.pointerId));
    button.addEventListener("pointermove", (event) => {
      if (!button.hasPointerCapture(event.pointerId)) return;
      const under = document.elementFromPoint(event.clientX, event.clientY);
      const other = under?.closest("#images button");
      aim(other && other !== button ? other : null);
    });
    button.addEventListener("pointercancel", () => aim(null));
    button.addEventListener("pointerup", () => {
      const to = buttons.indexOf(target);
      aim(null);
      // After the click that ends a captured drag, which would start from this image again.
      if (to >= 0) setTimeout(() => walkBetween(n, to));
    });

    const item = document.createElement("li");
    item.append(button);
    $("images").append(item);
    buttons.push(button);
    for (const name of ["from", "to"]) $(name).append(new Option(nameOf(n).slice(6), n));
  }

  data.images.index.forEach((_, n) => addImage(n));
  $("to").selectedIndex = 1;
  showEnds();
  for (const name of ["from", "to"])
    $(name).addEventListener("change", () => {
      showEnds();
      walkTo(name === "from" ? 0 : 1);
    });
  $("walk").addEventListener("input", () => walkTo(Number($("walk").value)));
  $("play").addEventListener("click", play);
  // Whatever the reader touches next, the walk ends.
  for (const kind of ["pointerdown", "keydown"])
    document.addEventListener(kind, () => cancelAnimationFrame(playing), true);

  return { startFrom, place };
}
