"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const baselineRows = data.rows.filter((row) => row.baseline);
const SVG = "http://www.w3.org/2000/svg";
// Okabe and Ito's colours, which are told apart with every kind of colour vision; further rows are grey.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d"];

/* Elements. Text only ever becomes text: names may hold anything. */

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

/* Numbers. */

const MINUS = "\u2212";
const points = (fraction, digits = 2) => (100 * fraction).toFixed(digits).replace("-", MINUS);
// What rounds to nothing has no sign.
const signOf = (number) => (number > 0 ? "+" : number < 0 ? MINUS : "");
const signed = (fraction, digits = 2) => signOf(Number((100 * fraction).toFixed(digits))) + Math.abs(100 * fraction).toFixed(digits);
// Three significant digits at least, without an exponent.
const decimals = (value) => Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value) || 1)));
const plain = (value) => value.toFixed(decimals(value));
const probability = (p) => (p === null ? "" : p < 0.001 ? "< 0.001" : p.toFixed(3));
const seedsOf = (contrast) => `${contrast.n} seed${contrast.n > 1 ? "s" : ""}`;
const interval = (contrast, digits = 2) => `[${signed(contrast.low, digits)}, ${signed(contrast.high, digits)}]`;
const SIGNIFICANT = 0.05;
const confidence = `${+(100 * data.bootstrap.confidence).toFixed(3)} %`;
const isSure = (contrast) => contrast && contrast.p_holm !== null && contrast.p_holm < SIGNIFICANT;
const leavesZeroOut = (contrast) => contrast.low > 0 || contrast.high < 0;

/* What the filters let through decides what every part shows. */

const state = { text: "", choices: new Map(), sort: null, descending: false };
const listeners = [];
function isShown(row) {
  for (const [key, value] of state.choices) if (value !== "" && String(row.settings[key]) !== value) return false;
  const text = [row.label, ...Object.values(row.settings)].join(" ").toLowerCase();
  return state.text.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}
const refresh = () => listeners.forEach((listener) => listener());

const coloured = data.rows.filter((row) => row.score.mean !== null);
const colourOf = (row) => COLOURS[coloured.indexOf(row)] ?? "#888888";

/* Tooltip, for the mouse and for the keyboard. */

const tooltip = byId("tooltip");
function explain(node, text) {
  const show = (event) => {
    tooltip.textContent = text;
    tooltip.hidden = false;
    const box = node.getBoundingClientRect();
    const [x, y] = event.clientX === undefined || event.type === "focus" ? [box.right, box.bottom] : [event.clientX, event.clientY];
    tooltip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tooltip.offsetWidth - 8))}px`;
    tooltip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - tooltip.offsetHeight - 8))}px`;
  };
  const hide = () => (tooltip.hidden = true);
  for (const event of ["pointerenter", "pointermove", "focus"]) node.addEventListener(event, show);
  for (const event of ["pointerleave", "blur"]) node.addEventListener(event, hide);
  node.setAttribute("aria-label", text.replaceAll("\n", "; "));
  return node;
}
addEventListener("keydown", (event) => event.key === "Escape" && (tooltip.hidden = true));

/* The configuration under the pointer or with the focus is marked in all parts of the page. */

function mark(event) {
  const label = event.target.closest?.("[data-label]")?.dataset.label;
  document.body.classList.toggle("marking", label !== undefined);
  for (const node of document.querySelectorAll("[data-label]")) node.classList.toggle("marked", node.dataset.label === label);
}
for (const event of ["pointerover", "focusin"]) addEventListener(event, mark);

/* Heading and notes. */

document.title = data.title;
byId("title").textContent = data.title;
const replicates = data.bootstrap.replicates.toLocaleString("en");
byId("summary").textContent =
  `${data.rows.length} configurations on ${data.data.name}, ${data.data.split} split, ${data.data.images} images. ` +
  (baselineRows.length ? `Differences are to ${baselineRows.map((row) => row.label).join("; ")}. ` : "") + `${data.created.slice(0, 10)}.`;
