"use strict";
const $ = (id) => document.getElementById(id);
const SVG = new Set(["svg", "line", "text", "path", "rect", "circle", "title"]);

// Elements are made, never parsed from text: what a record says stays text.
function make(parent, tag, attributes = {}, text = "") {
  const space = SVG.has(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return parent.appendChild(element);
}

// Rounded numbers; titles have the record's own.
function show(x) {
  if (x === null) return "–";
  if (!Number.isFinite(x)) return Number.isNaN(x) ? "not a number" : "∞";
  if (Number.isInteger(x)) return String(x).replace(/\B(?=(\d{3})+$)/g, "\u2009");
  if (x >= 1e-3 && x < 999.5) return x.toPrecision(3);
  if (x >= 999.5 && x < 1e4) return show(Math.round(x));
  const [mantissa, power] = x.toExponential(1).split("e");
  return `${mantissa}×10${power.replace("+", "").replace("-", "⁻").replace(/\d/g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])}`;
}
const showTick = (x) => (x >= 1e-3 && x < 1e4 ? String(Number(x.toPrecision(3))) : show(x).replace(".0×", "×").replace(/^1×/, ""));
const divide = (a, b) => (b === null ? null : a === b ? 1 : a / b);

// How the values of several linears join: as in report.md.
const average = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
const geometric = (values) => (values.some((x) => x !== 0) ? Math.exp(average(values.filter((x) => x !== 0).map(Math.log))) : 0);
const largest = (values) => Math.max(...values);
function group(items, key) {
  const groups = new Map();
  for (const item of items) groups.set(key(item), groups.get(key(item)) ?? []).get(key(item)).push(item);
  return groups;
}

const DATA = JSON.parse($("data").textContent);
const isText = (field) => ["part", "name", "pattern"].includes(field);
const value = (x, field) => (typeof x === "string" && !isText(field) ? Number(x) : x);
const LINEARS = DATA.rows.map((row) => Object.fromEntries(row.map((x, i) => [DATA.fields[i], value(x, DATA.fields[i])])));
// Columns of the table; the heat map shows those that know how several linears join.
const error = { join: geometric, log: true };
const COLUMNS = [
  { title: "layer", get: (l) => l.part, exact: (l) => l.name },
  { title: "block", get: (l) => l.block },
  { title: "shape", get: (l) => l.shape[0] * l.shape[1], text: (_, l) => l.shape.join(" × ") },
  { title: "pattern", get: (l) => l.pattern },
  { title: "mask", get: (l) => l.error_mask, ...error },
  { title: "selector", get: (l) => l.error_selector, ...error },
  { title: "result", get: (l) => l.error, ...error },
  { title: "result ÷ selector", get: (l) => divide(l.error, l.error_selector), ...error, aroundOne: true },
  { title: "sparsity", get: (l) => l.sparsity, join: average, text: (x) => `${show(100 * x)}%` },
  { title: "gap", get: (l) => l.gap_max },
  { title: "gap written", get: (l) => l.gap_written_max, join: largest, log: true },
  { title: "tuned", get: (l) => (l.tuned ? 1 : null), text: (x) => (x ? "yes" : "") },
  { title: "iterations", get: (l) => (l.gap_max === null ? null : l.iterations_mean), join: average, exact: (l) => `mean ${l.iterations_mean}, largest ${l.iterations_max}` },
  { title: "not converged", get: (l) => l.rows_not_converged },
  { title: "seconds", get: (l) => l.seconds },
];
const METRICS = COLUMNS.filter(({ join, get }) => join && LINEARS.some((l) => get(l) !== null));
const MOST_ROWS = 2000; // of the table at once; the filter finds the others
const state = { metric: METRICS.find(({ title }) => title === "result"), column: "result", falls: true, selected: [] };

// A linear has a cell, a dot and a row, marked and selected together.
const places = new Map();
const placesOf = (linear) => (places.get(linear) ?? []).filter((element) => element.isConnected);
function place(element, linears, text) {
  for (const linear of linears) places.set(linear, [...placesOf(linear), element]);
  if (linears.some((l) => state.selected.includes(l))) element.setAttribute("aria-selected", true);
  const mark = (on) => {
    for (const other of linears.flatMap(placesOf)) other.classList.toggle("marked", on);
    $("readout").hidden = !on;
    $("readout").textContent = text;
  };
  for (const event of ["mouseenter", "focus"]) element.addEventListener(event, () => mark(true));
  for (const event of ["mouseleave", "blur"]) element.addEventListener(event, () => mark(false));
  element.onclick = () => select(linears, element.localName);
}
function describe(linear) {
  const parts = METRICS.filter(({ get }) => get(linear) !== null).map(({ title, get, text = show }) => `${title} ${text(get(linear))}`);
  return [linear.name, ...parts].join(" · ");
}
function select(linears, from) {
  const find = (tag) => placesOf(linears[0]).find((element) => element.localName === tag);
  state.selected = linears;
  if (from !== "tr" && !find("tr")) {
    $("filter").value = linears[0].name; // filtered out, or beyond what is shown
    draw("linears");
  }
  for (const element of document.querySelectorAll("[aria-selected=true]")) element.removeAttribute("aria-selected");
  for (const element of linears.flatMap(placesOf)) element.setAttribute("aria-selected", true);
  const there = find(from === "tr" ? "td" : "tr");
  there.focus({ preventScroll: true });
  there.scrollIntoView({ block: "center" });
}
// One stop of the Tab key for a whole grid; arrows move inside it, over what is empty, and Enter is a click.
function rove(grid) {
  const items = [...grid.querySelectorAll("[tabindex]")];
  if (items.length) items[0].tabIndex = 0;
  grid.addEventListener("focusin", ({ target }) => {
    if (target.hasAttribute("tabindex")) for (const item of items) item.tabIndex = item === target ? 0 : -1;
  });
  grid.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return; // the browser's own: back, forward
    const here = items.indexOf(event.target);
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    const column = event.key === "ArrowUp" || event.key === "ArrowDown" ? event.target.cellIndex : undefined;
    let at = here + step;
    while (column !== undefined && items[at] && items[at].cellIndex !== column) at += step;
    const next = items[at];
    if (here < 0 || (event.key !== "Enter" && !next)) return;
    event.preventDefault();
    if (next) next.focus();
    else event.target.click();
  });
}

