"use strict";
// A chart is one picture with one name; Plot names each of its marks, which no reader asked for.
function name(plot, label) {
  const drawings = plot.matches("svg") ? [plot] : [...plot.querySelectorAll("svg")];
  for (const part of plot.querySelectorAll("[aria-label]")) part.removeAttribute("aria-label");
  for (const drawing of drawings) {
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-label", drawing === drawings.at(-1) ? label : `${label}: colour scale`);
  }
}

// What every page needs: its data, numbers as words, charts that follow the width of the page.
const page = {
  data: JSON.parse(document.getElementById("data").textContent),
  count: new Intl.NumberFormat("en").format,
  share(part, whole) {
    const percent = (100 * part) / Math.max(whole, 1);
    return `${percent >= 1 || percent === 0 ? percent.toFixed(1) : percent.toPrecision(2)} %`;
  },
  say(text) {
    clearTimeout(page.saying);
    page.saying = setTimeout(() => (document.getElementById("live").textContent = text), 120);
  },
  calm: matchMedia("(prefers-reduced-motion: reduce)"),
  show(element, block = "center") {
    element.scrollIntoView({ block, behavior: page.calm.matches ? "auto" : "smooth" });
  },
  // Draws `build(width, height)` into #id, and again whenever it has another width.
  chart(id, label, build) {
    const place = document.getElementById(id);
    if (!place) return;
    let drawn = 0;
    new ResizeObserver(() => {
      const width = Math.floor(place.clientWidth);
      if (!width || width === drawn) return;
      drawn = width;
      const plot = build(width, Math.round(width * Number(place.dataset.ratio)));
      name(plot, label);
      place.replaceChildren(plot);
    }).observe(place);
  },
};
