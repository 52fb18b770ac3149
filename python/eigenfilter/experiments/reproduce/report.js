// Zooms and pans a figure by changing the view box of its <svg> element.
for (const figure of document.querySelectorAll("figure.zoom")) {
  const svg = figure.querySelector("svg");
  const whole = svg.getAttribute("viewBox").trim().split(/\s+/).map(Number);
  let [x, y, width, height] = whole;

  function show() {
    svg.setAttribute("viewBox", [x, y, width, height].join(" "));
    // While the whole figure is visible, touch gestures scroll the page.
    svg.style.touchAction = width < whole[2] ? "none" : "auto";
  }

  // Zooms about the point at the fractions (u, v) of the visible part.
  function zoom(factor, u = 0.5, v = 0.5) {
    const next = Math.min(whole[2], Math.max(whole[2] / 100, width * factor));
    const ratio = next / width;
    x += width * (1 - ratio) * u;
    y += height * (1 - ratio) * v;
    width *= ratio;
    height *= ratio;
    move(0, 0);
  }

  // Pans within the borders of the figure.
  function move(dx, dy) {
    x = Math.min(Math.max(x + dx, whole[0]), whole[0] + whole[2] - width);
    y = Math.min(Math.max(y + dy, whole[1]), whole[1] + whole[3] - height);
    show();
  }

  function reset() {
    [x, y, width, height] = whole;
    show();
  }

  // The wheel zooms with Ctrl only; alone it scrolls the page.
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const box = svg.getBoundingClientRect();
    const u = (event.clientX - box.left) / box.width;
    const v = (event.clientY - box.top) / box.height;
    zoom(Math.exp(0.0015 * event.deltaY), u, v);
  }, { passive: false });

  let held = null;
  svg.addEventListener("pointerdown", (event) => {
    held = [event.clientX, event.clientY];
  });
  window.addEventListener("pointermove", (event) => {
    if (held === null) return;
    const box = svg.getBoundingClientRect();
    const [left, top] = held;
    held = [event.clientX, event.clientY];
    move((left - held[0]) * width / box.width, (top - held[1]) * height / box.height);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    window.addEventListener(end, () => { held = null; });
  }
  svg.addEventListener("dblclick", reset);

  for (const button of figure.querySelectorAll("button")) {
    const factor = Number(button.dataset.zoom);
    button.addEventListener("click", () => { factor ? zoom(factor) : reset(); });
  }
  figure.addEventListener("keydown", (event) => {
    if (event.key === "+") zoom(0.8);
    else if (event.key === "-") zoom(1.25);
    else if (event.key === "0") reset();
  });
}