// The least and the greatest of the values that can be drawn; a share at both ends may be left out.
function limits(values, log, share = 0) {
  const known = values.filter((x) => Number.isFinite(x) && (!log || x > 0)).sort((a, b) => a - b);
  const cut = Math.floor(share * known.length);
  return known.length ? [known[cut], known[known.length - 1 - cut]] : [0.1, 1];
}
function scale([low, high], [from, to], log) {
  const f = log ? Math.log : (x) => x;
  const position = (x) => (low === high ? 0.5 : Math.min(1, Math.max(0, (f(x) - f(low)) / (f(high) - f(low)))));
  return (x) => from + position(x) * (to - from);
}
function ticks([low, high], log) {
  const digits = !log || high / low < 8 ? [1, 2, 5, 10] : high / low < 300 ? [1, 3] : [1];
  const power = log ? Math.floor(Math.log10(low)) : Math.max(0, Math.floor(Math.log10((high - low) / 6)));
  const step = digits.map((digit) => digit * 10 ** power).find((size) => (high - low) / size <= 6);
  const near = log ? (i) => digits.map((digit) => digit * 10 ** (power + i)) : (i) => [(Math.ceil(low / step) + i) * step];
  return [...new Set(Array.from({ length: 40 }, (_, i) => near(i)).flat())].filter((x) => x >= low * 0.999 && x <= high * 1.001);
}
// Stops of a scale are colours of the style sheet, so that a change of theme needs no drawing.
function paint({ log, aroundOne }, values) {
  let range = limits(values, log, 0.02);
  const most = Math.max(range[1], 1 / range[0], 1.01);
  if (aroundOne) range = [1 / most, most];
  const stops = aroundOne ? ["--better", "--same", "--worse"] : ["--ramp-0", "--ramp-1", "--ramp-2"];
  const position = scale(range, [0, 2], log);
  const colour = (x) => {
    const i = position(x) < 1 ? 0 : 1;
    return `color-mix(in oklab, var(${stops[i + 1]}) ${100 * (position(x) - i)}%, var(${stops[i]}))`;
  };
  return { range, colour, bar: `linear-gradient(in oklab to right, ${stops.map((stop) => `var(${stop})`)})` };
}

