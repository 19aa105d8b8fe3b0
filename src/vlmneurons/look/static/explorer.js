// The explorer's views. Data come as scripts that call vn(name, data): a page opened from disk cannot fetch.
// Every text of the study is put into the page as text (textContent), never as markup.
"use strict";
const store = new Map(), waiting = new Map();
window.vn = (name, data) => store.set(name, data);
function load(name) {
  if (store.has(name)) return Promise.resolve(store.get(name));
  if (!waiting.has(name)) waiting.set(name, new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onload = () => store.has(name) ? done(store.get(name)) : failed(new Error(`data/${name}.js is damaged`));
    script.onerror = () => { waiting.delete(name); failed(new Error(`data/${name}.js is not there`)); };
    document.head.append(script);
  }));
  return waiting.get(name);
}

// -- numbers ----------------------------------------------------------------------------------------------------------
// As vlmneurons.look.numbers prints them, text for text: what is said of a function stands there.

const withMinus = text => text.replaceAll("-", "−");
function fixed(value, digits) {
  const text = value.toFixed(digits);
  // toFixed takes a number that lies exactly between two away from 0, Python to the even one. A number lies exactly
  // between two of so many decimals if it has one binary place more than that.
  const between = Number.isInteger(value * 2 ** (digits + 1)) && !Number.isInteger(value * 2 ** digits);
  return between && Number(text.at(-1)) % 2 ? (value - Math.sign(value) * 0.5 * 10 ** -digits).toFixed(digits) : text;
}
// A number with so many digits, and all before the point, without zeros at the end of its decimals.
function shortest(value, digits) {
  const exponent = value ? Number(value.toExponential().split("e")[1]) : 0;
  const text = fixed(value, Math.max(digits - 1 - exponent, 0));
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}
function printed(value, digits = 1) {
  if (value === null || !Number.isFinite(value)) return "–";
  value = Number(value.toFixed(9));
  const text = fixed(value, digits);
  return Number(text) !== 0 ? withMinus(text) : value ? withMinus(shortest(value, 1)) : fixed(0, digits);
}
function inMatrix(value, digits) {
  const text = fixed(value, digits);
  return Number(text) === 0 ? fixed(0, value ? digits : 0) : withMinus(text);
}
function significant(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (value === 0 || Math.abs(value) >= 1e-4) return withMinus(shortest(value, digits));
  const rounded = Number(value.toPrecision(digits));
  return withMinus(Math.abs(rounded) < 1e-4 ? rounded.toExponential().replace(/e-(\d)$/, "e-0$1") : String(rounded));
}

