// The results explorer: shows the records that the page holds (JSON, gzip, base64), two of them beside each other on one
// image, all as a table that can be searched, filtered and sorted, and as a scatter of quality against time. It asks for
// nothing but the pictures in ../results/. The state is kept in the address, as #model=lenet&sort=-psnr, so that a view
// can be linked to. Rows are numbers from 0; a column is looked up by `at`, so that 20,000 rows make no objects.
document.addEventListener("DOMContentLoaded", async () => {
  const box = document.getElementById("gi-explorer");
  if (!box) return;
  const packed = Uint8Array.from(atob(box.querySelector("script").textContent), letter => letter.charCodeAt(0));
  const data = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  const {columns, papers, meaning} = data, N = data.rows, PAGE = 50, FIRST = "survey";
  for (const column of Object.values(columns)) if (!Array.isArray(column)) column.codes ??= column.values.map((_, row) => row);
  const COLUMNS = Object.keys(columns).filter(name => !["case", "error", "picture"].includes(name));

  const TITLES = {
    attack: "technique", model: "network", above: "dB above floor", floor: "floor (dB)", psnr: "PSNR (dB)",
    training_steps: "cost in training steps", tv: "TV weight", lr: "learning rate", budget: "steps", batch_size: "batch",
    steps: "steps taken", restarts: "starts", attack_text: "settings", recall: "recovered", ssim: "SSIM", lpips: "LPIPS",
    label_accuracy: "labels right", threat_letter: "threat", size: "pixels", started: "run on",
  };
  const EMPTY = {weights: "untrained", defense: "none", tv: "none", budget: "none", lr: "none", size: "as they are"};
  const FILTERS = ["attack", "model", "dataset", "study", "status", "tv", "budget", "batch_size", "precision", "weights",
    "threat_letter", "client", "defense"];
  const FRONT = 3;  // filters that stand beside the search; the others are folded
  const LESS = ["lpips", "floor", "training_steps", "seconds"];  // numbers of which the lowest comes first
  const SVG = "http://www.w3.org/2000/svg";

  const title = name => TITLES[name] || name;
  const isText = name => !Array.isArray(columns[name]);
  const at = (row, name) => {
    const column = columns[name];
    if (Array.isArray(column)) return column[row];
    return column.codes[row] < 0 ? null : column.values[column.codes[row]];
  };
  const brief = v => v >= 1000 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(3)));
  const fixed = digits => v => v.toFixed(digits).replace("-", "−");
  const share = v => Math.round(100 * v) + " %";
  const FORMATS = {
    above: v => (v > 0 ? "+" : "") + fixed(1)(v), floor: fixed(1), psnr: fixed(1), ssim: fixed(3), lpips: fixed(3),
    recall: share, label_accuracy: share, training_steps: brief, seconds: brief, seed: String,
  };
  function show(row, name) {
    const value = at(row, name);
    if (value === null) return EMPTY[name] || "";
    if (name === "identified") {
      const images = at(row, "batch_size");
      return images === 1 ? (value ? "yes" : "no") : `${Math.round(value * images)} of ${images}`;
    }
    if (FORMATS[name]) return FORMATS[name](value);
    return typeof value === "number" && value >= 10000 ? value.toLocaleString("en") : String(value);
  }
  const id = row => `${at(row, "study")}/${at(row, "key")}`;

  const option = (value, text = value) => element("option", {value}, text);
  const label = (text, input) => element("label", {}, text, input);

  // --- state, from the address and back to it; an address without one opens on the survey

  const fresh = () => ({q: "", sort: "", page: 1, columns: "", clock: "training_steps", identified: "", above: "", floor: "",
    left: "", right: "", ...Object.fromEntries(FILTERS.map(name => [name, ""]))});
  const opening = () => ({...fresh(), study: options("study").includes(FIRST) ? FIRST : ""});
  let state;

  function readAddress() {
    if (!location.hash.includes("=")) {  // also a heading's address, which leaves the table as it is
      state ??= opening();
      return;
    }
    state = fresh();
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      if (name === "page") state.page = Math.max(1, Number.parseInt(value, 10) || 1);
      else if (name in state) state[name] = value;
    }
    if (!COLUMNS.includes(state.sort.replace("-", ""))) state.sort = "";
    if (!["seconds", "training_steps"].includes(state.clock)) state.clock = "training_steps";
  }

  function writeAddress() {
    const standard = fresh();
    const changed = Object.entries(state).filter(([name, value]) => value !== standard[name]);
    history.replaceState(null, "", "#" + (new URLSearchParams(changed).toString() || "study="));
  }

  function change(part) {
    Object.assign(state, {page: 1}, part);
    writeAddress();
    draw();
  }

  // --- which rows

  // What a filter offers and what it compares: the texts of a column, or its numbers as texts; "none" for null.
  function options(name) {
    if (isText(name)) return [...columns[name].values, ...(columns[name].codes.includes(-1) ? ["none"] : [])].sort();
    const found = [...new Set(columns[name])];
    return found.sort((a, b) => (a === null) - (b === null) || a - b).map(value => value === null ? "none" : String(value));
  }

  function wanted(name) {
    const value = state[name], column = columns[name];
    if (isText(name)) {
      const code = column.values.indexOf(value);
      return row => column.codes[row] === code;  // -1, for null, is also what "none" gives
    }
    return value === "none" ? row => column[row] === null : row => String(column[row]) === value;
  }

  const plain = text => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
  const searched = COLUMNS.filter(isText).concat("error", "case").filter(isText);
  const texts = new Map();
  // A word is looked for once in each text of a column, and in the paper of a technique: its title, authors and year.
  function holds(word) {
    const hits = searched.map(name => {
      if (!texts.has(name)) {
        texts.set(name, columns[name].values.map(text => plain(name === "attack" ? `${text} ${papers[text]}` : text)));
      }
      return [columns[name].codes, texts.get(name).map(text => text.includes(word))];
    }).filter(([, found]) => found.includes(true));
    return row => hits.some(([codes, found]) => found[codes[row]]);
  }

  function chosen() {
    const tests = FILTERS.filter(name => state[name]).map(wanted);
    const {identified, above, floor} = columns;
    if (state.identified === "all") tests.push(row => identified[row] === 1);
    if (state.identified === "some") tests.push(row => identified[row] > 0);
    if (state.identified === "none") tests.push(row => identified[row] === 0);
    if (state.above !== "") tests.push(row => above[row] !== null && above[row] >= Number(state.above));
    if (state.floor !== "") tests.push(row => floor[row] !== null && floor[row] <= Number(state.floor));
    tests.push(...plain(state.q).split(/\s+/).filter(Boolean).map(holds));
    const found = [];
    for (let row = 0; row < N; row++) if (tests.every(test => test(row))) found.push(row);
    return sorted(found);
  }

  function sorted(found) {
    if (!state.sort) return found;
    const sign = state.sort.startsWith("-") ? -1 : 1, name = state.sort.replace("-", "");
    let values = columns[name];
    if (isText(name)) {
      const order = [...values.values].sort(), place = values.values.map(text => order.indexOf(text));
      values = values.codes.map(code => code < 0 ? null : place[code]);
    }
    // Rows without a value stay at the end whichever way it is sorted.
    return found.sort((a, b) => {
      const x = values[a], y = values[b];
      return x === null || y === null ? (x === null) - (y === null) : sign * (x - y);
    });
  }

  // --- pictures: the private images stand above the rebuilt ones in one file, of which a tile shows a half

  const folder = box.dataset.results;
  const address = (base, row, ending) =>
    `${base}${encodeURIComponent(at(row, "study"))}/${encodeURIComponent(at(row, "key"))}${ending}`;

  function tile(row, rebuilt, width, images = columns.picture[row]) {
    const all = columns.picture[row], alt = rebuilt ? `Rebuilt: ${say(row)}` : `Private: ${where(row)}`;
    const made = element("span", {class: "gi-tile", style: `width:${width}px;aspect-ratio:${images}`},
      element("img", {src: address(folder, row, ".png"), loading: "lazy", decoding: "async", class: "dark-light", alt,
        style: `width:${100 * all / images}%;top:${rebuilt ? -100 : 0}%`, onload: event => {
          const {naturalWidth: w, naturalHeight: h} = event.target;
          made.style.aspectRatio = String(w * images / all / (h / 2));
        }}));
    return made;
  }

  const where = row => `${show(row, "dataset")} ${show(row, "images")}`;
  function say(row) {
    const dB = at(row, "psnr") === null ? "" : `, ${show(row, "psnr")} dB`;
    return `${show(row, "attack")} on ${show(row, "model")}, ${where(row)}${dB}`;
  }
  function figure(row, rebuilt, caption) {
    const images = columns.picture[row], width = Math.min(images * 160, 960);
    return element("figure", {class: images === 1 ? "gi-one" : null}, tile(row, rebuilt, width), element("figcaption", {}, ...caption));
  }
  function told(row) {
    return [`${show(row, "psnr")} dB, ${show(row, "above")} dB from its floor; identified: ${show(row, "identified")}`];
  }

  // --- two techniques on one image

  const LIKE = ["model", "weights", "dataset", "images", "size", "seed", "client", "defense"];
  const alike = row => LIKE.map(name => isText(name) ? columns[name].codes[row] : columns[name][row]).join();
  const groups = new Map();  // rows with a picture, by what was attacked; of two techniques or settings at least
  for (let row = 0; row < N; row++) {
    if (!columns.picture[row]) continue;
    const name = alike(row);
    if (groups.has(name)) groups.get(name).push(row);
    else groups.set(name, [row]);
  }
  for (const [name, rows] of groups) if (rows.length < 2) groups.delete(name);
  const techniquesOf = rows => new Set(rows.map(row => at(row, "attack"))).size;
  const network = row => show(row, "model") + (at(row, "weights") === null ? "" : `, ${at(row, "weights")}`);
  const more = row => {
    const size = at(row, "size"), seed = at(row, "seed");
    return [show(row, "images"), size === null ? "" : `${size} px`, seed ? `seed ${seed}` : "",
      at(row, "client") === "FedSGD" ? "" : at(row, "client"), at(row, "defense") || ""].filter(Boolean).join(", ");
  };
  const ASPECTS = [["network", network], ["dataset", row => show(row, "dataset")], ["image", more]];

  const byId = text => {
    const [study, key] = text.split("/"), of = columns.study.values.indexOf(study), code = columns.key.values.indexOf(key);
    return code < 0 ? -1 : columns.key.codes.findIndex((c, row) => c === code && columns.study.codes[row] === of);
  };

  // The pair that the address names, or else the survey's first image with two techniques.
  function pair() {
    const [a, b] = [byId(state.left), byId(state.right)];
    if (a >= 0 && columns.picture[a]) {
      const others = (groups.get(alike(a)) || []).filter(row => row !== a);
      if (others.length) return [a, others.includes(b) ? b : other(a, others)];
    }
    let best = [], score = -1;
    for (const rows of groups.values()) {
      const own = rows.filter(row => at(row, "study") === FIRST), points = 2 * (techniquesOf(own) > 1) + (techniquesOf(rows) > 1);
      if (points > score) [best, score] = [own.length > 1 ? own : rows, points];
    }
    return [best[0], other(best[0], best.slice(1))];
  }
  const other = (a, rows) => rows.find(row => at(row, "attack") !== at(a, "attack")) ?? rows[0];

  const comparison = element("section", {class: "gi-pair", "aria-label": "Two techniques on one image"});
  let paired = null;

  function drawPair() {
    const asked = `${state.left} ${state.right}`;
    if (!groups.size || paired === asked) return;
    paired = asked;
    const [a, b] = pair(), rows = groups.get(alike(a));
    const choose = (name, entries, value, chosenOne) => {
      const input = element("select", {onchange: () => {
        chosenOne(input.value);
        comparison.querySelector(`[data-name="${name}"]`).focus();
      }, "data-name": name}, ...entries.map(([v, text]) => option(v, text)));
      input.value = value;
      return label(name, input);
    };
    const controls = ASPECTS.map(([name, of], i) => {
      const fixed = ASPECTS.slice(0, i).map(([, before]) => before);
      const heads = [...groups.values()].filter(part => fixed.every(before => before(part[0]) === before(a)));
      const values = [...new Set(heads.map(part => of(part[0])))].sort((x, y) => x.localeCompare(y, "en", {numeric: true}));
      return choose(name, values.map(v => [v, v]), of(a), value => {
        const next = heads.find(part => of(part[0]) === value);
        const same = next.find(row => at(row, "attack") === at(a, "attack")) ?? next[0];
        compare(same, next.find(row => row !== same && at(row, "attack") === at(b, "attack"))
          ?? other(same, next.filter(row => row !== same)));
      });
    });
    const named = row => `${show(row, "attack")}: ${show(row, "attack_text")}, ${show(row, "study")}`;
    const entries = taken => rows.filter(row => row !== taken).map(row => [String(row), named(row)]);
    controls.push(choose("first technique", entries(b), String(a), value => compare(Number(value), b)),
      choose("second technique", entries(a), String(b), value => compare(a, Number(value))));
    const result = row => figure(row, true, [element("strong", {}, show(row, "attack")), element("br"), ...told(row),
      element("br"), `${show(row, "attack_text")}; ${show(row, "seconds")} s`]);
    comparison.replaceChildren(element("div", {class: "gi-controls"}, ...controls),
      element("div", {class: "gi-pictures"}, figure(a, false, [element("strong", {}, "private"), element("br"),
        `${where(a)}, ${network(a)}`, element("br"), `floor ${show(a, "floor")} dB`]), result(a), result(b)));
  }

  function compare(a, b) {
    Object.assign(state, {left: id(a), right: id(b)});
    writeAddress();
    drawPair();
  }

  // --- controls

  const inputs = {};
  const pick = (name, entries) => label(title(name), inputs[name] = element("select",
    {onchange: () => change({[name]: inputs[name].value})}, option("", "all"), ...entries));
  const least = (name, text) => label(text, inputs[name] = element("input", {type: "number", step: "any",
    oninput: () => change({[name]: inputs[name].value})}));
  const picks = FILTERS.map(name => pick(name, options(name).map(value =>
    option(value, value === "none" ? EMPTY[name] || "none" : value))));
  const folded = element("details", {class: "gi-more"}, element("summary", {}, "More filters, order and columns"),
    element("div", {class: "gi-controls"}, ...picks.slice(FRONT + 1), least("above", "dB above floor, at least"),
      least("floor", "floor (dB), at most"),
      label("sort by", inputs.sort = element("select", {onchange: () => change({sort: inputs.sort.value})},
        option("", "as recorded"), ...COLUMNS.flatMap(name =>
          [option(name, `${title(name)}, up`), option("-" + name, `${title(name)}, down`)]))),
      label("columns", inputs.columns = element("select", {onchange: () => change({columns: inputs.columns.value})},
        option("", "main"), option("all")))));
  inputs.q = element("input", {type: "search", placeholder: "technique, author, year, network; several words: all of them",
    oninput: () => change({q: inputs.q.value})});
  const search = label("search", inputs.q);
  search.className = "gi-wide";
  // The search comes last, so that one Tab leads from it into the table.
  const controls = element("form", {role: "search", "aria-label": "Filter the records",
    onsubmit: event => event.preventDefault()},
    element("div", {class: "gi-controls"}, ...picks.slice(0, FRONT), pick("identified",
      [option("all", "every image"), option("some", "an image"), option("none", "no image")]), picks[FRONT],
      element("button", {type: "button", onclick: () => change(fresh())}, "Show all records")),
    folded, element("div", {class: "gi-controls"}, search));

  const count = element("p", {class: "gi-count", role: "status", "aria-live": "polite"});
  const head = element("tr"), body = element("tbody"), heads = {};
  const records = element("table", {class: "gi-records", role: "treegrid", "aria-label": "Records",
    "aria-describedby": "gi-keys"}, element("thead", {}, head), body);
  const table = element("div", {class: "gi-scroll"}, records);
  const keys = element("p", {class: "gi-keys", id: "gi-keys"}, "A click or Enter opens a row. In the table ↑ and ↓ go from "
    + "row to row, also to the column names, where ← and → go on and Enter sorts; PageUp and PageDown turn pages.");
  const back = element("button", {type: "button", onclick: () => turn(-1)}, "Previous");
  const forth = element("button", {type: "button", onclick: () => turn(1)}, "Next");
  const which = element("span");
  const pager = element("nav", {class: "gi-pager", "aria-label": "Pages of the table"}, back, which, forth);
  const skip = element("a", {class: "gi-skip", href: "#gi-explorer", onclick: event => {
    event.preventDefault();
    focusOn(stops()[1] || stops()[0]);
  }}, "Go to the table of records");

  function turn(by) {
    state.page += by;
    writeAddress();
    draw();
    table.scrollTop = 0;
    table.scrollIntoView({block: "nearest"});
  }

  // --- the table

  let shown = [];

  function drawHead() {
    const now = state.columns === "all" ? COLUMNS : COLUMNS.slice(0, data.shown);
    if (now.length === shown.length) return;
    shown = now;
    head.replaceChildren(...now.map(name => {
      const button = element("button", {type: "button", tabindex: "-1", title: meaning[name] || null,
        onclick: () => sortBy(name)}, title(name), element("span", {"aria-hidden": "true"}));
      heads[name] = element("th", {scope: "col", role: "columnheader"}, button);
      return heads[name];
    }));
  }

  // First click: best or first on top; second: the other way round; third: the order of the records.
  function sortBy(name) {
    const first = isText(name) || LESS.includes(name) ? "" : "-", second = first ? "" : "-";
    change({sort: state.sort === first + name ? second + name : state.sort === second + name ? "" : first + name});
    focusOn(heads[name].firstChild);
  }

  function record(row) {
    const status = at(row, "status"), name = element("span", {}, show(row, "attack"));
    if (status !== "ok") name.append(element("small", {title: at(row, "error")}, status));
    const pictures = element("span", {class: "gi-thumbs"}, ...(columns.picture[row]
      ? [tile(row, false, 36, 1), tile(row, true, 36, 1)] : []));
    const made = element("tr", {tabindex: "-1", role: "row", "aria-level": "1", "aria-expanded": "false"},
      element("th", {scope: "row", role: "rowheader"}, element("span", {class: "gi-name"}, pictures, name)));
    for (const column of shown.slice(1)) {
      made.append(element("td", {role: "gridcell", class: isText(column) ? null : "gi-number"}, show(row, column)));
    }
    made.dataset.row = row;
    return made;
  }

  function details(row) {
    const facts = element("dl", {}, ...COLUMNS.filter(name => show(row, name) !== "").map(name =>
      element("div", {}, element("dt", {title: meaning[name] || null}, title(name)), element("dd", {}, show(row, name)))));
    const text = element("div", {}, element("p", {}, papers[at(row, "attack")]));
    if (at(row, "error")) text.append(element("p", {class: "gi-reason"}, `${at(row, "status")}: ${at(row, "error")}`));
    const command = data.remake.replace(/\{(\w+)\}/g, (_, name) => at(row, name));
    text.append(element("p", {}, "Computed again, in a checkout of this project, by ", element("code", {}, command)));
    const links = element("p", {}, element("a", {href: address(box.dataset.records, row, ".json")}, "this record as JSON"),
      ", from ", element("a", {href: `${folder}${encodeURIComponent(at(row, "study"))}.jsonl`}, `${at(row, "study")}.jsonl`));
    const rows = groups.get(alike(row)) || [];
    if (rows.includes(row)) {
      links.append("; ", element("button", {type: "button", onclick: () => {
        compare(row, other(row, rows.filter(r => r !== row)));
        comparison.scrollIntoView({block: "nearest"});
        comparison.querySelector("[data-name='second technique']").focus();
      }}, "compare on this image"));
    }
    text.append(links);
    const made = element("div", {class: "gi-open"}, ...(columns.picture[row] ? [element("div", {class: "gi-pictures"},
      figure(row, false, ["private"]), figure(row, true, ["rebuilt: ", ...told(row)]))] : []), text, facts);
    return element("tr", {class: "gi-details", role: "row", "aria-level": "2"},
      element("td", {colspan: shown.length, role: "gridcell"}, made));
  }

  function toggle(line) {
    const open = line.getAttribute("aria-expanded") === "true";
    line.setAttribute("aria-expanded", String(!open));
    if (open) line.nextSibling.remove();
    else line.after(details(Number(line.dataset.row)));
  }

  // The table is one stop of the Tab key: of its rows, or of the column names, the one last used.
  const stops = () => [head.querySelector("[tabindex='0']") || head.querySelector("button"), ...body.querySelectorAll("[data-row]")];

  function mark(stop) {
    for (const old of records.querySelectorAll("[tabindex='0']")) old.setAttribute("tabindex", "-1");
    stop?.setAttribute("tabindex", "0");
  }

  function focusOn(stop) {
    mark(stop);
    stop?.focus();
  }

  records.addEventListener("keydown", event => {
    const own = event.target.closest("th button, [data-row]");
    if (own !== event.target) {
      if (event.key === "Escape" && body.contains(event.target)) {
        const line = event.target.closest(".gi-details").previousSibling;
        toggle(line);
        focusOn(line);
      }
      return;
    }
    const all = stops(), i = all.indexOf(own), line = own.dataset.row !== undefined, names = [...head.querySelectorAll("button")];
    const go = stop => { focusOn(stop); event.preventDefault(); };
    if (event.key === "ArrowDown") go(all[Math.min(i + 1, all.length - 1)]);
    else if (event.key === "ArrowUp") go(all[Math.max(i - 1, 0)]);
    else if (event.key === "Home") go(line ? all[1] : names[0]);
    else if (event.key === "End") go(line ? all.at(-1) : names.at(-1));
    else if (event.key === "PageDown" && !forth.disabled) { turn(1); go(stops()[1]); }
    else if (event.key === "PageUp" && !back.disabled) { turn(-1); go(stops()[1]); }
    else if (!line && ["ArrowLeft", "ArrowRight"].includes(event.key)) {
      go(names[Math.min(Math.max(names.indexOf(own) + (event.key === "ArrowRight" ? 1 : -1), 0), names.length - 1)]);
    } else if (line && (event.key === "Enter" || event.key === " " || (event.key === "Escape" || event.key === "ArrowLeft")
        && own.getAttribute("aria-expanded") === "true" || event.key === "ArrowRight"
        && own.getAttribute("aria-expanded") === "false")) {
      toggle(own);
      event.preventDefault();
    }
  });
  body.addEventListener("click", event => {
    const line = event.target.closest("[data-row]");
    if (!line || getSelection().toString()) return;
    mark(line);
    toggle(line);
  });

  // --- the scatter: axes and lettering in the page's colour, points on a canvas above them

  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
  const SHAPES = [
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z", "M-3.6-3.6H3.6V3.6H-3.6Z", "M0-5L5 0L0 5L-5 0Z", "M0-5L4.6 4H-4.6Z",
    "M0 5L4.6-4H-4.6Z", "M-1.5-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z", "M-5-2.5H5V2.5H-5Z",
  ];
  const techniques = columns.attack.values;
  const looks = techniques.map((_, i) => ({d: SHAPES[i % SHAPES.length], fill: COLOURS[i % COLOURS.length]}));
  inputs.clock = element("select", {onchange: () => change({clock: inputs.clock.value, page: state.page})},
    option("training_steps", "training steps"), option("seconds"));
  const plot = element("div", {class: "gi-plot"});
  const scatter = element("details", {class: "gi-scatter", open: "", ontoggle: drawScatterSoon},
    element("summary", {}, "Quality against time"), element("div", {class: "gi-controls"}, label("time in", inputs.clock)), plot);

  function svg(tag, attributes = {}, ...children) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  const median = values => Float64Array.from(values).sort()[Math.floor((values.length - 1) / 2)];
  let found = [], drawnAt = -1, waiting = 0;

  // After the table, so that it does not wait for this.
  function drawScatterSoon() {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => { waiting = requestAnimationFrame(drawScatter); });
  }

  function drawScatter() {
    drawnAt = plot.clientWidth;
    if (!scatter.open || !drawnAt) return;
    const times = columns[state.clock], dB = columns.psnr, unit = state.clock.replace("_", " ");
    const points = found.filter(row => dB[row] !== null && times[row] > 0);
    if (!points.length) {
      plot.replaceChildren(element("p", {}, "No record of this selection has both a PSNR and a time."));
      return;
    }
    let fast = Infinity, slow = 0, worst = Infinity, best = -Infinity;
    for (const row of points) {
      fast = Math.min(fast, times[row]);
      slow = Math.max(slow, times[row]);
      worst = Math.min(worst, dB[row]);
      best = Math.max(best, dB[row]);
    }
    // Drawn at the width it has, so that its lettering is as large on a phone.
    const W = Math.round(Math.min(720, Math.max(300, drawnAt))), H = 340, left = 46, right = 26, top = 10, bottom = 44;
    const low = Math.floor(Math.log10(fast)), high = Math.max(low + 1, Math.ceil(Math.log10(slow)));
    const step = best > 60 ? 20 : 10, floor = Math.min(0, step * Math.floor(worst / step));
    const ceiling = step * Math.ceil((best + 1) / step);
    const x = value => left + (Math.log10(value) - low) / (high - low) * (W - left - right);
    const y = value => H - bottom - (value - floor) / (ceiling - floor) * (H - top - bottom);
    const codes = columns.attack.codes, parts = techniques.map(() => []);
    for (const row of points) parts[codes[row]].push(row);
    const seen = techniques.map((name, i) => [name, i]).filter(([, i]) => parts[i].length);
    const said = seen.map(([name, i]) => `${name}: ${parts[i].length} records, median `
      + `${median(parts[i].map(row => dB[row])).toFixed(1)} dB at ${brief(median(parts[i].map(row => times[row])))} ${unit}`);
    const drawn = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `PSNR against ${unit}. ${said.join("; ")}.`});
    for (let value = floor; value <= ceiling; value += step) {
      drawn.append(svg("line", {x1: left, x2: W - right, y1: y(value), y2: y(value), class: "gi-grid"}),
        svg("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, String(value)));
    }
    const every = Math.ceil((high - low + 1) * 60 / (W - left - right));
    for (let power = low; power <= high; power += every) {
      const value = 10 ** power;
      drawn.append(svg("line", {x1: x(value), x2: x(value), y1: top, y2: H - bottom, class: "gi-grid"}),
        svg("text", {x: x(value), y: H - bottom + 16, "text-anchor": "middle"},
          power < -2 || power > 5 ? `1e${power}` : value.toLocaleString("en")));
    }
    drawn.append(svg("text", {x: (W + left) / 2, y: H - 6, "text-anchor": "middle"}, `cost in ${unit}`),
      svg("text", {transform: `translate(12 ${(H - bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, "PSNR (dB)"));
    const sharp = window.devicePixelRatio || 1;
    const canvas = element("canvas", {width: Math.round(W * sharp), height: Math.round(H * sharp), "aria-hidden": "true",
      onmousemove: event => {
        const scale = W / canvas.clientWidth, [mx, my] = [event.offsetX * scale, event.offsetY * scale];
        let near = null, most = 64;
        for (const row of points) {
          const far = (x(times[row]) - mx) ** 2 + (y(dB[row]) - my) ** 2;
          if (far < most) [near, most] = [row, far];
        }
        canvas.title = near === null ? "" : `${say(near)}, ${show(near, state.clock)} ${unit}`;
      }});
    const pen = canvas.getContext("2d");
    pen.scale(sharp, sharp);
    pen.globalAlpha = 0.7;
    for (const [, i] of seen) {
      // One stamp a technique; it is drawn again and again, which is quicker than a path for each point.
      const stamp = element("canvas", {width: Math.ceil(12 * sharp), height: Math.ceil(12 * sharp)}), ink = stamp.getContext("2d");
      ink.scale(sharp, sharp);
      ink.translate(6, 6);
      ink.fillStyle = looks[i].fill;
      ink.fill(new Path2D(looks[i].d));
      const taken = new Uint8Array(W * H);  // one point a pixel is what is seen of several
      for (const row of parts[i]) {
        const px = Math.round(x(times[row])), py = Math.round(y(dB[row]));
        if (!taken[py * W + px]) pen.drawImage(stamp, px - 6, py - 6, 12, 12);
        taken[py * W + px] = 1;
      }
    }
    const legend = element("p", {class: "gi-legend"}, ...seen.map(([name, i]) => element("span", {},
      svg("svg", {viewBox: "-6 -6 12 12", "aria-hidden": "true"}, svg("path", looks[i])), name)));
    const out = found.length - points.length;
    plot.replaceChildren(element("div", {style: `max-width:${W}px`}, drawn, canvas), legend, element("p", {class: "caption"},
      `${points.length} records` + (out ? `; ${out} without a PSNR or a time are not drawn.` : ".")));
  }

  // --- everything

  function draw() {
    found = chosen();
    const pages = Math.max(1, Math.ceil(found.length / PAGE)), codes = columns.status.codes, tally = columns.status.values.map(() => 0);
    state.page = Math.min(state.page, pages);
    for (const [name, input] of Object.entries(inputs)) if (input.value !== state[name]) input.value = state[name];
    if ([...FILTERS.slice(FRONT + 1), "above", "floor"].some(name => state[name])) folded.open = true;
    for (const row of found) tally[codes[row]] += 1;
    const bad = columns.status.values.map((status, i) => [tally[i], status]).filter(([n, status]) => n && status !== "ok")
      .map(([n, status]) => `${n} ${status}`);
    count.textContent = `${found.length} of ${N} records` + (bad.length ? `, of these ${bad.join(", ")}` : "");
    drawHead();
    for (const name of shown) {
      const now = state.sort === name ? "ascending" : state.sort === "-" + name ? "descending" : "none";
      heads[name].setAttribute("aria-sort", now);
      heads[name].querySelector("span").textContent = {ascending: " ▲", descending: " ▼", none: ""}[now];
    }
    const start = (state.page - 1) * PAGE;
    body.replaceChildren(...found.slice(start, start + PAGE).map(record));
    if (!found.length) body.append(element("tr", {role: "row"}, element("td", {colspan: shown.length, role: "gridcell"}, "No record fits.")));
    mark(stops()[1] || stops()[0]);
    which.textContent = `page ${state.page} of ${pages}`;
    back.disabled = state.page === 1;
    forth.disabled = state.page === pages;
    drawPair();
    drawScatterSoon();
  }

  box.querySelector(".gi-plain").remove();
  box.append(skip, comparison, controls, count, table, pager, keys, scatter);
  new ResizeObserver(() => {
    if (plot.clientWidth !== drawnAt) drawScatterSoon();
  }).observe(plot);
  window.addEventListener("hashchange", () => { readAddress(); draw(); });
  readAddress();
  draw();
});
