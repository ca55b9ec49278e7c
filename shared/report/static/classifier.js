"use strict";
(() => {
  const { result, matrix } = page.data;
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  if (matrix) {
    const cells = matrix.counts.flatMap((row, from) => {
      const images = Math.max(d3.sum(row), 1);
      return row.map((count, to) => ({ from: matrix.names[from], to: matrix.names[to], count, share: count / images }));
    });
    const few = matrix.names.length <= 30;
    page.chart("confusion", "Confusion matrix", (width) =>
      Plot.plot({
        width, aspectRatio: 1, marginLeft: few ? 90 : 20, marginBottom: few ? 90 : 20, padding: 0.03,
        x: { domain: matrix.names, label: "predicted", tickRotate: -90, axis: few ? "bottom" : null },
        y: { domain: matrix.names, label: "class", axis: few ? "left" : null },
        color: { scheme: "viridis", domain: [0, 1], legend: true, label: "share", tickFormat: "~%" },
        marks: [
          Plot.cell(cells, { x: "to", y: "from", fill: "share" }),
          Plot.tip(cells, Plot.pointer({ x: "to", y: "from", title: (d) => `${d.from}\ntaken for ${d.to}\n${page.count(d.count)} images, ${percent(d.share)}` })),
        ],
      }),
    );
  }
  const bins = result.bins.filter((bin) => bin.images);
  page.chart("calibration", "Accuracy by confidence", (width, height) =>
    Plot.plot({
      width, height, grid: true,
      x: { domain: [0, 1], label: "confidence", tickFormat: "~%" },
      y: { domain: [0, 1], label: "accuracy", tickFormat: "~%" },
      r: { range: [2, 14] },
      marks: [
        Plot.line([[0, 0], [1, 1]], { stroke: "currentColor", strokeOpacity: 0.4 }),
        Plot.dot(bins, { x: "confidence", y: "accuracy", r: "images", fill: "var(--line-0)" }),
        Plot.tip(bins, Plot.pointer({ x: "confidence", y: "accuracy", title: (d) => `confidence ${percent(d.confidence)}\naccuracy ${percent(d.accuracy)}\n${page.count(d.images)} images` })),
      ],
    }),
  );
})();