if (data.notes.length) {
  byId("notes").hidden = false;
  byId("notes").querySelector("ul").append(...data.notes.map((note) => el("li", {}, note)));
}

/* The table. */

// Name, unit, and what a value is multiplied with to be in it.
const COSTS = {
  images_per_second: ["images/s", "", 1],
  latency: ["latency", "ms", 1000],
  memory: ["memory", "MiB", 2 ** -20],
  parameters: ["parameters", "million", 1e-6],
  gmacs: ["GMACs", "", 1],
};
const TIMES = ["images_per_second", "latency"]; // marked where the machine was slower than for other rows
/* The mean, and the deviation to the same decimal: one further at most where it would read zero. */
function withDeviation({ mean, sd }, factor, digits = decimals(factor * mean)) {
  if (mean === null) return "";
  // Equal numbers leave a spread of rounding errors, which no further decimal brings out.
  const spreadAt = (places) => (sd === null ? 0 : Number((factor * sd).toFixed(places)));
  if (!spreadAt(digits) && spreadAt(digits + 1)) digits += 1;
  return (factor * mean).toFixed(digits) + (spreadAt(digits) ? ` \u00b1 ${(factor * sd).toFixed(digits)}` : "");
}

function columns() {
  const settings = (data.settings.length ? data.settings : [null]).map((key, index) => ({
    name: key ?? "configuration",
    text: true,
    value: (row) => (key === null ? row.label : row.settings[key] ?? ""),
    cell: (row, value) => [
      String(value),
      index === 0 && row.baseline ? el("span", { class: "sub" }, "baseline") : null,
      ...(index === 0 ? unfinished(row) : []),
    ],
  }));
  const scores = [
    {
      name: data.metric, unit: "%", value: (row) => row.score.mean,
      cell: (row) => [withDeviation(row.score, 100, 2), el("span", { class: "sub" }, `${row.score.n} of ${row.jobs.length} runs`)],
    },
  ];
  if (data.rows.some((row) => row.contrast)) {
    scores.push(
      {
        name: "difference", unit: `points, ${confidence} interval`, value: (row) => row.contrast?.difference ?? null,
        cell: (row) => row.contrast && [
          el("span", { class: isSure(row.contrast) ? "significant" : null }, signed(row.contrast.difference)),
          el("span", { class: "sub" }, interval(row.contrast) + (row.contrast.n === 1 ? ", images only" : "")),
          row.seeds_to_decide ? el("span", { class: "sub" }, `${row.seeds_to_decide} seeds would show it`) : null,
        ],
      },
      { name: "p", unit: "Holm", value: (row) => row.contrast?.p_holm ?? null, cell: (row, value) => [probability(value)] },
    );
  }
  const strata = Object.keys(data.strata).map((name) => ({
    name, unit: `${data.metric}, %`, title: data.strata[name],
    value: (row) => row.strata[name]?.score.mean ?? null,
    cell: (row, value) => [
      points(value),
      row.strata[name].contrast ? el("span", { class: "sub" }, signed(row.strata[name].contrast.difference)) : null,
    ],
  }));
  const costs = Object.entries(COSTS).map(([key, [name, unit, factor]]) => ({
    name, unit, value: (row) => row.cost[key]?.mean ?? null, cell: (row) => [withDeviation(row.cost[key], factor) + (row.slowed && TIMES.includes(key) ? " \u2020" : "")],
  }));
  return [...settings, ...scores, ...strata, ...costs];
}

/* What is not there, and why: a line for all seeds to which the same happened. */
function unfinished(row) {
  const seeds = new Map();
  for (const job of row.jobs.filter((job) => job.state !== "finished")) {
    const what = `${job.state}${job.reason ? `: ${job.reason}` : ""}`;
    seeds.set(what, [...(seeds.get(what) ?? []), job.seed ?? "?"]);
  }
  return [...seeds].map(([what, which]) => el("span", { class: "sub lacking" }, `seed${which.length > 1 ? "s" : ""} ${which.join(", ")} ${what}`));
}

