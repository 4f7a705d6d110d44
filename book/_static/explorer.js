// The results explorer: reads the records that the page holds as JSON and shows them as a table that can be searched,
// filtered and sorted, and as a scatter of quality against time. It asks for nothing but the pictures in ../results/.
// The state is kept in the address, as #model=lenet&sort=-psnr, so that a view can be linked to.
document.addEventListener("DOMContentLoaded", () => {
  const box = document.getElementById("gi-explorer");
  if (!box) return;
  const data = JSON.parse(box.querySelector("script").textContent);
  const at = Object.fromEntries(data.columns.map((name, i) => [name, i]));
  const rows = data.rows, PAGE = 50, folder = box.dataset.results;

  const TITLES = {
    attack: "technique", above: "dB above floor", recall: "recovered", psnr: "PSNR (dB)", ssim: "SSIM", lpips: "LPIPS", label_accuracy: "labels",
    training_steps: "training steps", threat_letter: "threat", key: "key",
  };
  const FILTERS = ["attack", "model", "dataset", "study", "status"];
  const EMPTY = {weights: "untrained", defense: "none"};
  const NUMBERS = {
    psnr: v => v.toFixed(1), above: v => v.toFixed(1), identified: v => Math.round(100 * v) + " %",
    recall: v => Math.round(100 * v) + " %", ssim: v => v.toFixed(3), lpips: v => v.toFixed(3),
    label_accuracy: v => Math.round(100 * v) + " %", seconds: v => brief(v), steps: v => String(v),
    training_steps: v => brief(v),
  };
  const COLUMNS = data.columns.filter(name => name !== "picture" && name !== "error");
  const SVG = "http://www.w3.org/2000/svg";

  const title = name => TITLES[name] || name;
  const brief = v => v >= 1000 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(3)));
  const show = (row, name) => {
    const value = row[at[name]];
    if (value === null) return EMPTY[name] || "";
    return NUMBERS[name] ? NUMBERS[name](value) : String(value);
  };
  const texts = new Map(rows.map(row => [row, [...COLUMNS.map(name => show(row, name)), row[at.error] || ""]
    .join(" ").toLowerCase()]));

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== null) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  // --- state, from the address and back to it

  const fresh = () => ({q: "", sort: "", page: 1, clock: "training_steps",
    ...Object.fromEntries(FILTERS.map(name => [name, ""]))});
  let state = fresh();

  function readAddress() {
    state = fresh();
    if (!location.hash.includes("=")) return;
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
    const text = new URLSearchParams(changed).toString();
    history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  }

  // --- controls

  const inputs = {};
  inputs.q = element("input", {type: "search", placeholder: "any word, several words: all of them",
    oninput: () => change({q: inputs.q.value})});
  const controls = element("form", {class: "gi-controls", role: "search", "aria-label": "Filter the records",
    onsubmit: event => event.preventDefault()}, element("label", {class: "gi-wide"}, "search", inputs.q));
  for (const name of FILTERS) {
    const values = [...new Set(rows.map(row => row[at[name]]))].sort();
    inputs[name] = element("select", {onchange: () => change({[name]: inputs[name].value})},
      element("option", {value: ""}, "all"), ...values.map(value => element("option", {value}, value)));
    controls.append(element("label", {}, title(name), inputs[name]));
  }
  controls.append(element("button", {type: "button", onclick: () => change(fresh())}, "Show all"));

  const count = element("p", {class: "gi-count", role: "status", "aria-live": "polite"});
  const heads = {};
  const line = element("tr", {}, element("th", {scope: "col"}, "picture"));
  for (const name of COLUMNS) {
    heads[name] = element("th", {scope: "col", "aria-sort": "none"},
      element("button", {type: "button", onclick: () => {
        // First click: best or first on top; second: the other way round; third: the order of the records.
        const first = NUMBERS[name] && !["lpips", "seconds", "steps", "training_steps"].includes(name) ? "-" : "";
        const second = first ? "" : "-";
        change({sort: state.sort === first + name ? second + name : state.sort === second + name ? "" : first + name});
      }}, title(name), element("span", {"aria-hidden": "true"})));
    line.append(heads[name]);
  }
  const body = element("tbody");
  const table = element("div", {class: "gi-scroll", tabindex: "0", role: "region", "aria-label": "Records"},
    element("table", {class: "gi-records"}, element("thead", {}, line), body));
  const back = element("button", {type: "button", onclick: () => turn(-1)}, "Previous");
  const forth = element("button", {type: "button", onclick: () => turn(1)}, "Next");
  const where = element("span");
  const pager = element("nav", {class: "gi-pager", "aria-label": "Pages of the table"}, back, where, forth);

  inputs.clock = element("select", {onchange: () => change({clock: inputs.clock.value})},
    element("option", {value: "training_steps"}, "training steps"), element("option", {value: "seconds"}, "seconds"));
  const plot = element("div", {class: "gi-plot"});
  const scatter = element("details", {class: "gi-scatter", open: ""}, element("summary", {}, "Quality against time"),
    element("div", {class: "gi-controls"}, element("label", {}, "time in", inputs.clock)), plot);

  // --- which rows

  function chosen() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter(row => FILTERS.every(name => !state[name] || row[at[name]] === state[name])
      && words.every(word => texts.get(row).includes(word)));
    if (!state.sort) return found;
    const down = state.sort.startsWith("-"), i = at[state.sort.replace("-", "")];
    // Rows without a value stay at the end whichever way it is sorted.
    return found.sort((a, b) => {
      const [x, y] = [a[i], b[i]];
      if (x === null || y === null) return (x === null) - (y === null);
      const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order;
    });
  }

  function change(part) {
    Object.assign(state, {page: 1}, part);
    writeAddress();
    draw();
  }

  function turn(by) {
    state.page += by;
    writeAddress();
    draw();
    table.scrollTop = 0;
    table.scrollIntoView({block: "nearest"});
  }

  // --- the table

  function say(row) {
    const dB = row[at.psnr] === null ? "" : `, ${show(row, "psnr")} dB`;
    return `${show(row, "attack")} on ${show(row, "model")}, ${show(row, "dataset")}${dB}`;
  }

  function picture(row, shown) {
    const source = `${folder}${encodeURIComponent(row[at.study])}/${encodeURIComponent(row[at.key])}.png`;
    return element("img", {src: source, loading: "lazy", decoding: "async", class: "dark-light",
      alt: `Private above, reconstructed below: ${say(row)}`,
      style: `width:${shown * Math.min(row[at.picture], 4)}px`});
  }

  function details(row, id) {
    const facts = element("div", {}, element("p", {}, say(row)));
    if (row[at.picture]) facts.append(element("p", {}, "Above: private. Below: reconstructed."));
    if (row[at.error]) facts.append(element("p", {}, `Reason: ${row[at.error]}`));
    const file = `${folder}${encodeURIComponent(row[at.study])}.jsonl`;
    facts.append(element("p", {}, `Record ${row[at.key]} of `, element("a", {href: file}, `${row[at.study]}.jsonl`)));
    return element("tr", {id, class: "gi-details"}, element("td", {colspan: COLUMNS.length + 1},
      element("div", {}, ...(row[at.picture] ? [picture(row, 160)] : []), facts)));
  }

  function record(row) {
    const id = `gi-${row[at.study]}-${row[at.key]}`;
    const button = element("button", {type: "button", "aria-expanded": "false",
      "aria-label": `Details of ${say(row)}`, onclick: () => {
        const open = button.getAttribute("aria-expanded") === "true";
        button.setAttribute("aria-expanded", String(!open));
        if (open) made.nextSibling.remove();
        else made.after(details(row, id));
      }}, row[at.picture] ? picture(row, 32) : row[at.status] === "ok" ? "none" : "why?");
    const made = element("tr", {}, element("td", {}, button));
    for (const name of COLUMNS) {
      const cell = element("td", {class: NUMBERS[name] ? "gi-number" : null}, show(row, name));
      if (name === "status" && row[at.error]) {
        cell.append(element("span", {class: "gi-reason", title: row[at.error]}, row[at.error]));
      }
      made.append(cell);
    }
    return made;
  }

  // --- the scatter

  const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
  const SHAPES = [
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z", "M-3.6-3.6H3.6V3.6H-3.6Z", "M0-5L5 0L0 5L-5 0Z", "M0-5L4.6 4H-4.6Z",
    "M0 5L4.6-4H-4.6Z", "M-1.5-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z", "M-5-2.5H5V2.5H-5Z",
  ];
  const techniques = [...new Set(rows.map(row => row[at.attack]))];
  const look = name => {
    const i = techniques.indexOf(name);
    return {d: SHAPES[i % SHAPES.length], fill: COLOURS[i % COLOURS.length]};
  };

  function svg(tag, attributes = {}, ...children) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  let drawnAt = -1;
  const median = values => [...values].sort((a, b) => a - b)[Math.floor((values.length - 1) / 2)];

  function drawScatter(found) {
    drawnAt = plot.clientWidth;
    const points = found.filter(row => row[at.psnr] !== null && row[at[state.clock]] > 0);
    const unit = title(state.clock);
    if (!points.length) {
      plot.replaceChildren(element("p", {}, "No record of this selection has both a PSNR and a time."));
      return;
    }
    // Drawn at the width it has, so that its lettering is as large on a phone.
    const W = Math.min(720, Math.max(300, plot.clientWidth || 640)), H = 340, left = 46, right = 26, top = 10, bottom = 44;
    const logs = points.map(row => Math.log10(row[at[state.clock]]));
    const low = Math.floor(Math.min(...logs)), high = Math.max(low + 1, Math.ceil(Math.max(...logs)));
    const dB = points.map(row => row[at.psnr]);
    const step = Math.max(...dB) > 60 ? 20 : 10;
    const floor = Math.min(0, step * Math.floor(Math.min(...dB) / step));
    const ceiling = step * Math.ceil((Math.max(...dB) + 1) / step);
    const x = value => left + (Math.log10(value) - low) / (high - low) * (W - left - right);
    const y = value => H - bottom - (value - floor) / (ceiling - floor) * (H - top - bottom);
    const groups = techniques.filter(name => points.some(row => row[at.attack] === name));
    const said = groups.map(name => {
      const mine = points.filter(row => row[at.attack] === name);
      return `${name}: ${mine.length} records, median ${median(mine.map(row => row[at.psnr])).toFixed(1)} dB at `
        + `${brief(median(mine.map(row => row[at[state.clock]])))} ${unit}`;
    });
    const drawn = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img",
      "aria-label": `PSNR against ${unit}. ${said.join("; ")}.`});
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
    for (const row of points) {
      drawn.append(svg("path", {...look(row[at.attack]), "fill-opacity": ".7", stroke: "none",
        transform: `translate(${x(row[at[state.clock]]).toFixed(1)} ${y(row[at.psnr]).toFixed(1)})`},
        svg("title", {}, `${say(row)}, ${show(row, state.clock)} ${unit}`)));
    }
    const legend = element("p", {class: "gi-legend"}, ...groups.map(name => {
      const sign = svg("svg", {viewBox: "-6 -6 12 12", "aria-hidden": "true"}, svg("path", look(name)));
      return element("span", {}, sign, name);
    }));
    const out = found.length - points.length;
    const note = `${points.length} records` + (out ? `; ${out} without a PSNR or a time are not drawn.` : ".");
    plot.replaceChildren(drawn, legend, element("p", {class: "caption"}, note));
  }

  // --- everything

  function draw() {
    const found = chosen(), pages = Math.max(1, Math.ceil(found.length / PAGE));
    state.page = Math.min(state.page, pages);
    for (const [name, input] of Object.entries(inputs)) if (input.value !== state[name]) input.value = state[name];
    const bad = ["failed", "not applicable"].map(status => [found.filter(row => row[at.status] === status).length, status])
      .filter(([n]) => n).map(([n, status]) => `${n} ${status}`);
    count.textContent = `${found.length} of ${rows.length} records` + (bad.length ? `, of these ${bad.join(", ")}` : "");
    for (const name of COLUMNS) {
      const now = state.sort === name ? "ascending" : state.sort === "-" + name ? "descending" : "none";
      heads[name].setAttribute("aria-sort", now);
      heads[name].querySelector("span").textContent = {ascending: " ▲", descending: " ▼", none: ""}[now];
    }
    const start = (state.page - 1) * PAGE;
    body.replaceChildren(...found.slice(start, start + PAGE).map(record));
    if (!found.length) {
      body.append(element("tr", {}, element("td", {colspan: COLUMNS.length + 1}, "No record fits.")));
    }
    where.textContent = `page ${state.page} of ${pages}`;
    back.disabled = state.page === 1;
    forth.disabled = state.page === pages;
    drawScatter(found);
  }

  box.querySelector(".gi-plain").remove();
  box.append(controls, count, scatter, table, pager);
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (plot.clientWidth && plot.clientWidth !== drawnAt) drawScatter(chosen());
  })).observe(plot);
  window.addEventListener("hashchange", () => { readAddress(); draw(); });
  readAddress();
  draw();
});
