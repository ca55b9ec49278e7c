"use strict";
(() => {
  const { k, grid, counts, colours, images } = page.data;
  const [rows, columns] = grid;
  const CELL = 16;
  const total = counts.reduce((sum, count) => sum + count, 0);
  const byUse = d3.range(k).sort((a, b) => counts[b] - counts[a] || a - b);
  const rank = new Uint32Array(k);
  byUse.forEach((code, at) => (rank[code] = at + 1));
  const colourOf = (code) => `#${colours.slice(6 * code, 6 * code + 6)}`;
  const element = (id) => document.getElementById(id);

  // Where each code is on this page: code -> image -> its patches.
  const places = new Map();
  images.forEach(({ tokens }, image) =>
    tokens.forEach((code, at) => {
      if (!places.has(code)) places.set(code, new Map());
      const here = places.get(code);
      if (!here.has(image)) here.set(image, []);
      here.get(image).push(at);
    }),
  );

  const cards = [...document.querySelectorAll(".image")].map((card, number) => {
    const [veil, map] = card.querySelectorAll("canvas");
    for (const canvas of [veil, map]) [canvas.width, canvas.height] = [columns * CELL, rows * CELL];
    return { card, number, veil, map, cursor: card.querySelector(".cursor"), at: 0, ...images[number] };
  });

  const base = (tokens) => {
    const small = new OffscreenCanvas(columns, rows);
    const pen = small.getContext("2d");
    tokens.forEach((code, at) => {
      pen.fillStyle = colourOf(code);
      pen.fillRect(at % columns, Math.floor(at / columns), 1, 1);
    });
    return small;
  };
  for (const card of cards) card.base = base(card.tokens);

  // What is lit: `state.code` was chosen and is in the address; `pointed` is only pointed at or focused.
  const state = { code: null, key: null, find: "", tokens: false };
  let pointed = null;
  const lit = () => pointed ?? state.code;

  function draw({ veil, map, base, tokens, number, card }, code) {
    const fellows = places.get(code)?.get(number) ?? [];
    card.dataset.lit = fellows.length;
    for (const [canvas, coloured] of [[veil, state.tokens ? 0.6 : 0], [map, 1]]) {
      const pen = canvas.getContext("2d");
      pen.clearRect(0, 0, canvas.width, canvas.height);
      pen.imageSmoothingEnabled = false;
      const paint = () => {
        pen.globalAlpha = coloured;
        pen.drawImage(base, 0, 0, canvas.width, canvas.height);
        pen.globalAlpha = 1;
      };
      if (coloured) paint();
      if (code === null) continue;
      pen.fillStyle = "rgb(0 0 0 / 0.68)";
      pen.fillRect(0, 0, canvas.width, canvas.height);
      for (const at of fellows) {
        const x = (at % columns) * CELL, y = Math.floor(at / columns) * CELL;
        pen.clearRect(x, y, CELL, CELL);
        if (coloured) {
          pen.globalAlpha = coloured;
          pen.fillStyle = colourOf(tokens[at]);
          pen.fillRect(x, y, CELL, CELL);
          pen.globalAlpha = 1;
        }
        pen.strokeStyle = "#fff";
        pen.lineWidth = 2;
        pen.strokeRect(x + 1, y + 1, CELL - 2, CELL - 2);
      }
    }
  }

  const onThisPage = (code) => {
    const here = places.get(code);
    if (!here) return "none on this page";
    const patches = d3.sum(here.values(), (found) => found.length);
    return `${page.count(patches)} in ${page.count(here.size)} image${here.size > 1 ? "s" : ""} on this page`;
  };
  const words = (code) =>
    !total
      ? "It is not known how often it is used."
      : counts[code]
      ? `${page.count(counts[code])} patches (${page.share(counts[code], total)}), rank ${page.count(rank[code])} of ${page.count(k)}; ${onThisPage(code)}.`
      : "A dead code: no patch has it.";

  let waiting = 0;
  let marker = () => {};
  const paint = () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      const code = lit();
      document.body.classList.toggle("lighting", code !== null);
      for (const card of cards) draw(card, code);
      for (const gallery of document.querySelectorAll(".code"))
        gallery.classList.toggle("lit", Number(gallery.dataset.code) === code);
      const lamp = element("lamp");
      lamp.hidden = code === null;
      if (code !== null) {
        lamp.querySelector(".swatch").style.background = colourOf(code);
        lamp.querySelector("strong").textContent = `Code ${code}`;
        lamp.querySelector("p span").textContent = words(code);
        element("next").hidden = !places.has(code);
      }
      marker(code);
    });
  };
  const point = (code) => {
    if (pointed === code) return;
    pointed = code;
    paint();
  };

  // The address says what is shown: #code=123, #key=NAME, #find=TEXT, and tokens=over.
  const address = () => {
    const parts = [];
    if (state.key !== null) parts.push(`key=${encodeURIComponent(state.key)}`);
    if (state.code !== null) parts.push(`code=${state.code}`);
    if (state.find) parts.push(`find=${encodeURIComponent(state.find)}`);
    if (state.tokens) parts.push("tokens=over");
    return `#${parts.join("&")}`;
  };
  const isCode = (text) => /^(0|[1-9]\d*)$/.test(text ?? "") && Number(text) < k;
  function read() {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) return false; // an anchor of the page
    const said = new URLSearchParams(hash.replaceAll("+", "%2B"));
    state.code = isCode(said.get("code")) ? Number(said.get("code")) : null;
    state.key = said.get("key");
    state.find = said.get("find") ?? "";
    state.tokens = said.get("tokens") === "over";
    return true;
  }
  let quiet = false;
  function go(change, scroll = true) {
    Object.assign(state, change);
    if (address() === (location.hash || "#")) return restore(scroll);
    quiet = !scroll;
    location.hash = address();
  }
  function restore(scroll) {
    element("overlay")?.setAttribute("aria-pressed", state.tokens);
    const found = filter();
    pointed = null;
    paint();
    const ofKey = cards.find(({ key }) => key === state.key);
    for (const { card } of cards) card.classList.toggle("current", card === ofKey?.card);
    tell(found, ofKey);
    if (!scroll) return;
    const target = ofKey?.card ?? (state.code === null ? null : firstOf(state.code)) ?? (state.find ? found[0]?.card : null);
    if (target) unfold(target);
    if (target) page.show(target, "center");
  }
  // Long galleries begin folded; what is asked for is never hidden in one.
  function unfold(card) {
    const gallery = card.closest(".folded");
    if (!gallery || (card.offsetParent && !state.find)) return;
    gallery.classList.remove("folded");
    gallery.nextElementSibling.hidden = true;
  }
  for (const more of document.querySelectorAll(".more")) {
    const gallery = more.previousElementSibling;
    more.hidden = gallery.lastElementChild.offsetParent !== null;
    more.addEventListener("click", () => {
      const first = [...gallery.children].find((card) => !card.offsetParent);
      unfold(gallery.lastElementChild);
      first.querySelector("a, button").focus();
    });
  }
  const firstOf = (code) =>
    document.querySelector(`.code[data-code="${code}"]`) ?? cards[places.get(code)?.keys().next().value]?.card;
  function filter() {
    const wanted = state.find.toLowerCase();
    const found = cards.filter(({ key }) => key.toLowerCase().includes(wanted));
    for (const { card } of cards) card.hidden = true;
    for (const { card } of found) card.hidden = false;
    return found;
  }
  function tell(found, ofKey) {
    let text = "";
    if (state.find && !found.length) text = `No image on this page has “${state.find}” in its key, and no code has that number.`;
    else if (state.find) text = `${page.count(found.length)} of ${page.count(cards.length)} images have “${state.find}” in their key.`;
    else if (state.key !== null && !ofKey) text = `The image “${state.key}” is not on this page; --key adds it.`;
    else if (state.code !== null) page.say(`Code ${state.code}: ${words(state.code)}`);
    element("found").textContent = text;
  }

  element("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const query = element("query").value.trim();
    const code = query.replace(/^code[\s:=]*/i, "");
    if (cards.some(({ key }) => key === query)) go({ key: query, code: null, find: "" });
    else if (isCode(code)) go({ code: Number(code), key: null, find: "" });
    else go({ find: query, key: null, code: null });
  });
  element("overlay")?.addEventListener("click", () => {
    state.tokens = !state.tokens;
    history.replaceState(null, "", address());
    restore(false);
  });
  element("clear").addEventListener("click", () => go({ code: null, key: null, find: "" }, false));
  let turn = -1;
  element("next").addEventListener("click", () => {
    const found = [...places.get(lit()).keys()];
    turn = (turn + 1) % found.length;
    unfold(cards[found[turn]].card);
    page.show(cards[found[turn]].card);
  });
  addEventListener("hashchange", () => {
    const scroll = !quiet;
    quiet = false;
    turn = -1;
    if (read()) restore(scroll);
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && lit() !== null) go({ code: null, key: null }, false);
  });

  // Patches: pointed at in the picture or in its map, or walked through with the arrow keys.
  const cellAt = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return Math.min(Math.max(row, 0), rows - 1) * columns + Math.min(Math.max(column, 0), columns - 1);
  };
  function moveCursor(card, at) {
    card.at = at;
    const row = Math.floor(at / columns), column = at % columns, code = card.tokens[at];
    card.cursor.style.cssText = `left: ${(100 * column) / columns}%; top: ${(100 * row) / rows}%; width: ${100 / columns}%; height: ${100 / rows}%`;
    card.cursor.setAttribute("aria-label", `${card.key}: row ${row + 1}, column ${column + 1}, code ${code}`);
    return code;
  }
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -columns], End: [0, columns] };
  for (const card of cards) {
    moveCursor(card, 0);
    for (const area of card.card.querySelectorAll(".photo, .map")) {
      area.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(card.tokens[cellAt(event)]));
      area.addEventListener("pointerleave", () => point(null));
      area.addEventListener("click", (event) => {
        // A click that the keyboard made has no place: it is the cursor's.
        const code = moveCursor(card, event.detail ? cellAt(event) : card.at);
        go({ code: state.code === code ? null : code, key: null }, false);
      });
    }
    card.cursor.addEventListener("focus", () => {
      if (!card.cursor.matches(":focus-visible")) return;
      point(card.tokens[card.at]);
    });
    card.cursor.addEventListener("blur", () => point(null));
    card.cursor.addEventListener("keydown", (event) => {
      const step = STEPS[event.key];
      if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      const row = Math.min(Math.max(Math.floor(card.at / columns) + step[0], 0), rows - 1);
      const column = Math.min(Math.max((card.at % columns) + step[1], 0), columns - 1);
      const code = moveCursor(card, row * columns + column);
      point(code);
      page.say(`Code ${code}, row ${row + 1}, column ${column + 1}: ${words(code)}`);
    });
  }
  for (const gallery of document.querySelectorAll(".code")) {
    const code = Number(gallery.dataset.code);
    gallery.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && point(code));
    gallery.addEventListener("pointerleave", () => point(null));
    gallery.querySelector("a").addEventListener("focus", () => point(code));
    gallery.querySelector("a").addEventListener("blur", () => point(null));
  }
  for (const swatch of document.querySelectorAll("[data-swatch]")) swatch.style.background = colourOf(Number(swatch.dataset.swatch));

  // Charts.
  const used = byUse.filter((code) => counts[code] > 0);
  const step = Math.max(1, Math.ceil(used.length / 2000));
  const curve = used
    .map((code, at) => ({ code, rank: at + 1, count: counts[code] }))
    .filter((_, at) => at % step === 0 || at === used.length - 1);
  page.chart("usage-curve", `Usage of codes, from ${page.count(counts[byUse[0]])} patches down to ${page.count(counts[used.at(-1)])}`, (width, height) => {
    const plot = Plot.plot({
      width, height, marginLeft: 52, marginBottom: 40,
      x: { label: "codes, most used first", domain: [1, k], tickFormat: "~s", ticks: width / 90 },
      y: { type: "log", label: "patches", grid: true, tickFormat: "~s", ticks: height / 50 },
      marks: [
        Plot.ruleY([total / k], { stroke: "currentColor", strokeOpacity: 0.5, strokeDasharray: "3,4" }),
        Plot.text([[k, total / k]], { text: ["all equally often"], textAnchor: "end", dy: -8, fill: "currentColor" }),
        Plot.lineY(curve, { x: "rank", y: "count", stroke: "var(--accent)", strokeWidth: 2.5 }),
        Plot.tip(curve, Plot.pointerX({ x: "rank", y: "count", title: (d) => `Code ${d.code}\n${page.count(d.count)} patches\nrank ${page.count(d.rank)}` })),
      ],
    });
    plot.addEventListener("input", () => point(plot.value?.code ?? null));
    plot.addEventListener("click", () => plot.value && go({ code: plot.value.code, key: null }, false));
    const dot = d3.select(plot).append("circle").attr("r", 6).attr("fill", "var(--accent)").attr("stroke", "var(--surface)").attr("stroke-width", 2).attr("pointer-events", "none");
    marker = (code) => {
      const shown = code !== null && counts[code] > 0;
      dot.attr("display", shown ? null : "none");
      if (shown) dot.attr("cx", plot.scale("x").apply(rank[code])).attr("cy", plot.scale("y").apply(counts[code]));
    };
    marker(lit());
    return plot;
  });
  if (page.data.perplexity) {
    const [low, high] = d3.extent(page.data.perplexity.flat());
    const label = `Perplexity over the grid, from ${low.toFixed(1)} to ${high.toFixed(1)}`;
    page.gridMap("perplexity-map", label, page.data.perplexity, { name: "perplexity", words: (value) => `${+value.toFixed(1)}` });
  }
  if (page.data.objective) {
    const lines = page.data.objective.flatMap((restart, run) => restart.map((value, at) => ({ run, iteration: at + 1, value })));
    page.chart("objective", "k-means objective by iteration", (width, height) =>
      Plot.plot({
        width, height, marginLeft: 52, marginBottom: 40,
        x: { label: "iteration" }, y: { label: "objective", grid: true, tickFormat: "~s" },
        marks: [Plot.lineY(lines, { x: "iteration", y: "value", z: "run", stroke: "var(--accent)", strokeOpacity: 0.75, strokeWidth: 2, tip: true })],
      }),
    );
  }

  read();
  restore(true);
})();