// -- building pages ---------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter(child => child !== undefined && child !== null));
  return node;
}
const link = (parts, query = {}) => {
  const text = new URLSearchParams(query).toString();
  return `#/${parts.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
};
const sign = text => text.startsWith("−") || text === "–" || Number(text) === 0 ? text : `+${text}`;
const choose = (name, options, chosen, then) => make("label", {}, name, make("select", { "data-switch": name, onchange: event => then(event.target.value) },
  options.map(([value, text]) => make("option", { value, selected: String(value) === String(chosen) }, text))));
const plural = (n, name, several = `${name}s`) => `${n.toLocaleString("en")} ${n === 1 ? name : several}`;

// Values by name: what a switch calls them, what they are multiplied by, and decimals in a cell and in an interval.
const VALUES = { correct: ["accuracy, points", 100, 0, 1], margin: ["margin, nats", 1, 1, 2] };
const CONDITIONS = { all: "all questions", correct: "answered right without a mask", wrong: "answered wrong without a mask" };

// -- the matrix ---------------------------------------------------------------------------------------------------------

async function matrixView(study, _, query) {
  const chosen = { s: query.s ?? study.main, v: query.v ?? "correct", c: query.c ?? "all" };
  const s = study.selectors.findIndex(selector => selector.name === chosen.s);
  if (s < 0) throw new Error(`there is no selector ${chosen.s}`);
  const { masks, columns, cells } = await load(`matrix/${s}`);
  const table = cells[`${chosen.v} ${chosen.c}`];
  if (!table) throw new Error(`there is no value ${chosen.v} of ${chosen.c}`);
  const most = Math.max(1e-9, ...table.effect.flat().filter(value => value !== null).map(Math.abs));
  const [unit, scale, inCell, inText] = VALUES[chosen.v], shown = value => printed(value === null ? null : scale * value, inText);
  const go = (name, value) => { location.hash = link([], { ...chosen, [name]: value }); };
  const detail = make("p", { class: "detail", id: "detail" }, "Point at a cell, or walk with the arrow keys: its interval stands here.");
  const say = (row, column) => {
    const [n, units, changed] = table.n[row][column];
    const bounds = table.low[row][column] === null ? "too few for an interval" :
      `95 % interval ${shown(table.low[row][column])} to ${shown(table.high[row][column])}`;
    detail.textContent = `Neurons of ${masks[row]} off, questions about ${columns[column]}: ${sign(shown(table.effect[row][column]))} ` +
      `(${unit}); ${bounds}; ${plural(n, "question")} about ${plural(units, "picture")}, ${changed} with an effect.`;
  };
  const body = masks.map((mask, row) => make("tr", {},
    make("th", { scope: "row", title: mask }, study.selectors[s].groups.includes(mask) ? make("a", { href: link(["group", chosen.s, mask]) }, mask) : mask),
    columns.map((group, column) => {
      const value = table.effect[row][column];
      if (value === null) return make("td", { title: "not asked" });
      const strength = Math.abs(value) / most;
      return make("td", { class: mask === group ? "own" : undefined }, make("a", {
        href: link(["cell", chosen.s, mask, group]), "data-at": `${row},${column}`,
        // Letters that are read on the colour: white on the fullest blue; on a dark page, black on strong colours.
        class: `${strength > (value < 0 ? 0.73 : 0.68) ? "strong" : ""} ${value > 0 && strength > 0.93 ? "full" : ""}`,
        "aria-label": `${mask} on ${group}: ${shown(value)}`,
        style: `background-image:linear-gradient(rgba(var(${value < 0 ? "--harm" : "--gain"}),${strength.toFixed(3)}) 0 0)`,
        onmouseenter: () => say(row, column), onfocus: () => say(row, column), onkeydown: walk,
      }, inMatrix(scale * value, inCell)));
    })));
  return [
    make("h1", {}, study.title),
    make("p", { class: "soft" }, study.about),
    make("div", { class: "switches" },
      choose("Selector", study.selectors.map(selector => [selector.name, selector.name]), chosen.s, value => go("s", value)),
      choose("Value", Object.entries(VALUES).filter(([name]) => study.values.includes(name)).map(([name, [text]]) => [name, text]), chosen.v, value => go("v", value)),
      choose("Questions", Object.entries(CONDITIONS), chosen.c, value => go("c", value))),
    make("p", {}, "Change when the neurons of one group (rows) are switched off and questions about a group (columns) are asked: ",
      make("b", { class: "harm" }, "orange is harm"), ", ", make("b", { class: "gain" }, "blue is gain"), ". A cell opens the questions whose answers changed, a row's name its neurons."),
    detail,
    make("div", { class: "scroll" }, make("table", { class: "matrix" },
      make("thead", {}, make("tr", {}, make("td", { style: "background:none" }), columns.map(name => make("th", { scope: "col", title: name }, make("span", {}, name))))),
      make("tbody", {}, body))),
  ];
}
function walk(event) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  const [row, column] = event.currentTarget.dataset.at.split(",").map(Number);
  const next = document.querySelector(`[data-at="${row + step[0]},${column + step[1]}"]`);
  if (next) { event.preventDefault(); next.focus(); }
}

// -- a cell: the questions whose answers changed --------------------------------------------------------------------------

// Options stand in the order, and bear the letters, with which the model saw them.
const letter = (question, n) => n < 0 ? "no option" : String.fromCharCode(65 + question.order.indexOf(n));
function pictures(study, numbers, small = true) {
  if (!numbers.length) return null;
  return make("div", { class: small ? "thumbs small" : "thumbs" }, numbers.map(n => make("figure", {},
    make("img", { class: "thumb", src: `thumbs/${n}.webp`, alt: "picture of the question", loading: "lazy" }))));
}
function optionList(question, marks) {
  return make("ul", {}, question.order.map(n => make("li", { class: n === question.answer ? "right" : undefined, dir: "auto" },
    `${letter(question, n)}. ${question.options[n]}${n === question.answer ? " (right)" : ""}${marks.filter(([at]) => at === n).map(([, say]) => ` ← ${say}`).join("")}`)));
}
async function cellView(study, [name, mask, group], query) {
  const s = study.selectors.findIndex(selector => selector.name === name), g = study.groups.indexOf(group);
  const { masks } = s < 0 ? { masks: [] } : await load(`matrix/${s}`);
  const m = masks.indexOf(mask);
  if (g < 0 || m < 0) throw new Error(`there is no cell of ${name}: ${mask} on ${group}`);
  const [changed, questions] = await Promise.all([load(`changed/${s}-${m}`), load(`questions/${g}`)]);
  const all = (changed[g] ?? []).map(([at, repeat, chosen, margin]) => ({ ...questions[at], repeat, chosen, after: margin }));
  const kinds = {
    harm: ["right → wrong", change => change.clean === change.answer], gain: ["wrong → right", change => change.chosen === change.answer],
    other: ["wrong → other wrong", change => change.clean !== change.answer && change.chosen !== change.answer],
  };
  const kind = query.k ?? "", shown = kind ? all.filter(kinds[kind][1]) : all;
  const most = Number(query.n ?? 50);
  const cards = shown.slice(0, most).map(change => {
    const [name, [text]] = Object.entries(kinds).find(([, [, fits]]) => fits(change));
    const margins = change.margin === null ? "" : ` Margin ${printed(change.margin, 2)} → ${printed(change.after, 2)} nats.`;
    return make("article", { class: "card", id: change.id }, pictures(study, change.pictures), make("div", {},
      make("div", { dir: "auto" }, change.text),
      optionList(change, [[change.clean, "before"], [change.chosen, "under the mask"]]),
      make("div", { class: `soft` }, make("b", { class: name }, text), `. Before ${letter(change, change.clean)}, under the mask ${letter(change, change.chosen)}.${margins} `,
        change.repeat ? `Repeat ${change.repeat}. ` : "", change.id)));
  });
  const go = changes => { location.hash = link(["cell", name, mask, group], { ...query, ...changes }); };
  return [
    make("h1", {}, `${mask} off, questions about ${group}`),
    make("p", {}, `${plural(all.length, "answer")} changed under ${name}. `, study.selectors[s].groups.includes(mask) ?
      make("a", { href: link(["group", name, mask]) }, `The neurons of ${mask}`) : null),
    make("div", { class: "switches" }, choose("Changes", [["", `all (${all.length})`], ...Object.entries(kinds).map(([key, [text, fits]]) => [key, `${text} (${all.filter(fits).length})`])], kind, value => go({ k: value }))),
    cards.length ? cards : make("p", {}, "No answer changed here."),
    shown.length > most ? make("button", { onclick: () => go({ n: most + 100 }) }, `Show more (${shown.length - most} left)`) : null,
  ];
}

// -- the neurons of a group -----------------------------------------------------------------------------------------------

const siteName = (study, neuron) => `${study.sites[neuron.site]}[${neuron.number}]`;
function bars(study, firing, group) {
  if (!firing) return "–";
  const most = Math.max(...firing, 1);
  const title = study.firing.map((name, n) => `${name} ${fixed(firing[n] / 10, 1)} %`).join("\n");
  return make("span", { class: "bars", title, role: "img", "aria-label": title }, firing.map((value, n) =>
    make("i", { class: study.firing[n] === group ? "own" : undefined, style: `height:${(100 * value / most).toFixed(1)}%` })));
}
async function groupView(study, [name, group], query) {
  const s = study.selectors.findIndex(entry => entry.name === name), selector = study.selectors[s];
  if (!selector?.groups.includes(group)) throw new Error(`there are no neurons of ${name} for ${group}`);
  const rows = await load(`neurons/${s}-${selector.groups.indexOf(group)}`);
  const sort = query.sort ?? "rank", up = query.up === "1", layer = query.layer ?? "", page = Number(query.page ?? 0), per = 100;
  const column = study.firing.indexOf(group);
  const columns = {
    rank: ["Rank", neuron => neuron.rank, true], site: ["Neuron", neuron => neuron.site * 1e7 + neuron.number, true],
    score: ["Score", neuron => neuron.score ?? -Infinity, false], firing: ["Firing by group", neuron => neuron.firing?.[column] ?? -1, false],
    stability: ["Stability", neuron => neuron.stability ?? -1, false], groups: ["In groups", neuron => neuron.groups, false],
  };
  if (!columns[sort]) throw new Error(`there is no column ${sort}`);
  const kept = rows.filter(neuron => layer === "" || String(study.layers[neuron.site]) === layer);
  const by = columns[sort][1], towards = (query.up === undefined ? columns[sort][2] : up) ? 1 : -1;
  kept.sort((a, b) => towards * (by(a) - by(b)) || a.rank - b.rank);
  const go = changes => { location.hash = link(["group", name, group], { ...query, ...changes }); };
  const layers = [...new Set(rows.map(neuron => study.layers[neuron.site]))].sort((a, b) => a - b);
  const head = Object.entries(columns).map(([key, [text]]) => make("th", { scope: "col", "aria-sort": key === sort ? (towards > 0 ? "ascending" : "descending") : undefined },
    make("button", { "data-sort": key, onclick: () => go({ sort: key, up: key === sort ? (towards > 0 ? "0" : "1") : (columns[key][2] ? "1" : "0"), page: 0 }) },
      text + (key === sort ? (towards > 0 ? " ↑" : " ↓") : ""))));
  const body = kept.slice(per * page, per * (page + 1)).map(neuron => make("tr", {},
    make("td", { class: "n" }, String(neuron.rank)),
    make("td", {}, make("a", { href: link(["neuron", study.sites[neuron.site], neuron.number]) }, siteName(study, neuron)), neuron.shown ? " ▣" : ""),
    make("td", { class: "n" }, significant(neuron.score)),
    make("td", {}, bars(study, neuron.firing, group), " ", make("span", { class: "soft" }, neuron.firing && column >= 0 ? `${fixed(neuron.firing[column] / 10, 1)} %` : "")),
    make("td", { class: "n" }, neuron.stability === null ? "–" : `${neuron.stability} %`),
    make("td", { class: "n" }, String(neuron.groups))));
  return [
    make("h1", {}, `Neurons of ${group} (${name})`),
    make("p", {}, `${plural(rows.length, "neuron")}, by ${selector.rule}. Firing: share of counted tokens at which the neuron is above 0, for each group; the bar of ${group} is orange. `,
      "Stability: share of resamples of the pictures in which the neuron is chosen. ▣: with pictures and words."),
    make("div", { class: "switches" },
      choose("Layer", [["", "all"], ...layers.map(n => [n, `${n} (${rows.filter(neuron => study.layers[neuron.site] === n).length})`])], layer, value => go({ layer: value, page: 0 })),
      kept.length > per ? [page > 0 ? make("button", { onclick: () => go({ page: page - 1 }) }, "Previous") : null,
        make("span", {}, `${per * page + 1}–${Math.min(per * (page + 1), kept.length)} of ${kept.length}`),
        per * (page + 1) < kept.length ? make("button", { onclick: () => go({ page: page + 1 }) }, "Next") : null] : null),
    make("div", { class: "scroll" }, make("table", { class: "rows" }, make("thead", {}, make("tr", {}, head)), make("tbody", {}, body))),
  ];
}

// -- one neuron -------------------------------------------------------------------------------------------------------------

function mapOver(item, map, highest) {
  const canvas = make("canvas", { width: map.columns, height: map.rows, role: "img", "aria-label": "where in the picture the neuron fires" });
  const context = canvas.getContext("2d"), colour = getComputedStyle(document.documentElement).getPropertyValue("--fire");
  map.values.forEach((value, n) => {
    if (value === null) return;
    context.fillStyle = `rgba(${colour},${Math.max(0, value / 63).toFixed(3)})`;
    context.fillRect(n % map.columns, Math.floor(n / map.columns), 1, 1);
  });
  return canvas;
}
function shownItem(study, item, highest) {
  const words = item.words.map(([text, value]) => value === null ? make("span", { class: "off" }, text) :
    make("span", { "data-v": value, title: significant(value), style: `background:rgba(var(--fire),calc(var(--full) * ${Math.min(1, Math.max(0, value / highest)).toFixed(3)}))` }, text));
  const figures = item.pictures.map((n, at) => [false, true].map(over => {
    const map = item.maps.find(heat => heat.picture === at);
    return over && !map ? null : make("figure", {}, make("img", { class: "thumb", src: `thumbs/${n}.webp`, alt: over ? "the same picture under its map" : "picture of the question", loading: "lazy" }), over ? mapOver(item, map, highest) : null);
  }));
  return make("article", { class: "card" }, figures.length ? make("div", { class: "thumbs" }, figures) : null, make("div", {},
    make("div", { class: "soft" }, `${item.group} · highest ${significant(item.value)} · ${item.id}`),
    make("p", { class: "words", dir: "auto" }, words)));
}
async function neuronView(study, [site, number]) {
  const at = study.sites.indexOf(site);
  if (at < 0) throw new Error(`there is no site ${site}`);
  // A site of which no neuron was chosen has no file.
  const { tokens, neurons } = await load(`sites/${at}`).catch(() => ({ tokens: [], neurons: {} })), neuron = neurons[number];
  if (!neuron) throw new Error(`${site}[${number}] is in no selection of this study`);
  const shown = neuron.shown ? await load(`shown/${at}-${number}`) : null;
  const highest = shown ? Math.max(1e-9, ...shown.items.map(item => item.value)) : 1;
  const most = Math.max(1, ...(neuron.firing ?? []));
  return [
    make("h1", {}, `Neuron ${site}[${number}]`),
    make("p", {}, "Chosen by ", neuron.chosen.map(([s, g, rank], n) => [n ? ", " : "", make("a", { href: link(["group", study.selectors[s].name, study.selectors[s].groups[g]]) },
      `${study.selectors[s].name} for ${study.selectors[s].groups[g]}`), ` (rank ${rank})`]), "."),
    neuron.firing ? [make("h2", {}, "How often it fires"), make("div", { class: "hbars" }, study.firing.map((group, n) => [
      make("span", { title: group }, group), make("i", { class: neuron.chosen.some(([s, g]) => study.selectors[s].groups[g] === group) ? "own" : undefined, style: `width:${(100 * neuron.firing[n] / most).toFixed(1)}%` }),
      make("span", { class: "n" }, `${fixed(neuron.firing[n] / 10, 1)} %`)]))] : null,
    neuron.tokens ? [make("h2", {}, "What it writes"), ["Promotes", "Suppresses"].map((name, n) => make("div", {}, make("b", {}, name),
      make("ul", { class: "tokens", "data-tokens": name }, neuron.tokens[n].map(place => make("li", {}, tokens[place].replace(/\n/g, "⏎").replace(/\t/g, "⇥"))))))] : null,
    make("h2", {}, "Where it is highest"),
    shown ? [make("p", { class: "soft" }, `At most ${shown.each} questions of a group, each about another picture, from highest to lowest; ${study.images ? "the redder, the higher" : "pictures are left out of this folder"} (full: ${significant(highest)}). ${shown.note}`), shown.items.map(item => shownItem(study, item, highest))]
      : make("p", {}, "Pictures and words were kept of the strongest neurons of each group only (▣ in the tables)."),
  ];
}

// -- addresses ----------------------------------------------------------------------------------------------------------------

const VIEWS = { "": matrixView, cell: cellView, group: groupView, neuron: neuronView };
let turn = 0, last = null;
async function show() {
  const mine = ++turn, view = document.getElementById("view"), trail = document.getElementById("trail");
  const [path, search = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [kind, ...parts] = path.split("/").map(decodeURIComponent);
  let content, study;
  try {
    study = await load("study");
    if (!VIEWS[kind]) throw new Error(`there is no page ${kind}`);
    content = await VIEWS[kind](study, parts, Object.fromEntries(new URLSearchParams(search)));
  } catch (error) {
    content = [make("h1", {}, "Not here"), make("p", { role: "alert" }, `${error.message}.`), make("p", {}, make("a", { href: "#/" }, "To the matrix"))];
  }
  if (mine !== turn) return;
  const kept = document.activeElement?.dataset ?? {}, attribute = ["switch", "sort"].find(name => kept[name]);
  const selector = attribute && `[data-${attribute}="${kept[attribute]}"]`;
  view.replaceChildren(...content.flat(Infinity).filter(Boolean));
  const steps = { cell: parts.slice(0, 2), group: parts.slice(0, 2), neuron: [] }[kind] ?? [];
  trail.replaceChildren(...(kind ? [make("a", { href: link([], steps[0] ? { s: steps[0] } : {}) }, "Matrix"),
    make("a", { href: location.hash, "aria-current": "page" }, parts.join(" · "))] : []));
  document.title = `${view.querySelector("h1")?.textContent ?? "Explorer"} – ${study?.title ?? "Explorer"}`;
  if (selector && document.querySelector(selector)) document.querySelector(selector).focus();
  else if (last !== null && last !== path) { window.scrollTo(0, 0); view.focus({ preventScroll: true }); }
  last = path;
  document.body.dataset.ready = location.hash;
  performance.mark("ready");
}
window.addEventListener("hashchange", show);
show();
