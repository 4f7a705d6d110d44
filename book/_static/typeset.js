// Typesets the formulas of a page with KaTeX. Sphinx writes \(...\) and \[...\]; a bare environment is a display too.
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".math.notranslate")) {
    const number = box.querySelector(".eqno");
    number?.remove();
    const tex = box.textContent.trim().replace(/^\\[([]|\\[)\]]$/g, "");
    katex.render(tex, box, {displayMode: box.tagName === "DIV", throwOnError: false});
    if (number) box.prepend(number);
  }
});
