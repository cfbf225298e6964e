// Filters the rows, hands each chart its own, and draws what comes into view. The charts themselves are Vega-Lite's.
"use strict";
(() => {
  const { charts, data, series, themes } = JSON.parse(document.getElementById("described").textContent);
  const find = (id) => document.getElementById(id);
  const hidden = new Set(); // implementations
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => document.documentElement.dataset.theme || (dark.matches ? "dark" : "light");
  const drawings = [];
  // a filter: words, all of which must occur, or a glob over the whole id
  function matcher(text) {
    const words = text.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const tests = words.map((word) => {
      if (!/[*?]/.test(word)) return (id) => id.includes(word);
      const pattern = word.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*/g, ".*").replace(/\?/g, ".");
      const glob = new RegExp(`^${pattern}$`);
      return (id) => glob.test(id);
    });
    return (row) => tests.every((test) => test(row.workload.toLowerCase()) || test((row.label || "").toLowerCase()));
  }

  function rowsOf(drawing, wanted) {
    const where = Object.entries(drawing.panel.where);
    return data[drawing.chart.rows].filter(
      (row) => wanted(row) && !hidden.has(row.implementation) && where.every(([key, value]) => row[key] === value));
  }

  async function draw(drawing) {
    drawing.drawn = theme();
    const spec = structuredClone(drawing.chart.spec);
    spec.datasets = { ...spec.datasets, cases: drawing.rows };
    const values = (line) => new Set(drawing.rows.map((row) => row[line])).size;
    spec.height = drawing.chart.lines.reduce((height, line) => height * values(line), drawing.chart.height);
    const config = structuredClone(themes[theme()]);
    if (drawing.element.clientWidth < 500) config.axis.labelLimit = 120;
    const options = { actions: false, renderer: "svg", config, tooltip: { theme: "custom" } };
    const old = drawing.result;
    drawing.result = await vegaEmbed(drawing.element, spec, options);
    if (old) old.finalize();
    drawing.element.dataset.drawn = "true";
  }

  async function redraw(drawing) {
    if (!drawing.visible || !drawing.rows.length) return;
    drawing.dirty = false;
    drawing.queue = (drawing.queue || Promise.resolve()).then(() => draw(drawing)).catch((error) => {
      console.error(error);
      drawing.element.textContent = `This chart could not be drawn: ${error.message}`;
    });
    return drawing.queue;
  }

  function filter() {
    const wanted = matcher(find("workload").value);
    for (const drawing of drawings) {
      const rows = rowsOf(drawing, wanted);
      const changed = !drawing.rows || rows.length !== drawing.rows.length || rows.some((row, n) => row !== drawing.rows[n]);
      drawing.rows = rows;
      drawing.element.parentElement.hidden = !rows.length;
      if (changed) { drawing.dirty = true; redraw(drawing); }
    }
    for (const figure of document.querySelectorAll("figure.chart"))
      figure.hidden = [...figure.querySelectorAll(".panel")].every((panel) => panel.hidden);
    for (const row of document.querySelectorAll("tr[data-workload], tr[data-implementation]")) {
      const { workload, implementation } = row.dataset;
      row.hidden = (workload && !wanted({ workload, label: row.cells[0].textContent })) || hidden.has(implementation);
    }
    for (const chip of document.querySelectorAll(".chip")) chip.setAttribute("aria-pressed", !hidden.has(chip.dataset.name));
    const names = series.length - hidden.size;
    find("shown").textContent = `· ${names} of ${series.length} implementations`
      + (find("workload").value.trim() ? `, workloads: ${find("workload").value.trim()}` : "");
  }

  function chipClicked(event) {
    const chip = event.target.closest(".chip");
    if (!chip) return;
    const name = chip.dataset.name;
    if (event.detail === 2) { // the two clicks of a double-click have hidden and shown it again
      const alone = series.every((one) => one.name === name || hidden.has(one.name));
      hidden.clear();
      if (!alone) for (const one of series) if (one.name !== name) hidden.add(one.name);
    } else if (!hidden.delete(name)) hidden.add(name);
    filter();
  }

  function legend(chart, element) {
    const there = new Set(data[chart.rows].map((row) => row.implementation));
    for (const { name, colour, glyph } of chart.legend ? series.filter((one) => there.has(one.name)) : []) {
      const chip = document.createElement("button");
      chip.type = "button"; chip.className = "chip"; chip.dataset.name = name;
      const mark = document.createElement("span");
      mark.style.color = colour; mark.textContent = glyph; mark.setAttribute("aria-hidden", "true");
      chip.append(mark, ` ${name}`);
      element.append(chip);
    }
  }

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const drawing = drawings[entry.target.dataset.n];
      if (entry.isIntersecting) drawing.visible = true;
      if (drawing.visible && drawing.dirty) redraw(drawing);
    }
  }, { rootMargin: "800px" });

  document.querySelectorAll("figure.chart").forEach((figure, n) => {
    const chart = charts[n];
    legend(chart, figure.querySelector(".legend"));
    const frame = figure.querySelector(".panels");
    frame.classList.toggle("alone", chart.panels.length === 1 || chart.width > 560);
    for (const panel of chart.panels) {
      const element = document.createElement("div"), outer = document.createElement("div");
      outer.className = "panel"; element.className = "drawing"; element.dataset.n = drawings.length;
      if (chart.width) element.style.minWidth = `${chart.width}px`;
      if (panel.title) outer.append(Object.assign(document.createElement("h4"), { textContent: panel.title }));
      outer.append(element);
      frame.append(outer);
      drawings.push({ chart, panel, element, dirty: true });
      seen.observe(element);
    }
  });

  document.addEventListener("click", chipClicked);
  find("workload").addEventListener("input", filter);
  find("everything").addEventListener("click", () => { hidden.clear(); find("workload").value = ""; filter(); });
  const recolour = () => { for (const drawing of drawings) if (drawing.drawn !== theme()) { drawing.dirty = true; redraw(drawing); } };
  find("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
    recolour();
  });
  dark.addEventListener("change", recolour);
  addEventListener("beforeprint", () => { for (const drawing of drawings) { drawing.visible = true; if (drawing.dirty) redraw(drawing); } });
  if (innerWidth < 700) document.querySelector("#filters details").open = false;
  filter();
  // for tests and for saving the page whole: draws every chart now, and says when it is done
  window.drawAll = async () => { for (const drawing of drawings) { drawing.visible = true; if (drawing.dirty) await redraw(drawing); } await Promise.all(drawings.map((d) => d.queue)); };
})();