const COLUMNS = columns();
function drawHead() {
  const cells = COLUMNS.map((column, index) => {
    const order = state.sort === index ? (state.descending ? "descending" : "ascending") : "none";
    const unit = column.unit ? el("span", { class: "unit" }, column.unit) : null;
    const sort = () => {
      // Numbers are looked at from their largest.
      state.descending = state.sort === index ? !state.descending : !column.text;
      state.sort = index;
      refresh();
      byId("rows").querySelectorAll("thead button")[index].focus();
    };
    return el(
      "th", { scope: "col", class: column.text ? "text" : null, "aria-sort": order, title: column.title },
      el("button", { type: "button", onclick: sort }, el("span", { class: "name" }, column.name), unit),
    );
  });
  byId("rows").querySelector("thead").replaceChildren(el("tr", {}, ...cells));
}

function sorted(rows) {
  if (state.sort === null) return rows;
  const { value } = COLUMNS[state.sort];
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  return [...rows].sort((first, second) => {
    const [a, b] = [value(first), value(second)];
    if (a === null || b === null) return (a === null) - (b === null); // the unknown last, in either direction
    return state.descending ? compare(b, a) : compare(a, b);
  });
}

function drawRows() {
  const shown = sorted(data.rows.filter(isShown));
  const rows = shown.map((row) =>
    el("tr", { "data-label": row.label }, ...COLUMNS.map((column) => {
      const value = column.value(row);
      const content = value === null ? null : column.cell(row, value);
      return el("td", { class: column.text ? "text" : null }, ...(content ?? [""]));
    })),
  );
  if (!rows.length) rows.push(el("tr", { class: "empty" }, el("td", { colspan: COLUMNS.length }, "No configuration matches.")));
  byId("rows").querySelector("tbody").replaceChildren(...rows);
}

function drawFilters() {
  const text = el("input", { type: "search", oninput: (event) => { state.text = event.target.value.trim(); refresh(); } });
  const selects = data.settings.map((key) => {
    const values = [...new Set(data.rows.map((row) => String(row.settings[key])))];
    const choose = (event) => { state.choices.set(key, event.target.value); refresh(); };
    const options = [el("option", { value: "" }, "all"), ...values.map((value) => el("option", { value }, value))];
    return el("label", {}, key, el("select", { onchange: choose, "data-key": key }, ...options));
  });
  byId("filters").append(el("label", {}, "Filter", text), ...selects);
}

const batches = [...new Set(data.rows.map((row) => row.cost_batch_size).filter(Boolean))];
byId("table-note").textContent =
  `${data.metric}: mean \u00b1 standard deviation over the seeds. ` +
  (baselineRows.length ? `Difference: paired by seed and image; the interval covers both (${replicates} replicates of the images); bold where p, corrected for the number of rows, is below ${SIGNIFICANT}. ` : "") +
  (data.rows.some((row) => row.slowed) ? "\u2020: the machine was slower than for other rows. " : "") +
  (batches.length ? `Speed, latency and memory: of the forward pass, batch ${batches.join(" or ")}. ` : "") +
  Object.entries(data.strata).map(([name, text]) => `${name}: ${text}`).join("; ") + ".";

/* Claims. */

const VERDICTS = { supported: "better", contradicted: "worse", undecided: "" };
for (const claim of data.shown_claims) {
  const head = ["contrast", "quantity", "difference", "seeds", "p (Holm)", "verdict"].map((name, index) =>
    el("th", { scope: "col", class: index < 2 ? "text" : null }, name));
  const rows = claim.evidence.map((evidence) => el("tr", { class: evidence.decides ? null : "aside" },
    ...evidence.cells.map((cell, index) => el("td", { class: index < 2 ? "text" : null }, cell))));
  byId("claims").append(el("div", { class: "claim" },
    el("p", {}, `${claim.claim} `, el("span", { class: `verdict ${VERDICTS[claim.verdict]}` }, claim.text)),
    rows.length ? el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": claim.claim },
      el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows))) : null,
    claim.missing.length ? el("p", { class: "small" }, `Missing: ${claim.missing.join("; ")}.`) : null));
}
byId("claims").hidden = !data.shown_claims.length;

