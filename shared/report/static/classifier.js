"use strict";
(() => {
  const { bins, matrix } = page.data;
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const filled = bins.filter((bin) => bin.images);
  page.chart("reliability", "Accuracy by confidence", (width, height) =>
    Plot.plot({
      width, height, grid: true, marginLeft: 52, marginBottom: 40,
      x: { domain: [0, 1], label: "confidence", tickFormat: "~%", ticks: width / 90 },
      y: { domain: [0, 1], label: "accuracy", tickFormat: "~%", ticks: height / 60 },
      r: { range: [0, 16], domain: [0, d3.max(filled, (bin) => bin.images)] },
      marks: [
        Plot.line([[0, 0], [1, 1]], { stroke: "var(--soft)", strokeDasharray: "4,4" }),
        Plot.ruleX(filled, { x: "confidence", y1: "confidence", y2: "accuracy", stroke: "var(--line-1)", strokeWidth: 2 }),
        Plot.dot(filled, { x: "confidence", y: "accuracy", r: (bin) => Math.max(bin.images, 1), fill: "var(--line-0)", fillOpacity: 0.75, stroke: "var(--surface)" }),
        Plot.tip(filled, Plot.pointer({ x: "confidence", y: "accuracy", title: (bin) => `confidence ${percent(bin.confidence)}\naccuracy ${percent(bin.accuracy)}\n${page.count(bin.images)} images` })),
      ],
    }),
  );

  if (matrix) {
    const { names, counts } = matrix;
    const cells = counts.flatMap((row, from) => {
      const images = Math.max(d3.sum(row), 1);
      return row.map((count, to) => ({ from, to, count, share: count / images }));
    });
    const short = (at) => (names[at].length > 14 ? `${names[at].slice(0, 13)}…` : names[at]);
    const title = (cell) => `${names[cell.from]}\npredicted as ${names[cell.to]}\n${page.count(cell.count)} images, ${percent(cell.share)}`;
    page.chart("confusion", "Confusion matrix", (width) => {
      const named = names.length <= width / 14;
      const axis = { domain: d3.range(names.length), tickFormat: short };
      return Plot.plot({
        width, aspectRatio: 1, marginLeft: named ? 100 : 24, marginBottom: named ? 100 : 24, marginTop: 8, padding: names.length > 40 ? 0 : 0.04,
        x: { ...axis, label: named ? null : "predicted", tickRotate: -90, ...(named ? {} : { ticks: [] }) },
        y: { ...axis, label: named ? null : "class", ...(named ? {} : { ticks: [] }) },
        color: { scheme: "viridis", domain: [0, 1], legend: true, label: "share", tickFormat: "~%", marginLeft: 16, width: Math.min(width, 280) },
        marks: [
          Plot.cell(cells, { x: "to", y: "from", fill: "share" }),
          Plot.tip(cells, Plot.pointer({ x: "to", y: "from", title })),
        ],
      });
    });
  }

  // A click sorts by a column, numbers from the largest and text from A; another click reverses the order.
  const table = document.getElementById("by-class");
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) =>
    heading.firstElementChild.addEventListener("click", () => {
      const numeric = heading.classList.contains("number");
      const before = heading.getAttribute("aria-sort");
      const ascending = before ? before === "descending" : !numeric;
      const value = (row) => (numeric ? Number(row.cells[column].dataset.value) : row.cells[column].textContent);
      const compare = numeric ? d3.ascending : new Intl.Collator("en", { numeric: true }).compare;
      const rows = [...table.tBodies[0].rows].sort((a, b) => (ascending ? 1 : -1) * compare(value(a), value(b)));
      table.tBodies[0].append(...rows);
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      page.say(`Sorted by ${heading.textContent}, ${ascending ? "ascending" : "descending"}`);
    }),
  );
})();
