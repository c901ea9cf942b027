"use strict";
// The form: Ctrl+Enter asks, and while the model is at work the button says so and does not ask again.
(() => {
const form = document.querySelector("form.ask"), button = form?.querySelector("button");
if (!form) return;
const work = busy => { button.disabled = busy; button.textContent = busy ? "at work \u2026" : "Explore"; };
form.addEventListener("submit", event => { if (button.disabled) event.preventDefault(); else work(true); });
form.addEventListener("input", () => work(false));
form.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
window.addEventListener("keydown", event => event.key === "Escape" && work(false));  // which stops loading
window.addEventListener("pageshow", () => work(false));  // a page that the browser kept, when one goes back
})();

// The explorer. Every text that comes from a model or a person is set by textContent.
if (document.getElementById("data")) (() => {
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent), {tokens, maps, carried, said} = data, n = tokens.length;
const make = (parent, name, text = "", kind = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = kind;
  parent.append(made);
  return made;
};

// What is seen. A pin of -1 is none, and so is a layer of -1.
const view = {scope: 0, pin: -1, column: 0, value: "share", colour: "root", bos: 1, template: 0, layer: -1};
let hovered = -1, shift = false, lines = {}, whole = null;

// ---- numbers

const counts = i => !(i === 0 && data.bos && !view.bos) && (view.template || data.parts[i] !== "template");
const row = i => maps[view.scope].rows[i];
const amongst = (scores, counted) => {  // a line of cells: the score, the share, and the share over an even one
  const kept = scores.filter((_, i) => counted(i)), sum = kept.reduce((all, s) => all + Math.abs(s), 0) || 1;
  return scores.map((score, i) => counted(i) ? {score, share: score / sum, even: kept.length * score / sum} : null);
};
const line = i => lines[i] ??= row(i) ? amongst(row(i), counts) : null;
const stands = focus => {  // where the influence of a token, or of all, stands before a layer
  const at = carried.tokens.indexOf(focus);
  const sums = carried.values[view.layer].map(of => at < 0 ? of.reduce((all, v) => all + v, 0) : of[at]);
  return amongst(sums, () => true);
};
const cells = (focus, column) => {
  if (view.layer >= 0) return stands(focus);
  if (!column) return line(focus) ?? [];
  return tokens.map((_, i) => i < focus ? undefined : line(i)?.[focus]);
};

// ---- colours: the scale of tl_scopes.views.palette, which ends below the sinks

const sinks = sizes => {
  let widest = 0, gap = 4;
  for (let i = 1; i < Math.min(4, (sizes.length + 1) >> 1); i++)
    if (sizes[i] > 1e-5 * sizes[0] && sizes[i - 1] / sizes[i] > gap) [widest, gap] = [i, sizes[i - 1] / sizes[i]];
  return widest;
};
const scaleOf = amounts => {
  const sizes = amounts.map(Math.abs).sort((a, b) => b - a), floor = view.colour === "even" ? 1 : 0;
  const apart = sinks(sizes), over = sizes[apart] > floor ? apart : 0;
  return {end: sizes[over] || 0, top: over ? 0.8 : 1, floor, signed: amounts.some(a => a < 0)};
};
const wholeScale = () => {  // of all scores of the map: one in fifty may lie over it
  const amounts = maps[view.scope].rows.flatMap((_, i) => (line(i) ?? []).filter(cell => cell).map(amount));
  const sizes = amounts.map(Math.abs).sort((a, b) => b - a), end = sizes[Math.floor(sizes.length / 50)] || sizes[0];
  return {end: end || 0, top: sizes[0] > end ? 0.8 : 1, floor: 0, signed: amounts.some(a => a < 0)};
};
const amount = cell => cell[view.colour === "even" ? "even" : view.value];
const straight = [x => x, x => x];
const shapes = {
  root: [Math.sqrt, x => x * x],
  log: [x => Math.max(0, 1 + Math.log10(x) / 3), x => x && 10 ** (3 * (x - 1))],
  linear: straight, even: straight,
};
const strength = (value, {end, top, floor}) => {
  const size = Math.abs(value), above = Math.max(0, size - floor);
  const over = size > Math.max(end, floor) * (1 + 1e-9);
  return Math.sign(value) * (over ? 1 : above && top * shapes[view.colour][0](above / (end - floor)));
};
const mix = (ramp, strength) => {
  const place = Math.min(Math.abs(strength), 1) * (ramp.length - 1), i = Math.min(Math.floor(place), ramp.length - 2);
  return ramp[i].map((a, k) => Math.round(a + (ramp[i + 1][k] - a) * (place - i)));
};
const ink = rgb => {  // black or white, whichever is read better
  const [r, g, b] = rgb.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
};
const paint = (element, strength) => {
  const [light, dark] = data.ramps[strength < 0 ? 1 : 0].map(ramp => mix(ramp, strength));
  const both = [`rgb(${light})`, `rgb(${dark})`], inks = [ink(light), ink(dark)];
  element.style.backgroundColor = both[0];  // for browsers that do not know light-dark()
  element.style.backgroundColor = `light-dark(${both})`;
  element.style.color = inks[0];
  element.style.color = `light-dark(${inks})`;
};
const percent = share => `${(100 * share).toFixed(1)}%`;
const brief = value => value && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(3));
const named = i => `${tokens[i][0]} (${i})`;