/* Scores beyond the mIoU. */

const measures = Object.entries(data.measures).filter(([, measure]) => measure.main);
if (measures.length) byId("further-section").hidden = false;
function furtherCell(row, key, measure) {
  const [factor, digits] = measure.percent ? [1, 2] : [0.01, 4];
  const { score, contrast } = row.further[key];
  if (score.mean === null) return el("td", {});
  const parts = [points(factor * score.mean, digits)];
  if (contrast) {
    const difference = el("span", { class: isSure(contrast) ? "significant" : null }, signed(factor * contrast.difference, digits));
    parts.push(el("span", { class: "sub" }, difference, ` ${interval({ low: factor * contrast.low, high: factor * contrast.high }, digits)}`));
  }
  return el("td", {}, parts);
}
function drawFurther() {
  const unit = (measure) => `${measure.percent ? "%, " : ""}${measure.higher_is_better ? "higher" : "lower"} is better`;
  const head = measures.map(([, measure]) => el("th", { scope: "col" }, measure.label, el("span", { class: "unit" }, unit(measure))));
  byId("further").querySelector("thead").replaceChildren(el("tr", {}, el("th", { scope: "col", class: "text" }, "configuration"), ...head));
  const rows = data.rows.filter(isShown).map((row) =>
    el("tr", { "data-label": row.label }, el("td", { class: "text" }, row.label), ...measures.map(([key, measure]) => furtherCell(row, key, measure))));
  byId("further").querySelector("tbody").replaceChildren(...rows);
}
if (measures.length) listeners.push(drawFurther);

drawFilters();
listeners.push(drawHead, drawRows);

/* Plots: SVG as wide as its place, so that its text is as large as the page's. */

const widthOf = (id) => Math.max(300, byId(id).clientWidth);
addEventListener("resize", refresh);
function ticks(low, high, count = 5) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const first = Math.ceil(low / step - 1e-9);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, index) => [(first + index) * step, ((first + index) * step).toFixed(digits).replace("-", MINUS)]);
}
function range(values, margin = 0.08) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const spread = high - low || Math.abs(high) * 0.1 || 1;
  return [low - margin * spread, high + margin * spread];
}
const scale = ([low, high], from, to) => (value) => from + ((value - low) / (high - low)) * (to - from);

