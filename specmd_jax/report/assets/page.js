"use strict";
// The script of a page: its choices rule every chart and table, tables can be sorted and saved, the theme can be set.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const SERIES = page.series, ROOT = document.documentElement, FEW = 200, GAP = 13;
  const each = (what, of = document) => Array.from(of.querySelectorAll(what));

  // ---------------------------------------------------------------------------------------------- data and choices
  function decode(table) {
    const names = Object.keys(table.columns);
    const read = names.map((name) => {
      const column = table.columns[name];
      return column.levels ? (i) => column.levels[column.at[i]] : (i) => column.values[i];
    });
    return Array.from({ length: table.rows }, (_, i) => Object.fromEntries(names.map((name, k) => [name, read[k](i)])));
  }
  const tables = Object.fromEntries(Object.entries(page.tables).map(([name, table]) => [name, decode(table)]));
  const selects = each("select[data-filter]");
  const boxes = each("input[data-series]");
  const only = document.getElementById("only");

  const named = () => boxes.filter((box) => box.checked).map((box) => box.dataset.series);
  function left(name) { // the records of a table that the choices leave
    const rules = selects.filter((select) => select.value !== "").map((select) => [
      select.dataset.filter, JSON.parse(select.dataset.values)[Number(select.value)],
    ]);
    const hidden = only && only.checked ? new Set(boxes.filter((b) => !b.checked).map((b) => b.dataset.series)) : null;
    return tables[name].filter((record) =>
      rules.every(([field, value]) => !(field in record) || record[field] === null || record[field] === value) &&
      !(hidden && hidden.has(record[SERIES])));
  }

  // ---------------------------------------------------------------------------------------------------------- theme
  const dark = () => ROOT.dataset.theme ? ROOT.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  function paint(value, colors) { // puts colours in the place of their names
    if (typeof value === "string") return value[0] === "@" && value.slice(1) in colors ? colors[value.slice(1)] : value;
    if (Array.isArray(value)) return value.map((item) => paint(item, colors));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item, colors)]));
    }
    return value;
  }
  function colors() {
    const theme = dark() ? "dark" : "light", css = getComputedStyle(ROOT), looks = Object.values(page.looks);
    const found = Object.fromEntries(["paper", "ink", "quiet", "faint", "line"].map((name) =>
      [name, css.getPropertyValue("--" + name).trim()]));
    const hues = page.hues[theme];
    ["blue", "red", "teal", "lilac", "green", "gold", "plum"].forEach((name, i) => { found[name] = hues[i]; });
    return {
      ...found, hues, names: Object.keys(page.looks), colors: looks.map((look) => look[theme]),
      dashes: looks.map((look) => look.dash.length ? look.dash : [1, 0]),
    };
  }
  const config = (c) => ({
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: null },
    axis: { labelColor: c.ink, titleColor: c.ink, gridColor: c.line, domainColor: c.quiet, tickColor: c.quiet,
      labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal", labelFlush: true },
    legend: { labelColor: c.ink, titleColor: c.ink, labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal" },
    text: { color: c.ink }, header: { labelColor: c.ink, titleColor: c.ink },
  });

  // --------------------------------------------------------------------------------------------------------- charts
  const views = [];
  function endings(view, chart) { // where the chosen lines end, the names spread so that none covers another
    const { table, x, y } = chart.ends, scale = view.scale("y"), chosen = new Set(named()), last = new Map();
    for (const record of left(table)) {
      const name = record[SERIES];
      if (!chosen.has(name) || record[y] === null) continue;
      const seen = last.get(name) || { name, x: -Infinity, sum: 0, count: 0 };
      seen.sum += record[y]; seen.count += 1;
      if (record[x] >= seen.x) Object.assign(seen, { x: record[x], at: scale(record[y]) });
      last.set(name, seen);
    }
    const found = [...last.values()].filter((end) => Number.isFinite(end.at))
      .sort((a, b) => a.at - b.at || b.sum / b.count - a.sum / a.count);
    const height = view.height();
    found.forEach((end, i) => { end.at = Math.max(i ? found[i - 1].at + GAP : 0, end.at); });
    for (let i = found.length - 1, most = height; i >= 0; i -= 1, most -= GAP) found[i].at = Math.min(found[i].at, most);
    return found.map((end) => ({ name: end.name, at: end.at, [SERIES]: end.name }));
  }
  async function draw(chart, at) {
    const place = document.getElementById("chart-" + at), c = colors();
    if (views[at]) views[at].finalize();
    views[at] = null;
    const data = Object.fromEntries(chart.tables.map((name) => [name, left(name)]));
    place.classList.toggle("empty", !data[chart.tables[0]].length);
    if (!data[chart.tables[0]].length) { place.replaceChildren(); return; }
    const spec = {
      $schema: "https://vega.github.io/schema/vega-lite/v6.json",
      width: "container", autosize: { type: "fit-x", contains: "padding" },
      ...paint(chart.spec, c), config: config(c),
      params: [{ name: "named", value: named() }, ...(chart.spec.params || [])],
      datasets: chart.ends ? { ...data, ends: [{ name: "", at: 0, [SERIES]: "" }] } : data,
    };
    const done = await vegaEmbed(place, spec, {
      renderer: "canvas", mode: "vega-lite", logLevel: vega.Error, // a filter that leaves nothing is no warning
      tooltip: { theme: "custom" },
      actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: "chart-" + at,
    });
    views[at] = done.view;
    const summary = place.querySelector("summary");
    if (summary) summary.setAttribute("aria-label", "Save this chart as a picture");
    done.view.addEventListener("click", (_, item) => {
      const datum = item && item.datum && (item.datum.datum || item.datum);
      const box = datum && boxes.find((b) => b.dataset.series === datum[SERIES]);
      if (box) { box.checked = !box.checked; refresh(); }
    });
    if (chart.ends) await done.view.data("ends", endings(done.view, chart)).runAsync();
  }
  async function refill(chart, at) { // new rows for a chart that stands
    const view = views[at];
    const rows = chart.tables.map((name) => [name, left(name)]);
    if (!view || !rows[0][1].length) return draw(chart, at);
    view.signal("named", named());
    for (const [name, records] of rows) view.data(name, records.map((record) => ({ ...record })));
    await view.runAsync();
    if (chart.ends) await view.data("ends", endings(view, chart)).runAsync();
    return undefined;
  }
  let pending = Promise.resolve();
  function all(how) { // one change after the other
    pending = pending.then(async () => {
      for (const [at, chart] of page.charts.entries()) await how(chart, at);
      ROOT.dataset.drawn = String(Number(ROOT.dataset.drawn || 0) + 1);
    }).catch((error) => { console.error(error); });
    return pending;
  }
  function refresh() { sheets.forEach((sheet) => sheet.refresh()); return all(refill); }

  // --------------------------------------------------------------------------------------------------------- tables
  const numeric = (text) => {
    const found = /^[-+]?[\d,]*\.?\d+(e[-+]?\d+)?/i.exec(text.trim());
    return found ? Number(found[0].replaceAll(",", "")) : NaN;
  };
  function sheetOf(place, at) { // a table: `read` gives its rows anew
    const typed = place.dataset.sheet !== "text";
    const state = { column: -1, down: true, more: false };
    let head, read;
    if (typed) {
      const { table, fields } = page.sheets[Number(place.dataset.sheet)];
      const text = (value, it) => value === null || value === undefined ? "-" :
        it.format && typeof value === "number" ? vegaFormat(it.format)(value) : String(value);
      head = fields.map((it) => it.label);
      read = () => left(table).map((record) => ({
        cells: fields.map((it) => {
          const shown = text(record[it.name], it);
          return { text: shown, value: record[it.name], words: shown.length > 24 ? "words" : "" };
        }),
      }));
    } else {
      head = each("th", place).map((cell) => cell.textContent);
      const rows = each("tbody tr", place).map((row) => ({
        mark: row.className,
        cells: each("td", row).map((cell) => ({ text: cell.textContent, words: cell.className, value: cell.textContent })),
      }));
      read = () => rows;
    }
    const key = (cell) => typeof cell.value === "number" ? cell.value : typeof cell.value === "string" ? numeric(cell.value) : NaN;
    function sorted() {
      const rows = [...read()];
      if (state.column < 0) return rows;
      const sign = state.down ? -1 : 1;
      return rows.sort((a, b) => {
        const one = a.cells[state.column], two = b.cells[state.column], x = key(one), y = key(two);
        if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
        return sign * (Number.isNaN(x) ? one.text.localeCompare(two.text) : x - y);
      });
    }
    function save() {
      const quote = (value) => /[",\n]/.test(value) ? '"' + value.replaceAll('"', '""') + '"' : value;
      const cell = (it) => quote(String(it.value === null || it.value === undefined ? "" : it.value));
      const lines = [head.map(quote).join(","), ...sorted().map((row) => row.cells.map(cell).join(","))];
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
      link.download = "table-" + (at + 1) + ".csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    }
    const scroll = document.createElement("div"), tools = document.createElement("div");
    scroll.tabIndex = 0; scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", place.dataset.caption || "Table: " + head.join(", "));
    tools.className = "tools";
    function refresh() {
      const rows = sorted(), shown = state.more || rows.length <= FEW ? rows : rows.slice(0, FEW);
      const table = document.createElement("table"), top = table.createTHead().insertRow(), body = table.createTBody();
      head.forEach((label, column) => {
        const cell = document.createElement("th"), button = document.createElement("button");
        cell.scope = "col"; button.type = "button"; button.textContent = label;
        if (column === state.column) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        button.addEventListener("click", () => {
          state.down = state.column === column ? !state.down : true;
          state.column = column;
          refresh();
          scroll.querySelectorAll("th button")[column].focus();
        });
        cell.append(button); top.append(cell);
      });
      for (const row of shown) {
        const line = body.insertRow();
        if (row.mark) line.className = row.mark;
        for (const it of row.cells) { const cell = line.insertCell(); cell.textContent = it.text; if (it.words) cell.className = it.words; }
      }
      scroll.replaceChildren(table);
      tools.replaceChildren();
      const csv = document.createElement("button");
      csv.type = "button"; csv.textContent = "Save as CSV"; csv.addEventListener("click", save);
      tools.append(csv);
      if (rows.length > FEW) {
        const count = document.createElement("span"), more = document.createElement("button");
        count.textContent = shown.length + " of " + rows.length + " rows";
        more.type = "button"; more.textContent = state.more ? "fewer" : "all rows";
        more.addEventListener("click", () => { state.more = !state.more; refresh(); });
        tools.append(count, more);
      }
    }
    place.replaceChildren(tools, scroll);
    refresh();
    return { refresh: typed ? refresh : () => {} };
  }
  const formats = {};
  function vegaFormat(format) {
    if (!(format in formats)) {
      formats[format] = window.vega ? vega.defaultLocale().format(format) : (value) => String(Number(value.toPrecision(5)));
    }
    return formats[format];
  }
  const sheets = each(".sheet").map(sheetOf);

  // ---------------------------------------------------------------------------------------------------- what happens
  selects.forEach((select) => select.addEventListener("change", refresh));
  boxes.forEach((box) => box.addEventListener("change", refresh));
  if (only) only.addEventListener("change", refresh);
  each("button[data-choose]").forEach((button) => button.addEventListener("click", () => {
    const how = button.dataset.choose, first = new Set(page.named);
    boxes.forEach((box) => { box.checked = how === "all" || (how === "first" && first.has(box.dataset.series)); });
    refresh();
  }));
  const theme = document.getElementById("theme");
  const label = () => { theme.textContent = dark() ? "Light" : "Dark"; theme.setAttribute("aria-label", theme.textContent + " colours"); };
  theme.hidden = false;
  theme.addEventListener("click", () => { ROOT.dataset.theme = dark() ? "light" : "dark"; label(); all(draw); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (!ROOT.dataset.theme) { label(); all(draw); } });
  label();
  let before;
  addEventListener("beforeprint", () => {
    before = ROOT.dataset.theme;
    if (dark()) { ROOT.dataset.theme = "light"; all(draw); }
  });
  addEventListener("afterprint", () => {
    if (before) ROOT.dataset.theme = before; else delete ROOT.dataset.theme;
    if (dark()) all(draw);
  });
  all(draw);
})();
