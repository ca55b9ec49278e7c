"use strict";
(() => {
  const { runs, curves, predicted } = page.data;
  const DASHES = [null, "6,3", "2,3", "9,3,2,3", "12,4", "4,2,1,2"];
  const colour = (run) => `var(--line-${run % 6})`;
  const shown = new Set(runs.keys());
  const redraws = [];
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const SHARES = new Set(["accuracy", "data_wait", "mfu"]);

  // One line a run, straight over what is missing.
  function lines(id, label, { x, points, y, log = false, parts = (_) => "" }) {
    redraws.push(
      page.chart(id, label, (width, height) => {
        const drawn = points.filter((point) => shown.has(point.run) && point.y !== null && point.y !== undefined);
        const rare = d3.group(drawn, (d) => `${d.run} ${parts(d)}`);
        return Plot.plot({
          width, height, marginLeft: 56, marginBottom: 38,
          x: { label: x, ticks: width / 90, tickFormat: (step) => (step < 10_000 ? page.count(step) : d3.format("~s")(step)) },
          y: { ...y, grid: true, nice: true, ticks: height / 45, type: log ? "log" : "linear" },
          marks: [
            ...[...rare.values()].map((line) =>
              Plot.lineY(line, {
                x: "x", y: "y", stroke: colour(line[0].run), strokeWidth: parts(line[0]) ? 1 : 2.25,
                strokeDasharray: DASHES[line[0].run % DASHES.length], // so that runs are told apart without colours
                marker: line.length < 12 ? "dot" : undefined,
              }),
            ),
            Plot.tip(drawn, Plot.pointer({ x: "x", y: "y", title: (d) => [runs.length > 1 ? runs[d.run].name : null, `${x} ${page.count(d.x)}`, `${parts(d)} ${d.said}`.trim()].filter(Boolean).join("\n") })),
          ],
        });
      }),
    );
  }
  const said = (key, value) => (SHARES.has(key) ? percent(value) : key === "lr" ? value.toExponential(2) : value.toLocaleString("en", { maximumSignificantDigits: 5 }));
  for (const [key, title] of Object.entries(curves)) {
    const points = runs.flatMap((run, number) =>
      run.lines.filter((line) => typeof line[key] === "number").map((line) => ({ run: number, x: line.step, y: line[key], said: said(key, line[key]) })),
    );
    lines(`curve-${key}`, `${title}, by step`, {
      x: "step", points,
      y: { label: null, zero: key !== "loss" && key !== "lr", tickFormat: SHARES.has(key) ? "~%" : key === "lr" ? "~e" : "~s" },
    });
  }
  const probes = (parts) =>
    runs.flatMap((run, number) =>
      parts.flatMap((part) =>
        run.probes.filter((line) => typeof line[part] === "number").map((line) => ({ run: number, part: part === "linear" ? "linear" : "", x: line.step, y: line[part], said: percent(line[part]) })),
      ),
    );
  for (const [id, label, parts] of [["probes", "Probe accuracy, by step", ["knn", "linear"]], ["validation", "Validation accuracy, by step", ["top1"]]])
    lines(id, label, { x: "step", y: { label: null, tickFormat: "~%" }, parts: (point) => point.part, points: probes(parts) });
  lines("ranks", "Accuracy by permutation rank", {
    x: "eighth of the ranks", y: { label: null, tickFormat: "~%", zero: true },
    points: runs.flatMap((run, number) => {
      const known = run.lines.filter((line) => line.accuracy_by_rank);
      const last = known.slice(-Math.ceil(known.length / 10)).map((line) => line.accuracy_by_rank);
      return (last[0] ?? []).map((_, at) => {
        const value = d3.mean(last, (bands) => bands[at]) ?? null;
        return { run: number, x: at + 1, y: value, said: value === null ? "" : percent(value) };
      });
    }),
  });
  for (const box of document.querySelectorAll("#runs input"))
    box.addEventListener("change", () => {
      if (box.checked) shown.add(Number(box.value));
      else shown.delete(Number(box.value));
      for (const redraw of redraws) redraw();
    });

  if (!predicted) return;
  const [rows, columns] = predicted.grid;
  const CELL = 16;
  const colourOf = (code) => `#${predicted.colours.slice(6 * code, 6 * code + 6)}`;
  function draw(canvas, codes, truth) {
    [canvas.width, canvas.height] = [columns * CELL, rows * CELL];
    const pen = canvas.getContext("2d");
    codes.forEach((code, at) => {
      if (code < 0) return; // given
      const x = (at % columns) * CELL, y = Math.floor(at / columns) * CELL;
      pen.fillStyle = colourOf(code);
      pen.fillRect(x, y, CELL, CELL);
      if (!truth || truth[at] !== code) return;
      for (const [style, width] of [["#000", 5], ["#fff", 3]]) {
        [pen.strokeStyle, pen.lineWidth] = [style, width];
        pen.strokeRect(x + 2.5, y + 2.5, CELL - 5, CELL - 5);
      }
    });
  }
  document.querySelectorAll(".prediction").forEach((card, image) => {
    const [truth, ...guesses] = card.querySelectorAll("canvas");
    const { tokens } = predicted.images[image];
    draw(truth, tokens);
    guesses.forEach((canvas, run) => {
      const codes = predicted.runs[run].images[image];
      draw(canvas, codes, tokens);
      const asked = codes.filter((code) => code >= 0).length;
      const right = codes.filter((code, at) => code === tokens[at]).length;
      card.querySelectorAll(".score")[run].textContent = `${right} of ${asked}`;
      canvas.setAttribute("aria-label", `${canvas.getAttribute("aria-label")}: ${right} of ${asked} right`);
    });
  });
  const highest = d3.max(predicted.runs.flatMap((run) => run.by_position.flat()), (value) => value ?? 0);
  predicted.runs.forEach((run, number) => {
    const label = `Accuracy of ${runs[number].name} by position in the grid`;
    const words = (value) => `${+(100 * value).toFixed(1)} %`;
    page.gridMap(`position-${number}`, label, run.by_position, { name: "accuracy", domain: [0, highest || 1], words });
  });
})();