const blocksOf = (linears) => [...new Set(linears.map((l) => l.block))].sort((a, b) => a - b);
function drawMap() {
  const { title, get, join, text = show } = state.metric;
  const cells = group(LINEARS, (l) => `${l.kind} ${l.block}`);
  const known = (members) => members.map(get).filter((x) => x !== null);
  const value = (members) => (known(members).length ? join(known(members)) : null);
  const values = [...cells.values()].map(value);
  const { range, colour, bar } = paint(state.metric, values);
  const blocks = blocksOf(LINEARS);
  const table = make($("map"), "table", { role: "grid", "aria-label": `${title}: kinds of layers down, blocks across` });
  table.style.minWidth = `${5.5 + blocks.length * 0.55}rem`;
  const every = [1, 2, 5, 10].find((step) => blocks.length / step <= 15) ?? 20;
  const head = make(make(table, "thead"), "tr");
  make(head, "th", { scope: "col" }, "block");
  for (const [i, block] of blocks.entries()) make(head, "th", { scope: "col", "aria-label": block }, i % every ? "" : block);
  for (const [number, kind] of DATA.kinds.entries()) {
    const row = make(table.tBodies[0] ?? make(table, "tbody"), "tr");
    make(row, "th", { scope: "row" }, kind);
    for (const block of blocks) {
      const members = cells.get(`${number} ${block}`);
      if (!members) { make(row, "td"); continue; }
      const x = value(members);
      const label = `block ${block}, ${kind}: ${title} ${x === null ? "–" : text(x)}`;
      const cell = make(row, "td", { tabindex: -1, "aria-label": label });
      if (Number.isFinite(x)) cell.style.background = colour(x);
      else cell.className = "unknown";
      place(cell, members.sort((a, b) => b.error - a.error), members.length > 1 ? `${label} · ${members.length} layers` : describe(members[0]));
    }
  }
  rove(table);
  const [low, between, high] = document.querySelector(".legend").children;
  const drawn = values.filter((x) => x !== null);
  const finite = drawn.some((x) => Number.isFinite(x) && (!state.metric.log || x > 0));
  document.querySelector(".legend").hidden = !finite;
  if (!finite) return;
  [low.textContent, high.textContent] = range.map(text);
  if (drawn.some((x) => x < range[0])) low.prepend("≤ ");
  if (drawn.some((x) => x > range[1])) high.prepend("≥ ");
  between.style.background = bar;
}

