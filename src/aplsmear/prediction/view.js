"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const svg = $("picture"), list = $("list"), NS = "http://www.w3.org/2000/svg";
const most = data.columns.map((_, k) => data.cells.reduce((top, cell) => Math.max(top, Math.abs(cell.values[k])), 1e-9));
const by = () => Number($("sort").value);
const side = cell => cell.values[by()] > 0 ? "for" : "against";
const signed = value => value === null ? "none" : (value > 0 ? "+" : "") + value.toFixed(3);
const shown = (column, value) => data.columns[column].startsWith("evidence ") ? signed(value) : value === null ? "none" : value.toFixed(3);
const CHUNK = 240;
let order = [], drawn = 0, place = -1, field = -1, full = null, look = null;

function make(parent, name, attributes, text) {
  const element = name.match(/^(rect|image|title)$/) ? document.createElementNS(NS, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

function scores(cell) {
  return [`cell ${cell.name}`, ...data.columns.map((name, k) => `${name}: ${shown(k, cell.values[k])}`)];
}

/* The list: cells in order, drawn as far as they are needed. */
function sort() {
  const chosen = order[place], column = by();
  const worth = cell => cell.values[column] === null ? -Infinity : cell.values[column];
  order = data.cells.map((_, n) => n).sort((a, b) => worth(data.cells[b]) - worth(data.cells[a]) || a - b);
  if ($("turn").checked) order.reverse();
  list.replaceChildren();
  drawn = 0;
  draw(CHUNK);
  field = -1;  // so that the boxes are drawn anew
  select(chosen === undefined ? 0 : order.indexOf(chosen));
}

function draw(count) {
  for (const end = Math.min(order.length, drawn + count); drawn < end; drawn++) {
    const cell = data.cells[order[drawn]], at = drawn;
    const button = make(list, "button", {type: "button", class: side(cell), title: scores(cell).join("\n"), "aria-label": scores(cell).join(", ")});
    make(button, "img", {src: cell.src, alt: ""});
    make(button, "span", {}, shown(by(), cell.values[by()]));
    button.addEventListener("click", () => select(at));
  }
}

/* The picture: a smear with the boxes of its cells, or the picture of one cell. */
function open(number, cell) {
  if (number === field && number >= 0) return;
  field = number;
  svg.replaceChildren();
  const from = number >= 0 ? data.fields[number] : {src: cell.src, width: 100, height: 100, name: `cell ${cell.name}`};
  make(svg, "image", {href: from.src, width: from.width, height: from.height, preserveAspectRatio: "none"});
  full = {x: 0, y: 0, width: from.width, height: from.height};
  if (number >= 0) {
    $("field").value = number;
    data.cells.forEach((each, n) => {
      if (each.field !== number) return;
      const [y0, x0, y1, x1] = each.box, opacity = 0.2 + 0.8 * Math.abs(each.values[by()]) / most[by()];
      const rect = make(svg, "rect", {x: x0, y: y0, width: x1 - x0, height: y1 - y0, class: side(each), "stroke-opacity": opacity, "data-cell": n});
      make(rect, "title", {}, scores(each).join("\n"));
      rect.addEventListener("click", () => select(order.indexOf(n)));
    });
  }
  show(full);
}

function show(part) {
  look = part;
  svg.setAttribute("viewBox", `${part.x} ${part.y} ${part.width} ${part.height}`);
  svg.classList.toggle("near", part.width < full.width - 1);
}

function zoom(factor, x = look.x + look.width / 2, y = look.y + look.height / 2) {
  const by = Math.min(1 / factor, full.width / look.width);
  if (look.width * by > full.width - 1) return show(full);
  if (look.width * by < 20) return;
  show({x: x - (x - look.x) * by, y: y - (y - look.y) * by, width: look.width * by, height: look.height * by});
}

function near() {
  const cell = data.cells[order[place]];
  if (!cell || cell.field < 0) return;
  const [y0, x0, y1, x1] = cell.box, height = Math.min(5 * Math.max(y1 - y0, x1 - x0), full.height);
  const width = height * full.width / full.height;
  show({x: (x0 + x1 - width) / 2, y: (y0 + y1 - height) / 2, width, height});
}

function select(to) {
  place = Math.max(0, Math.min(to, order.length - 1));
  if (drawn <= place) draw(place - drawn + CHUNK);
  const cell = data.cells[order[place]], zoomed = look && look.width < full.width - 1;
  open(cell.field, cell);
  if (zoomed) near();
  document.querySelectorAll(".chosen").forEach(each => each.classList.remove("chosen"));
  const button = list.children[place], rect = svg.querySelector(`[data-cell="${order[place]}"]`);
  button.classList.add("chosen");
  button.scrollIntoView({block: "nearest"});
  if (list.contains(document.activeElement)) button.focus({preventScroll: true});
  if (rect) { rect.classList.add("chosen"); svg.appendChild(rect); }
  $("scores").replaceChildren();
  scores(cell).forEach((text, n) => make($("scores"), n ? "span" : "b", {}, text));
}

data.columns.forEach((name, k) => make($("sort"), "option", {value: k}, name));
data.fields.forEach((each, k) => make($("field"), "option", {value: k}, `${each.name}, evidence ${signed(each.evidence)}`));
$("field").hidden = data.fields.length < 2;
$("sort").addEventListener("change", sort);
$("turn").addEventListener("change", sort);
$("field").addEventListener("change", () => {
  const first = order.findIndex(n => data.cells[n].field === Number($("field").value));
  show(full);
  if (first >= 0) select(first); else open(Number($("field").value));
});
$("in").addEventListener("click", () => zoom(1.5));
$("out").addEventListener("click", () => zoom(1 / 1.5));
list.addEventListener("scroll", () => {
  if (list.scrollTop + list.clientHeight > list.scrollHeight - 400) draw(CHUNK);
});
svg.addEventListener("wheel", event => {
  event.preventDefault();
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  zoom(event.deltaY < 0 ? 1.25 : 0.8, at.x, at.y);
}, {passive: false});
svg.addEventListener("pointermove", event => {
  if (!event.buttons || look.width >= full.width - 1) return;
  const scale = look.width / svg.clientWidth;
  show({...look, x: look.x - event.movementX * scale, y: look.y - event.movementY * scale});
});
document.addEventListener("keydown", event => {
  if (event.target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
  const keys = {
    ArrowRight: () => select(place + 1), ArrowDown: () => select(place + 1),
    ArrowLeft: () => select(place - 1), ArrowUp: () => select(place - 1),
    Home: () => select(0), End: () => select(order.length - 1),
    Enter: near, Escape: () => show(full), "+": () => zoom(1.5), "-": () => zoom(1 / 1.5),
  };
  if (!(event.key in keys)) return;
  event.preventDefault();
  keys[event.key]();
});
sort();
