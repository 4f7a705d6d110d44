// Keyboard access for wide tables and equations: what scrolls sideways can be focused and scrolled by the arrow keys.
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".pst-scrollable-table-container, div.math, .output pre")) {
    if (!box.hasAttribute("tabindex")) box.setAttribute("tabindex", "0");
  }
});