// ---- the page

const spans = tokens.map(([text, breaks, lines], i) => {
  if (breaks) make($("text"), "wbr");
  const span = make($("text"), "span", text, "token");
  span.dataset.i = i;
  for (let k = 0; k < lines; k++) make($("text"), "br");
  return span;
});
const select = (id, options) => options.forEach(([value, text]) => { make($(id), "option", text).value = value; });
for (const name of ["title", "about"]) $(name).textContent = data[name];
select("scope", maps.map((map, i) => [i, map.scope]));
select("value", [["share", "share of its prediction"], ["score", "score"]]);
select("colour",
  [["root", "square root"], ["linear", "linear"], ["log", "logarithm"], ["even", "above an even share"]]);
select("column", [[0, "what moved it"], [1, "what it moves"]]);
$("bos").parentNode.hidden = !data.bos;
$("template").parentNode.hidden = !data.parts.includes("template");
$("layers").hidden = !carried;
if (carried) $("layer").max = carried.values.length - 1;

const table = (place, head, found, bars) => {
  place.replaceChildren();
  if (!found.length) return;
  const top = make(make(place, "thead"), "tr"), body = make(place, "tbody"), most = Math.max(...bars.map(Math.abs));
  head.forEach(name => make(top, "th", name));
  found.forEach((texts, i) => {
    const tr = make(body, "tr");
    texts.forEach(text => text instanceof Array
      ? make(make(tr, "td"), "span", text[0], `token ${text[1]}`) : make(tr, "td", text));
    const bar = make(make(tr, "td"), "div", "", bars[i] < 0 ? "bar below" : "bar");
    bar.style.width = `${60 * Math.abs(bars[i]) / (most || 1)}px`;
  });
};

const drawLegend = (scale, unit) => {
  $("ramp").parentNode.hidden = !scale.end;
  if (!scale.end) return $("unit").textContent = "no token here has a share";
  const bar = $("ramp"), low = scale.signed ? -1 : 0, wide = 1 - low, told = shapes[view.colour][1];
  bar.replaceChildren();
  for (let i = 0; i < 24; i++) paint(make(bar, "span"), scale.top * (low + wide * (i + 0.5) / 24));
  const number = t => {
    const value = Math.sign(t) * (scale.floor + told(Math.abs(t)) * Math.max(0, scale.end - scale.floor));
    if (view.colour === "even") return `${t ? brief(value) : scale.signed ? "±1" : 1}×`;
    return view.value === "share" ? percent(value) : brief(value);
  };
  $("ends").replaceChildren();
  [low, (low + 1) / 2, 1].forEach(t => make($("ends"), "span", number(t)));
  const what = view.colour === "even" ? "times an even share" : view.value === "share" ? "share" : unit;
  $("unit").textContent = what + (scale.signed ? "; vermilion: below zero" : "") +
    (scale.top < 1 ? "; the strongest lies over the scale" : "");
};

