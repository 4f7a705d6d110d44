// A new element, for the scripts of single pages: attributes that begin with "on" are listeners, null leaves one out.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Keyboard access for wide tables, equations and outputs: what scrolls sideways, and only that, is a region that can be
// focused and scrolled by the arrow keys. Its name is that of the section in which it stands.
document.addEventListener("DOMContentLoaded", () => {
  const boxes = ".gi-scroll-x, .indextable, .pst-scrollable-table-container, .cell_output, div.math, .katex-display, .output pre";
  const kind = (box) => (box.querySelector("table") ? "Table" : box.matches("div.math, .katex-display") ? "Equation" : "Output");
  const update = (box) => {
    const scrolls = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
    if (!scrolls) {
      for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
      return;
    }
    const heading = box.closest("section")?.querySelector("h1, h2, h3")?.firstChild?.textContent.trim();
    box.setAttribute("tabindex", "0");
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", kind(box) + " that scrolls" + (heading ? ": " + heading : ""));
  };
  const watch = new ResizeObserver((entries) => entries.forEach((entry) => update(entry.target.closest(boxes))));
  for (const box of document.querySelectorAll(boxes)) {
    for (const one of [box, ...box.querySelectorAll("table")]) watch.observe(one);
  }
  // The fonts of formulas come later, and widen what is in a box, not the box.
  document.fonts.ready.then(() => document.querySelectorAll(boxes).forEach(update));
});