// A drawing as wide as its box, with a grid of the values that run up.
function chart(box, label, height, range, log, left) {
  const svg = make(box, "svg", { width: box.clientWidth, height, role: "img", "aria-label": label });
  const y = scale(range, [height - 24, 12], log);
  for (const tick of ticks(range, log)) {
    make(svg, "line", { class: "grid", x1: left, x2: box.clientWidth, y1: y(tick), y2: y(tick) });
    make(svg, "text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end" }, showTick(tick));
  }
  return [svg, y, box.clientWidth];
}
function drawDepth() {
  const result = (l) => l.error;
  const steps = [["mask", (l) => l.error_mask], ["selector", (l) => l.error_selector], ["result", result]];
  if (LINEARS.every((l) => Object.is(l.error_mask, l.error_selector))) steps.splice(1, 1);
  const blocks = blocksOf(LINEARS);
  const range = limits(steps.flatMap(([, get]) => LINEARS.map(get)), true);
  const [svg, y, width] = chart($("depth"), "Relative error by block, log scale", 260, range, true, 52);
  const x = scale(limits(blocks), [64, width - 70]);
  const drawable = (error) => Number.isFinite(error) && error > 0;
  for (const tick of ticks(limits(blocks))) make(svg, "text", { x: x(tick), y: 254, "text-anchor": "middle" }, tick);
  make(svg, "text", { x: 0, y: -4 }, "relative error");
  make(svg, "text", { x: width, y: 254, "text-anchor": "end" }, "block");
  const dots = LINEARS.length > MOST_ROWS ? [] : LINEARS;
  for (const l of dots.filter((other) => drawable(other.error))) place(make(svg, "circle", { cx: x(l.block), cy: y(l.error), r: 2.6 }), [l], describe(l));
  const ends = steps.map(([title, get]) => {
    const means = [...group(LINEARS, (l) => l.block)].sort(([a], [b]) => a - b).map(([block, members]) => [block, geometric(members.map(get))]);
    const points = means.filter(([, mean]) => drawable(mean)).map(([block, mean]) => [x(block), y(mean)]);
    const main = get === result ? "main" : "";
    make(svg, "path", { class: `line ${main}`, d: points.map((point, i) => `${i ? "L" : "M"}${point}`).join("") });
    return { title, main, end: points.at(-1) };
  });
  let last = -Infinity; // names at the ends of the lines make room for each other
  for (const { title, main, end } of ends.filter((line) => line.end).sort((a, b) => a.end[1] - b.end[1])) {
    last = Math.max(end[1] + 4, last + 13);
    make(svg, "text", { class: main, x: end[0] + 10, y: last }, title);
  }
}

function histogram(box, title, values, log, asked) {
  const known = values.filter((x) => Number.isFinite(x) && (!log || x > 0));
  make(box, "h3", {}, title);
  if (known.length < values.length || !known.length) make(box, "p", { class: "hint" }, `${values.length - known.length} of ${values.length} cannot be drawn.`);
  if (!known.length) return;
  const [least, most] = limits(known, log);
  if (known.length > 1 && most <= 1.2 * least) {
    make(box, "p", {}, `All ${known.length} between ${show(least)} and ${show(most)}${asked ? `; requested ${show(asked)}` : ""}.`);
    return;
  }
  const [low, high] = limits(asked ? [...known, asked] : known, log);
  const range = log ? [10 ** Math.floor(Math.log10(low)), 10 ** Math.ceil(Math.log10(high * 1.001))] : [Math.floor(low), Math.floor(high) + 1];
  const bin = scale(range, [0, 20], log);
  const bins = group(known, (x) => Math.floor(bin(x)));
  const tallest = Math.max(...[...bins.values()].map((members) => members.length));
  const [svg, y, width] = chart(box, `${title}: ${known.length} layers, ${show(low)} to ${show(high)}`, 150, [0, tallest], false, 30);
  make(svg, "text", { x: 0, y: 2 }, "layers");
  const x = scale([0, 20], [34, width - 14]);
  for (const [i, members] of bins) {
    const bar = make(svg, "rect", { x: x(i) + 0.5, width: x(1) - x(0) - 1, y: y(members.length), height: y(0) - y(members.length) });
    make(bar, "title", {}, `${members.length} layers, ${limits(members).map(show).join(" to ")}`);
  }
  for (const tick of ticks(range, log)) make(svg, "text", { x: x(bin(tick)), y: 144, "text-anchor": "middle" }, showTick(tick));
  if (asked) make(svg, "line", { class: "asked", x1: x(bin(asked)), x2: x(bin(asked)), y1: 8, y2: y(0) });
}
function drawSpread() {
  const solved = LINEARS.filter((l) => l.gap_max !== null);
  const plots = [
    ["Gap before the cast", solved.map((l) => l.gap_max), true, DATA.gap],
    ["Gap as written", solved.map((l) => l.gap_written_max), true],
    ["Iterations per row", solved.map((l) => l.iterations_mean), false],
  ].filter(([, values]) => values.some((x) => x !== null)); // tuned, or no solver ran
  const boxes = plots.map(() => make($("spread"), "div")); // all of them first: they share the width
  for (const [i, plot] of plots.entries()) histogram(boxes[i], ...plot);
}

