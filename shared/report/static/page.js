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
  // Draws `build(width, height)` into #id, again whenever it has another width, and when what it returns is called.
  chart(id, label, build) {
    const place = document.getElementById(id);
    if (!place) return () => {};
    let drawn = 0;
    const draw = (again) => {
      const width = Math.floor(place.clientWidth);
      if (!width || (width === drawn && !again)) return;
      drawn = width;
      const plot = build(width, Math.round(width * Number(place.dataset.ratio)));
      name(plot, label);
      place.replaceChildren(plot);
    };
    new ResizeObserver(() => draw(false)).observe(place);
    return () => draw(true);
  },
  // One coloured square for each place of the grid of patches; `words` of its value stand in its tip and in the scale.
  gridMap(id, label, grid, { name, domain, words }) {
    const cells = grid.flatMap((line, row) => line.map((value, column) => ({ row: row + 1, column: column + 1, value })));
    const title = (cell) => `Row ${cell.row}, column ${cell.column}\n${cell.value === null ? "unknown" : words(cell.value)}`;
    page.chart(id, label, (width) =>
      Plot.plot({
        width, aspectRatio: 1, margin: 0, marginTop: 4, padding: 0.04, x: { axis: null }, y: { axis: null },
        color: { scheme: "viridis", domain, legend: true, label: name, tickFormat: words, width: Math.min(width, 280) },
        marks: [
          Plot.cell(cells, { x: "column", y: "row", fill: "value", rx: 2 }),
          Plot.tip(cells, Plot.pointer({ x: "column", y: "row", title })),
        ],
      }),
    );
  },
};
