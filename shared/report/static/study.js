"use strict";
(() => {
  const { rows, groups, evaluations, baseline } = page.data;
  const DASHES = [null, "6,3", "2,3", "9,3,2,3", "12,4", "4,2,1,2"];
  const at = new Map(rows.map((row, number) => [row, number]));
  const colour = (row) => `var(--line-${at.get(row) % 6})`;
  const dashes = (row) => DASHES[(at.get(row) + Math.floor(at.get(row) / 6)) % 6]; // other pairs with colours for more than six rows
  const percent = (value) => `${(100 * value).toFixed(1)} %`;
  const short = d3.format("~s");
  const images = (number) => short(number).replace("G", "B");

  for (const line of document.querySelectorAll(".key line")) {
    const drawn = dashes(rows[line.dataset.row]);
    if (drawn) line.setAttribute("stroke-dasharray", drawn);
  }

  // A name in lines of at most `most` characters, broken at spaces where there are any; at most two.
  function folded(name, most) {
    const lines = [""];
    for (const word of name.split(/(?<= )/)) {
      let left = [...word];
      if ([...lines.at(-1)].length + left.length > most && lines.at(-1)) lines.push("");
      while (left.length > most) {
        lines[lines.length - 1] = left.splice(0, most).join("");
        lines.push("");
      }
      lines[lines.length - 1] += left.join("");
    }
    return lines.length > 2 ? `${lines[0]}\n${[...lines[1]].slice(0, most - 1).join("")}…` : lines.join("\n");
  }

  function dots(group, number, evaluation) {
    const measured = group.rows.filter((row) => row.means[evaluation] !== null);
    const seeds = measured.flatMap((row) => row.values[evaluation].map(([seed, value]) => ({ row: row.row, seed, value })));
    const means = measured.map((row) => ({ row: row.row, value: row.means[evaluation] }));
    const reference = means.filter((mean) => mean.row === baseline);
    page.chart(`dots-${number}-${evaluation}`, `${evaluations[evaluation]} of each seed, by row`, (width) => {
      const most = Math.max(8, Math.floor((width - 16) / 7.5));
      const lines = Math.max(...measured.map((row) => folded(row.row, most).split("\n").length));
      const band = 30 + 16 * lines, below = 8 * lines; // a row's name stands above its dots
      const [low, high] = d3.extent(seeds, (seed) => seed.value);
      const room = Math.max(0.06 * (high - low), 0.005);
      return Plot.plot({
        width, height: measured.length * band + 42, marginLeft: 22, marginRight: 16, marginBottom: 38, marginTop: 4,
        x: { label: "top-1", domain: [low - room, high + room], tickFormat: "~%", ticks: width / 90, grid: true },
        y: { domain: measured.map((row) => row.row), axis: null, padding: 0 },
        marks: [
          Plot.ruleX(reference, { x: "value", stroke: "var(--soft)", strokeDasharray: "4,4" }),
          Plot.text(means, { y: "row", text: (mean) => folded(mean.row, most), frameAnchor: "left", lineAnchor: "bottom", dy: below - 13, fontSize: 13, fill: "currentColor", stroke: "var(--surface)", strokeWidth: 4 }),
          Plot.dot(seeds, { x: "value", y: "row", dy: below, r: 4.5, fill: (seed) => colour(seed.row), fillOpacity: 0.6, stroke: "var(--surface)" }),
          Plot.tickX(means, { x: "value", y: "row", stroke: (mean) => colour(mean.row), strokeWidth: 2.5, insetTop: band / 2 + below - 10, insetBottom: band / 2 - below - 10 }),
          Plot.tip(seeds, Plot.pointer({ x: "value", y: "row", title: (seed) => `${seed.row}\nseed ${seed.seed}: ${percent(seed.value)}` })),
        ],
      });
    });
  }

  // Means where every seed of a row was measured.
  function meansOf(points) {
    const found = [];
    for (const [row, own] of d3.group(points, (point) => point.row)) {
      const seeds = new Set(own.map((point) => point.seed)).size;
      for (const [x, there] of d3.group(own, (point) => point.x))
        if (there.length === seeds) found.push({ row, x, value: d3.mean(there, (point) => point.value) });
    }
    return found;
  }
  function curves(group, number, id, label, column, words) {
    const points = group.curves.flatMap((curve) => curve.points.map((point) => ({ row: curve.row, seed: curve.seed, x: point[column], value: point[2] })));
    const means = meansOf(points);
    page.chart(`${id}-${number}`, `k-NN accuracy by ${label}`, (width, height) =>
      Plot.plot({
        width, height: Math.max(height, 220), marginLeft: 52, marginBottom: 40,
        x: { label, tickFormat: words, ticks: width / 90, zero: true },
        y: { label: null, tickFormat: "~%", grid: true, nice: true, ticks: height / 45 },
        marks: [
          Plot.lineY(points, { x: "x", y: "value", z: (point) => `${point.seed} ${point.row}`, stroke: (point) => colour(point.row), strokeWidth: 1, strokeOpacity: 0.45 }),
          ...[...d3.group(means, (mean) => mean.row)].map(([row, line]) =>
            Plot.lineY(line, { x: "x", y: "value", stroke: colour(row), strokeWidth: 2.5, strokeDasharray: dashes(row), marker: "dot" }),
          ),
          Plot.tip(means, Plot.pointer({ x: "x", y: "value", title: (mean) => `${mean.row}\n${label} ${words(mean.x)}\nmean ${percent(mean.value)}` })),
        ],
      }),
    );
  }

  // A large study has hundreds of charts: those of a group are drawn when it comes near, and all before printing.
  const waiting = new Map([...document.querySelectorAll(".group")].map((section, number) => [section, number]));
  function draw(section) {
    const number = waiting.get(section);
    if (!waiting.delete(section)) return;
    evaluations.forEach((_, evaluation) => dots(groups[number], number, evaluation));
    curves(groups[number], number, "by-images", "images seen", 0, images);
    curves(groups[number], number, "by-flops", "FLOPs", 1, short);
  }
  const near = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "1000px 0px" },
  );
  for (const section of waiting.keys()) near.observe(section);
  addEventListener("beforeprint", () => [...waiting.keys()].forEach(draw));

  // #cell=TOKENIZER/MODEL/BUDGET/ROW/SEED shows a cell in every group that it belongs to.
  const parts = (key) => key.split("/").map(decodeURIComponent).join("\0");
  const cells = [...document.querySelectorAll("[data-cell]")].map((line) => ({
    line, about: line.nextElementSibling, parts: parts(line.dataset.cell), link: line.querySelector("a"),
  }));
  function wanted() {
    const key = location.hash.match(/^#cell=(.*)$/)?.[1];
    if (key === undefined) return null;
    try {
      return parts(key);
    } catch {
      return ""; // not URL-encoded text
    }
  }
  function show() {
    const key = wanted();
    const found = cells.filter((cell) => cell.parts === key);
    for (const cell of cells) {
      const shown = cell.parts === key;
      cell.about.hidden = !shown;
      cell.line.classList.toggle("current", shown);
      cell.about.classList.toggle("current", shown);
      if (shown) cell.link.setAttribute("aria-current", "true");
      else cell.link.removeAttribute("aria-current");
    }
    document.getElementById("lost").textContent = key !== null && !found.length ? "This study has no cell of the name in the address." : "";
    const inView = ({ line }) => line.getBoundingClientRect().top >= 0 && line.getBoundingClientRect().bottom <= innerHeight;
    if (found.length && !found.some(inView)) page.show(found[0].line, "start");
    if (found.length) page.say(`Folders and settings are shown below the ${found.length > 1 ? "lines" : "line"} of this seed.`);
  }
  function close(cell) {
    history.replaceState(null, "", location.pathname + location.search);
    show();
    cell.link.focus();
  }
  for (const cell of cells) cell.about.querySelector(".close").addEventListener("click", () => close(cell));
  addEventListener("keydown", (event) => {
    const open = cells.find((cell) => !cell.about.hidden && (cell.line.contains(event.target) || cell.about.contains(event.target)));
    if (event.key === "Escape" && open) close(open);
  });
  addEventListener("hashchange", show);
  show();
})();