function drawTable() {
  // A column is shown where it says something that its neighbours do not.
  const same = (a, b) => LINEARS.every((l) => Object.is(a(l), b(l)));
  const hidden = {
    pattern: ({ get }) => new Set(LINEARS.map(get)).size < 2 || LINEARS.every((l) => /^[\d.]+ per /.test(l.pattern)),
    selector: ({ get }) => same(get, (l) => l.error_mask),
    tuned: ({ get }) => new Set(LINEARS.map(get)).size < 2,
    "not converged": ({ get }) => LINEARS.every((l) => !get(l)),
    iterations: ({ get }) => LINEARS.every((l) => !get(l)),
  };
  const differs = (column) => !hidden[column.title]?.(column) && LINEARS.some((l) => column.get(l) !== null);
  const columns = COLUMNS.filter(differs);
  const sorted = columns.find((column) => column.title === state.column);
  const found = LINEARS.filter((l) => l.name.toLowerCase().includes($("filter").value.trim().toLowerCase()));
  const unknown = (x) => x === null || Number.isNaN(x);
  const rank = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a < b ? -1 : Number(a > b));
  const order = (a, b) => unknown(a) - unknown(b) || (state.falls ? rank(b, a) : rank(a, b)) || 0;
  if (sorted) found.sort((l, m) => order(sorted.get(l), sorted.get(m)));
  const table = make($("linears"), "table", { role: "grid", "aria-label": "Every linear layer" });
  const head = make(make(table, "thead"), "tr");
  for (const column of columns) {
    const cell = make(head, "th", { scope: "col", ...(column === sorted && { "aria-sort": state.falls ? "descending" : "ascending" }) });
    const button = make(cell, "button", { type: "button" }, column.title);
    button.onclick = () => {
      Object.assign(state, { column: column.title, falls: state.column === column.title && !state.falls });
      draw("linears");
      [...$("linears").querySelectorAll("button")].find((other) => other.textContent === column.title).focus({ preventScroll: true });
    };
  }
  const body = make(table, "tbody");
  for (const linear of found.slice(0, MOST_ROWS)) {
    const row = make(body, "tr", { tabindex: -1 });
    for (const { title, get, text = show, exact = get } of columns) {
      const value = get(linear);
      make(row, title === "layer" ? "th" : "td", { title: exact(linear) ?? "" }, typeof value === "string" ? value : text(value, linear));
    }
    place(row, [linear], describe(linear));
  }
  rove(table);
  $("count").textContent = `${show(found.length)} of ${show(LINEARS.length)}${found.length > MOST_ROWS ? `, the first ${show(MOST_ROWS)} shown` : ""}`;
}

// A function for each element that is drawn, by its id in sections.html.
const DRAW = { map: drawMap, depth: drawDepth, spread: drawSpread, linears: drawTable };
function draw(...ids) {
  for (const id of ids.filter($)) {
    $(id).replaceChildren();
    if (id === "linears") $("count").textContent = "";
    if (LINEARS.length) DRAW[id]();
  }
}
for (const metric of $("metrics") ? METRICS : []) {
  const label = make($("metrics"), "label");
  const input = make(label, "input", { type: "radio", name: "metrics" });
  label.append(metric.title);
  input.checked = state.metric === metric;
  input.onchange = () => {
    state.metric = metric;
    draw("map");
  };
}
draw(...Object.keys(DRAW));
$("filter")?.addEventListener("input", () => draw("linears"));
addEventListener("resize", () => draw("depth", "spread"));
$("theme").onclick = () => {
  const themes = { system: "light", light: "dark", dark: "system" };
  const theme = themes[document.documentElement.dataset.theme ?? "system"];
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
};
