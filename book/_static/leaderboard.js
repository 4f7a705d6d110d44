// The leaderboard: makes the table that stands in the page sortable by its headers and adds filters. The two parts of
// the table, with and without what is no better than the mean colour, are sorted each by itself. The state is kept in
// the address, as #model=lenet&sort=-PSNR+(dB), so that a view can be linked to.
document.addEventListener("DOMContentLoaded", () => {
  const box = document.getElementById("gi-leaderboard");
  if (!box) return;
  const FILTERS = ["technique", "threat", "model", "dataset"];
  const heads = [...box.querySelectorAll("thead th")];
  const names = heads.map(head => head.textContent);
  const parts = [...box.querySelectorAll("tbody")];
  const rows = parts.map(part => [...part.rows].filter(row => !row.classList.contains("gi-part")));
  const all = rows.flat();
  // A technique's setting and a model's weights stand on a second line of the cell.
  const said = (row, i) => row.cells[i].firstChild?.textContent ?? "";

  // --- state, from the address and back to it

  const fresh = () => ({sort: "-identified", ...Object.fromEntries(FILTERS.map(name => [name, ""]))});
  let state = fresh();

  function readAddress() {
    state = fresh();
    if (!location.hash.includes("=")) return;
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (name in state) state[name] = value;
    if (!names.includes(state.sort.replace(/^-/, ""))) state.sort = fresh().sort;
  }

  function writeAddress() {
    const standard = fresh();
    const text = new URLSearchParams(Object.entries(state).filter(([name, value]) => value !== standard[name])).toString();
    history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  }

  function change(part) {
    Object.assign(state, part);
    writeAddress();
    draw();
  }

  // --- controls

  heads.forEach((head, i) => {
    const first = head.dataset.sort === "more" ? "-" : "", second = first ? "" : "-", name = names[i];
    head.replaceChildren(element("button", {type: "button",
      onclick: () => change({sort: (state.sort === first + name ? second : first) + name})},
      name, element("span", {"aria-hidden": "true"})));
  });
  const inputs = {};
  const controls = element("form", {class: "gi-controls", role: "search", "aria-label": "Filter the leaderboard",
    onsubmit: event => event.preventDefault()});
  for (const name of FILTERS) {
    const values = [...new Set(all.map(row => said(row, names.indexOf(name))))].sort();
    inputs[name] = element("select", {onchange: () => change({[name]: inputs[name].value})},
      element("option", {value: ""}, "all"), ...values.map(value => element("option", {value}, value)));
    controls.append(element("label", {}, name, inputs[name]));
  }
  controls.append(element("button", {type: "button", onclick: () => change(fresh())}, "Show all"));
  const count = element("p", {class: "gi-count", role: "status", "aria-live": "polite"});
  box.prepend(controls, count);

  // --- rows

  const original = new Map(all.map((row, i) => [row, i]));

  function value(row, i) {
    const text = said(row, i), number = Number.parseFloat(row.cells[i].dataset.value ?? text.replaceAll(",", ""));
    return heads[i].dataset.sort === "text" ? text : number;
  }

  function ordered(part) {
    const i = names.indexOf(state.sort.replace(/^-/, "")), down = state.sort.startsWith("-") ? -1 : 1;
    return [...part].sort((a, b) => {
      const [x, y] = [value(a, i), value(b, i)];
      // Rows without a value stay at the end whichever way it is sorted; equal ones in the order of the page.
      const order = typeof x === "string" ? down * x.localeCompare(y)
        : Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : down * (x - y);
      return order || original.get(a) - original.get(b);
    });
  }

  function draw() {
    for (const name of FILTERS) if (inputs[name].value !== state[name]) inputs[name].value = state[name];
    let shown = 0;
    parts.forEach((part, k) => {
      let here = 0;
      for (const row of rows[k]) {
        row.hidden = !FILTERS.every(name => !state[name] || said(row, names.indexOf(name)) === state[name]);
        here += !row.hidden;
      }
      part.append(...ordered(rows[k]));
      part.hidden = !here;
      shown += here;
    });
    heads.forEach((head, i) => {
      const now = state.sort === names[i] ? "ascending" : state.sort === "-" + names[i] ? "descending" : "none";
      head.setAttribute("aria-sort", now);
      head.querySelector("span").textContent = {ascending: " ▲", descending: " ▼", none: ""}[now];
    });
    count.textContent = shown ? `${shown} of ${all.length} rows` : `no row of ${all.length} fits`;
  }

  window.addEventListener("hashchange", () => { readAddress(); draw(); });
  readAddress();
  draw();
});