function frame(width, height, xRange, yRange, xLabel, yLabel) {
  const [left, right, top, bottom] = [52, width - 10, 10, height - 42];
  const [x, y] = [scale(xRange, left, right), scale(yRange, bottom, top)];
  const grid = [
    ...ticks(...xRange).flatMap(([value, text]) => [
      svg("line", { class: "axis", x1: x(value), x2: x(value), y1: top, y2: bottom }),
      svg("text", { class: "tick", x: x(value), y: bottom + 16, "text-anchor": "middle" }, text),
    ]),
    ...ticks(...yRange).flatMap(([value, text]) => [
      svg("line", { class: "axis", x1: left, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, text),
    ]),
    svg("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel),
    svg("text", { x: 12, y: (top + bottom) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(top + bottom) / 2})` }, yLabel),
  ];
  return { x, y, node: svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group" }, ...grid), right, left, top, bottom };
}

function drawPareto() {
  const rows = data.rows.filter((row) => row.score.mean !== null && row.cost.images_per_second?.mean);
  if (!rows.length) return byId("pareto").replaceChildren("No configuration is finished.");
  const spread = (summary) => [summary.mean - (summary.sd ?? 0), summary.mean + (summary.sd ?? 0)];
  const speed = (row) => row.cost.images_per_second;
  const plot = frame(
    widthOf("pareto"), 360, range(rows.flatMap((row) => spread(speed(row)))), range(rows.flatMap((row) => spread(row.score).map((value) => 100 * value))),
    "images/s", `${data.metric}, %`,
  );
  const { x, y } = plot;
  const shown = rows.filter(isShown);
  const best = shown.filter((row) => !shown.some((other) =>
    other.score.mean >= row.score.mean && speed(other).mean >= speed(row).mean && (other.score.mean > row.score.mean || speed(other).mean > speed(row).mean)));
  best.sort((a, b) => speed(a).mean - speed(b).mean);
  // From the slow and accurate to the fast: at each speed the best that is at least as fast.
  const steps = best.map((row, index) => (index ? `V${y(100 * row.score.mean)}H${x(speed(row).mean)}` : `M${x(speed(row).mean)} ${y(100 * row.score.mean)}`)).join("");
  if (best.length > 1) plot.node.append(svg("path", { class: "front", d: steps }));
  const taken = rows.flatMap((row) => {
    const [[x1, x2], [y1, y2]] = [spread(speed(row)).map(x), spread(row.score).map((value) => y(100 * value))];
    const [cx, cy] = [x(speed(row).mean), y(100 * row.score.mean)];
    return [[cx - 6, cy - 6, 12, 12], [x1, cy - 1, x2 - x1, 2], [cx - 1, y2, 2, y1 - y2]];
  });
  for (const row of rows) {
    const [cx, cy] = [x(speed(row).mean), y(100 * row.score.mean)];
    const [x1, x2] = spread(speed(row)).map(x);
    const [y1, y2] = spread(row.score).map((value) => y(100 * value));
    const dot = row.baseline
      ? svg("rect", { class: "dot", x: cx - 5, y: cy - 5, width: 10, height: 10, fill: colourOf(row), transform: `rotate(45 ${cx} ${cy})` })
      : svg("circle", { class: "dot", cx, cy, r: 5.5, fill: colourOf(row) });
    const group = svg(
      "g", { class: isShown(row) ? "point" : "point faded", tabindex: isShown(row) ? 0 : -1, role: "img", "data-label": row.label },
      svg("line", { x1, x2, y1: cy, y2: cy, stroke: colourOf(row) }), svg("line", { x1: cx, x2: cx, y1, y2, stroke: colourOf(row) }),
      dot, label(row.label, cx, cy, taken, plot),
    );
    plot.node.append(explain(group, summarise(row)));
  }
  byId("pareto").replaceChildren(plot.node);
}

/* A label beside its point, at the first of eight places where it covers nothing; without one it is left to the tooltip. */
function label(text, cx, cy, taken, plot) {
  const width = 6.6 * text.length;
  const places = [[9, 4], [-9 - width, 4], [-width / 2, -10], [-width / 2, 19], [7, -8], [7, 16], [-7 - width, -8], [-7 - width, 16]];
  for (const [dx, dy] of places) {
    const box = [cx + dx, cy + dy - 10, width, 13];
    const inside = box[0] > plot.left && box[0] + width < plot.right && box[1] > plot.top && box[1] + 13 < plot.bottom;
    const free = taken.every(([left, top, w, h]) => box[0] + box[2] <= left || left + w <= box[0] || box[1] + box[3] <= top || top + h <= box[1]);
    if (inside && free) {
      taken.push(box);
      return svg("text", { x: cx + dx, y: cy + dy }, text);
    }
  }
  return null;
}

function summarise(row) {
  const lines = [row.label, `${data.metric} ${withDeviation(row.score, 100, 2)} % (n = ${row.score.n})`];
  if (row.contrast) lines.push(`${signed(row.contrast.difference)} points to ${row.contrast.baseline}, ${interval(row.contrast)}`);
  for (const [key, [name, unit, factor]] of Object.entries(COSTS)) {
    if (row.cost[key]?.mean != null) lines.push(`${name} ${withDeviation(row.cost[key], factor)} ${unit}`.trim());
  }
  return lines.join("\n");
}

function drawForest() {
  const rows = data.rows.filter((row) => row.contrast && isShown(row));
  byId("forest-section").hidden = !data.rows.some((row) => row.contrast);
  if (!rows.length) return byId("forest").replaceChildren("No configuration with a difference matches.");
  const [width, height] = [widthOf("forest"), 58 + 26 * rows.length];
  const longest = Math.min(Math.max(...rows.map((row) => row.label.length)), 28);
  const left = 16 + 6.6 * longest;
  const bounds = range([0, ...rows.flatMap((row) => [100 * row.contrast.low, 100 * row.contrast.high])], 0.04);
  const x = scale(bounds, left, width - 70);
  const node = svg(
    "svg", { viewBox: `0 0 ${width} ${height}`, role: "group" },
    ...ticks(...bounds).flatMap(([value, text]) => [
      svg("line", { class: value === 0 ? "zero" : "axis", x1: x(value), x2: x(value), y1: 6, y2: height - 40 }),
      svg("text", { class: "tick", x: x(value), y: height - 24, "text-anchor": "middle" }, text),
    ]),
    svg("text", { x: (left + width - 70) / 2, y: height - 5, "text-anchor": "middle" }, `difference of ${data.metric}, points`),
    svg("text", { class: "tick", x: width - 6, y: height - 24, "text-anchor": "end" }, "p (Holm)"),
  );
  rows.forEach((row, index) => {
    const y = 20 + 26 * index;
    const { contrast } = row;
    const short = row.label.length > 28 ? `${row.label.slice(0, 27)}\u2026` : row.label;
    const hollow = contrast.n === 1;
    const group = svg(
      "g", { class: "point", tabindex: 0, role: "img", "data-label": row.label },
      svg("text", { x: left - 10, y: y + 4, "text-anchor": "end" }, short),
      svg("line", { x1: x(100 * contrast.low), x2: x(100 * contrast.high), y1: y, y2: y, stroke: colourOf(row), "stroke-width": 2, "stroke-dasharray": hollow ? "4 3" : null }),
      svg("circle", { class: "dot", cx: x(100 * contrast.difference), cy: y, r: 5, fill: hollow ? "var(--paper)" : colourOf(row), stroke: colourOf(row), "stroke-width": 2 }),
      svg("text", { x: width - 6, y: y + 4, "text-anchor": "end", "font-weight": isSure(contrast) ? 700 : null }, probability(contrast.p_holm) || "\u2013"),
    );
    node.append(explain(group, summarise(row)));
  });
  byId("forest").replaceChildren(node);
  byId("forest-note").textContent =
    `${confidence} intervals, to ${[...new Set(rows.map((row) => row.contrast.baseline))].join(", ")}.` +
    (rows.some((row) => row.contrast.n === 1) ? " Hollow and dashed: one seed, so that the interval covers the images only." : "");
}
listeners.push(drawPareto, drawForest);

/* Differences by stratum and class. */

function shade(value, largest) {
  const share = Math.min(Math.abs(value) / largest, 1);
  return `color-mix(in oklab, ${value > 0 ? "#2c7fb8" : "#d95f0e"} ${Math.round(75 * share)}%, var(--paper))`;
}
function drawClasses() {
  const rows = data.rows.filter((row) => row.contrast && isShown(row));
  byId("classes-section").hidden = !data.rows.some((row) => row.contrast);
  const strata = Object.keys(data.strata).map((name) => ["strata", name]);
  const parts = [...strata, ...data.classes.map((name) => ["classes", name])];
  const cell = (row, [part, name]) => row[part][name];
  const values = rows.flatMap((row) => parts.map((part) => Math.abs(cell(row, part)?.contrast?.difference ?? 0)));
  const largest = Math.max(...values, 1e-9);
  const head = parts.map(([, name], index) => el("th", { scope: "col", class: index === strata.length ? "first" : null }, el("span", {}, name)));
  const body = rows.map((row) =>
    el("tr", { "data-label": row.label }, el("th", { scope: "row", title: row.label }, row.label), ...parts.map((part, index) => {
      const found = cell(row, part);
      const first = index === strata.length ? "first" : "";
      if (!found?.contrast) return el("td", { class: first, title: `${row.label}, ${part[1]}: not known` }, "\u2013");
      const { contrast, score } = found;
      const text = `${row.label}, ${part[1]}\nIoU ${points(score.mean)} %\n${signed(contrast.difference)} points, ${interval(contrast)}, ${seedsOf(contrast)}`;
      const node = el(
        "td", { class: `${first} ${leavesZeroOut(contrast) ? "sure" : ""}`, style: `background:${shade(contrast.difference, largest)}` },
        signed(contrast.difference, 1),
      );
      return explain(node, text);
    })),
  );
  byId("classes").querySelector("thead").replaceChildren(el("tr", {}, el("th"), ...head));
  byId("classes").querySelector("tbody").replaceChildren(...body);
}
listeners.push(drawClasses);

/* Curves. */

const CURVES = { "val/miou": ["validation mIoU, %", 100], "train/loss": ["training loss", 1] };
const curveNames = [...new Set(data.rows.flatMap((row) => Object.keys(row.curves)))].filter((name) => name !== "epoch");
curveNames.sort((a, b) => (b in CURVES) - (a in CURVES) || (b === "val/miou") - (a === "val/miou") || a.localeCompare(b));
const hiddenCurves = new Set();
let curveName = curveNames[0];
function drawCurves() {
  byId("curves-section").hidden = !curveNames.length;
  if (!curveNames.length) return;
  const available = data.rows.filter((row) => row.curves[curveName] && isShown(row));
  const choose = el("select", { onchange: (event) => { curveName = event.target.value; drawCurves(); } },
    ...curveNames.map((name) => el("option", { value: name, selected: name === curveName }, CURVES[name]?.[0] ?? name)));
  const boxes = available.map((row) => {
    const toggle = (event) => { hiddenCurves[event.target.checked ? "delete" : "add"](row.label); drawCurves(); };
    return el("label", {}, el("input", { type: "checkbox", checked: !hiddenCurves.has(row.label), onchange: toggle }),
      el("span", { class: "swatch", style: `background:${colourOf(row)}` }), row.label);
  });
  byId("curve-controls").replaceChildren(el("label", {}, "Show", choose), ...boxes);
  const rows = available.filter((row) => !hiddenCurves.has(row.label));
  if (!rows.length) return byId("curves").replaceChildren("No configuration is chosen.");
  const [title, factor] = CURVES[curveName] ?? [curveName, 1];
  const all = rows.map((row) => row.curves[curveName]);
  const epochs = all.flatMap((curve) => curve.epoch.map((epoch) => epoch + 1));
  const plot = frame(widthOf("curves"), 360, range(epochs, 0.02), range(all.flatMap((curve) => [...curve.low, ...curve.high]).map((value) => factor * value), 0.04), "epoch", title);
  rows.forEach((row, index) => {
    const curve = all[index];
    const at = (values) => values.map((value, place) => `${plot.x(curve.epoch[place] + 1)},${plot.y(factor * value)}`);
    const last = curve.mean.length - 1;
    if (last === 0) plot.node.append(svg("circle", { cx: plot.x(curve.epoch[0] + 1), cy: plot.y(factor * curve.mean[0]), r: 3, fill: colourOf(row) }));
    plot.node.append(
      svg("polygon", { points: [...at(curve.high), ...at(curve.low).reverse()].join(" "), fill: colourOf(row), opacity: 0.15 }),
      explain(svg("polyline", { points: at(curve.mean).join(" "), fill: "none", stroke: colourOf(row), "stroke-width": 2, "data-label": row.label }),
        `${row.label}\n${title}: ${(factor * curve.mean[last]).toPrecision(4)} at epoch ${curve.epoch[last] + 1}`),
    );
  });
  byId("curves").replaceChildren(plot.node);
}
listeners.push(drawCurves);

/* Two predictions of one image, wiped between. */

const view = { row: null, kind: "best", wipe: 50, opacity: 65, truth: false };
function drawExample() {
  const labels = [...new Set(data.examples.map((example) => example.row))];
  byId("examples-section").hidden = !labels.length;
  if (!labels.length) return;
  view.row ??= labels[0];
  const kinds = data.examples.filter((example) => example.row === view.row).map((example) => example.kind);
  const kind = kinds.includes(view.kind) ? view.kind : kinds[0];
  const example = data.examples.find((candidate) => candidate.row === view.row && candidate.kind === kind);
  const choose = (change) => (event) => { change(event.target); drawExample(); };
  const names = { best: "gains most", worst: "loses most" };
  byId("example-controls").replaceChildren(
    el("label", {}, "Configuration", el("select", { id: "example-row", onchange: choose((target) => (view.row = target.value)) },
      ...labels.map((name) => el("option", { value: name, selected: name === view.row }, name)))),
    ...kinds.map((name) => el("label", {}, el("input", { type: "radio", name: "kind", value: name, checked: name === kind, onchange: choose(() => (view.kind = name)) }), names[name] ?? name)),
    el("label", {}, "Masks", el("input", { type: "range", id: "opacity", min: 0, max: 100, value: view.opacity, oninput: (event) => { view.opacity = Number(event.target.value); place(); } })),
    example.files.truth ? el("label", {}, el("input", { type: "checkbox", id: "truth", checked: view.truth, onchange: choose((target) => (view.truth = target.checked)) }), "truth instead of the baseline") : "",
  );
  byId("example-caption").textContent =
    `${example.name}: ${data.metric} of the image ${signed(example.difference)} points against ${example.baseline}` +
    (example.seed === null ? "." : `, mean of the seeds; shown is seed ${example.seed}.`);

  const picture = (key, description) => example.files[key] && el("img", { src: data.pictures[example.files[key]], alt: description, class: key === "image" ? null : "mask", draggable: "false" });
  const photograph = picture("image", `photograph ${example.name}`);
  const showsTruth = view.truth && example.files.truth;
  const left = picture(showsTruth ? "truth" : "baseline", showsTruth ? "truth" : `prediction of ${example.baseline}`);
  const right = picture("prediction", `prediction of ${example.row}`);
  if (!left || !right) return byId("example").replaceChildren("The predicted masks are not there.");
  const edge = el("div", { class: "edge" });
  const frameNode = el("div", { class: "wipe", id: "wipe" }, photograph, left, right, edge,
    el("span", { class: "side left" }, showsTruth ? "truth" : example.baseline), el("span", { class: "side right" }, example.row));
  const slider = el("input", { type: "range", id: "slider", class: "wide", min: 0, max: 100, value: view.wipe, "aria-label": "Wipe between the two predictions", oninput: (event) => { view.wipe = Number(event.target.value); place(); } });
  function place() {
    const share = `${view.wipe}%`;
    left.style.clipPath = `inset(0 calc(100% - ${share}) 0 0)`;
    right.style.clipPath = `inset(0 0 0 ${share})`;
    edge.style.left = share;
    slider.value = view.wipe;
    // Without a photograph below, masks that let through would show nothing else.
    for (const mask of [left, right]) mask.style.opacity = photograph ? view.opacity / 100 : 1;
  }
  const drag = (event) => {
    if (event.type === "pointermove" && !event.buttons) return;
    const box = frameNode.getBoundingClientRect();
    view.wipe = Math.round(Math.max(0, Math.min(100, (100 * (event.clientX - box.left)) / box.width)));
    place();
  };
  frameNode.addEventListener("pointerdown", (event) => { frameNode.setPointerCapture(event.pointerId); drag(event); });
  frameNode.addEventListener("pointermove", drag);
  byId("example").replaceChildren(frameNode, slider);
  place();
}
byId("legend").append(...data.classes.map((name, index) =>
  el("li", {}, el("i", { style: `background:rgb(${data.palette[index].join(",")})` }), name)));

/* Where it comes from. */

const several = (values) => values.join(", ");
const environment = data.environment;
byId("environment").textContent = [
  environment.devices?.length ? `Measured on ${several(environment.devices)}` : null,
  Object.entries(environment.packages ?? {}).map(([name, versions]) => `${name} ${several(versions)}`).join(", "),
  environment.python?.length ? `Python ${several(environment.python)}` : null,
  environment.commits?.length ? `commit ${several(environment.commits.map((commit) => commit.replace(/^[0-9a-f]{40}/, (hash) => hash.slice(0, 12))))}` : null,
].filter(Boolean).join("; ") + ".";

refresh();
drawExample();