const draw = () => {
  const pinned = view.pin >= 0, answered = maps[view.scope].rows.findLastIndex(one => one);
  const focus = pinned ? view.pin : hovered >= 0 ? hovered : view.layer >= 0 ? -1 : answered;
  // A row is about a token's own prediction (said) or about the one after it. What was not predicted only moves others.
  const map = maps[view.scope], given = said && focus >= 0 && !map.rows[focus];
  const column = given || !!view.column !== (shift && !pinned && hovered >= 0);
  const shown = cells(focus, column), kept = shown.map((cell, i) => [cell, i]).filter(([cell]) => cell);
  const layered = view.layer >= 0, {unit} = layered ? carried : map;
  const scale = view.value === "score" && view.colour !== "even" && !layered
    ? whole ??= wholeScale() : scaleOf(kept.map(([cell]) => amount(cell)));
  spans.forEach((span, i) => {
    const cell = shown[i];
    span.className = "token" + (i === focus ? pinned ? " pinned focus" : " focus" : "");
    if (cell) return paint(span, strength(amount(cell), scale));
    span.style.backgroundColor = span.style.color = "";
    span.className += i < shown.length && !counts(i) ? " aside" : " none";
  });
  drawLegend(scale, unit);

  const explained = map.explained[focus], after = focus < 0 ? "" : named(focus);
  $("what").textContent = layered
    ? `Where the influence of ${carried.tokens.includes(focus) ? named(focus) : "all tokens"} on ` +
      (carried.answer == null ? `the prediction after ${named(carried.position)}` : `the answer ${carried.answer}`) +
      ` stands ${carried.names[view.layer]}, by ${carried.scope}`
    : column ? `What ${after} moves: the predictions ${said ? "of" : "after"} these tokens`
    : said ? `What moves the prediction of ${after}` +
      (explained == null || explained === tokens[focus][0] ? "" : `, explaining ${explained}`)
    : !shown.length ? `There is no answer for the prediction after ${after}`
    : `What moves the prediction after ${after}` + (explained == null ? "" : `, explaining ${explained}`);
  const cell = pinned && hovered >= 0 ? shown[hovered] : null;
  $("told").textContent = cell
    ? `${named(hovered)}: ${brief(cell.score)} ${unit}, share ${percent(cell.share)}` : pinned
    ? "pinned; click again or Escape to unpin" : "hover a token; with Shift for what it moves; click to pin";
  const top = kept.filter(([cell]) => cell.score)
    .sort(([a], [b]) => Math.abs(amount(b)) - Math.abs(amount(a))).slice(0, 8);
  $("order").textContent = !top.length ? "" : layered ? "Where most of it stands"
    : column ? `Moved most by ${after}` : "Most influential";
  table($("top"), ["", layered ? "at token" : column && !said ? "after token" : "token", "score", "share"],
    top.map(([cell, i]) => [i, [tokens[i][0], ""], brief(cell.score), percent(cell.share)]),
    top.map(([cell]) => amount(cell)));
  const place = layered ? carried.position + Number(said) : focus, next = data.next[place] ?? [];
  $("after").textContent = !next.length ? "" : said ? `Likeliest in the place of ${named(place)}`
    : `Next tokens after ${named(place)}`;
  table($("next"), ["", "token", ""],
    next.map(([text, p], i) => [i + 1, [text, text === map.targets[place] ? "focus" : "boxed"], percent(p)]),
    next.map(([, p]) => p));

  $("scope").value = view.scope;
  for (const name of ["value", "colour", "column"]) $(name).value = view[name];
  for (const name of ["bos", "template"]) $(name).checked = view[name];
  // What changes nothing here: with a layer, all that is about the maps; and BOS while it is out with the template.
  for (const name of ["scope", "column", "bos", "template"]) $(name).disabled = layered;
  $("bos").disabled ||= data.parts[0] === "template" && !view.template;
  $("layer").value = view.layer;
  $("layer-name").textContent = layered ? carried.names[view.layer] : "off";
  $("notes").textContent = map.notes.join("\n");
};

