// The map's table: sorts by its headers, and filters by words, family, letter and whether a chapter runs a technique.
// Without this script the table stands as it is.
document.addEventListener("DOMContentLoaded", () => {
  const box = document.getElementById("gi-techniques");
  if (!box) return;
  const heads = [...box.querySelectorAll("thead th")], names = heads.map(head => head.textContent);
  const body = box.querySelector("tbody"), rows = [...body.rows], first = new Map(rows.map((row, i) => [row, i]));
  const said = (row, name) => row.cells[names.indexOf(name)].textContent;
  // "10. Transformers" after "9. A malicious server".
  const compare = new Intl.Collator("en", {numeric: true}).compare;
  let sorted = "", down = false;

  function choice(label, values) {
    const input = element("select", {onchange: draw}, element("option", {value: ""}, "all"),
      ...values.map(value => element("option", {value}, value)));
    controls.append(element("label", {}, label, input));
    return input;
  }

  const controls = element("form", {class: "gi-controls", role: "search", "aria-label": "Filter the techniques",
    onsubmit: event => event.preventDefault()});
  const words = element("input", {type: "search", oninput: draw, placeholder: "name, author, year, any word"});
  controls.append(element("label", {class: "gi-wide"}, "search", words));
  const family = choice("family", [...new Set(rows.map(row => said(row, "family")))]);
  const letter = choice("threat letter", [...new Set(rows.map(row => said(row, "letter")))].sort(compare));
  const run = choice("in this book", ["has a chapter", "no chapter yet"]);
  // On a narrow screen, where the rows are cards without headers.
  const sort = element("select", {onchange: () => { sorted = sort.value; down = sorted === "our best result"; draw(); }},
    element("option", {value: ""}, "the book's order"), ...names.map(name => element("option", {value: name}, name)));
  controls.append(element("label", {class: "gi-narrow"}, "sort by", sort));
  controls.append(element("button", {type: "button", onclick: reset}, "Show all"));
  const count = element("p", {class: "gi-count", role: "status", "aria-live": "polite"});
  box.prepend(controls, count);

  heads.forEach((head, i) => head.replaceChildren(element("button", {type: "button", onclick: () => {
    // Of our best result the best comes first.
    down = sorted === names[i] ? !down : names[i] === "our best result";
    sorted = names[i];
    draw();
  }}, names[i], element("span", {"aria-hidden": "true"}))));

  function fits(row) {
    const text = row.textContent.toLowerCase();
    return words.value.toLowerCase().split(/\s+/).every(word => text.includes(word))
      && (!family.value || said(row, "family") === family.value)
      && (!letter.value || said(row, "letter") === letter.value)
      && (!run.value || (said(row, "chapter") === "no chapter yet") === (run.value === "no chapter yet"));
  }

  function order(a, b) {
    if (!sorted) return first.get(a) - first.get(b);
    const i = names.indexOf(sorted);
    // What has no value stays at the end whichever way it is sorted.
    const [x, y] = [a, b].map(row => row.cells[i].querySelector(".gi-none") || row.cells[i].textContent === "–"
      ? null : row.cells[i].dataset.value ?? row.cells[i].textContent);
    const turned = x === null || y === null ? (x === null) - (y === null)
      : (down ? -1 : 1) * (a.cells[i].dataset.value ? x - y : compare(x, y));
    return turned || first.get(a) - first.get(b);
  }

  function draw() {
    for (const row of rows) row.hidden = !fits(row);
    body.append(...[...rows].sort(order));
    sort.value = sorted;
    heads.forEach((head, i) => {
      const now = sorted !== names[i] ? "none" : down ? "descending" : "ascending";
      head.setAttribute("aria-sort", now);
      head.querySelector("span").textContent = {ascending: " ▲", descending: " ▼", none: ""}[now];
    });
    const shown = rows.filter(row => !row.hidden).length;
    count.textContent = shown ? `${shown} of ${rows.length} techniques` : `no technique of ${rows.length} fits`;
  }

  function reset() {
    words.value = family.value = letter.value = run.value = "";
    draw();
  }

  // An address of one technique shows it, whatever is filtered.
  function target() {
    const row = location.hash && document.getElementById(location.hash.slice(1));
    if (rows.includes(row) && row.hidden) reset();
    if (rows.includes(row)) row.scrollIntoView({block: "center"});
  }

  window.addEventListener("hashchange", target);
  draw();
  target();
});