// ---- the link that restores the view

const limits = {
  scope: maps.length, pin: n, column: 2, bos: 2, template: 2, layer: carried ? carried.values.length : 0,
};
const before = {...view};
const save = () => {
  const changed = Object.entries(view).filter(([name, value]) => value !== before[name]);
  const hash = "#" + new URLSearchParams(changed);
  $("link").href = hash;
  try { history.replaceState(null, "", hash); } catch { /* a page inside of a notebook has no address */ }
};
const reveal = () => spans[view.pin]?.scrollIntoView({block: "nearest"});  // a long prompt scrolls
const restore = () => {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const name in view) {
    const given = found.get(name), number = Number(given);
    view[name] = before[name];
    if (given === null) continue;
    if (name in limits) {
      if (Number.isInteger(number) && number >= 0 && number < limits[name]) view[name] = number;
    } else if ([...$(name).options].some(option => option.value === given)) view[name] = given;
  }
  lines = {}; whole = null;
  draw();
  reveal();
};
const set = changes => {
  Object.assign(view, changes);
  lines = {}; whole = null;
  draw();
  save();
};
if (location.protocol === "about:") $("link").hidden = true;

// ---- what a person does

const under = event => event.target.closest?.("#text .token") ? Number(event.target.closest(".token").dataset.i) : -1;
const hover = (i, pressed) => {
  if (i === hovered && pressed === shift) return;
  [hovered, shift] = [i, pressed];
  draw();
};
$("text").addEventListener("mousemove", event => hover(under(event), event.shiftKey));
$("text").addEventListener("mouseleave", event => hover(-1, event.shiftKey));
$("text").addEventListener("click", event => {
  const i = under(event);
  if (i < 0 || i === view.pin) return set({pin: -1});
  set({pin: i, column: Number(!!view.column !== (event.shiftKey && view.pin < 0))});
});
for (const name of ["value", "colour"]) $(name).addEventListener("change", () => set({[name]: $(name).value}));
for (const name of ["scope", "column", "layer"])
  $(name).addEventListener("input", () => set({[name]: Number($(name).value)}));
for (const name of ["bos", "template"])
  $(name).addEventListener("change", () => set({[name]: Number($(name).checked)}));
document.addEventListener("keyup", event => event.key === "Shift" && hover(hovered, false));
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest?.("input, select, textarea")) return;
  if (event.key === "Shift") return hover(hovered, true);
  const answered = maps[view.scope].rows.findLastIndex(one => one);
  const at = view.pin >= 0 ? view.pin : hovered >= 0 ? hovered : answered;
  const keys = {
    ArrowLeft: {pin: Math.max(0, at - 1)}, ArrowRight: {pin: Math.min(n - 1, view.pin < 0 && hovered < 0 ? 0 : at + 1)},
    Home: {pin: 0}, End: {pin: n - 1}, Escape: {pin: -1}, s: {column: 1 - view.column},
    ArrowUp: {scope: Math.max(0, view.scope - 1)}, ArrowDown: {scope: Math.min(maps.length - 1, view.scope + 1)},
  };
  if (!(event.key in keys) || event.key.match(/Up|Down/) && maps.length < 2) return;
  event.preventDefault();
  set(keys[event.key]);
  reveal();
});
window.addEventListener("hashchange", restore);
$("app").hidden = false;
restore();
})();
