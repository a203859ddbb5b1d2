// Runs before the page is drawn, so that the page does not flash in the other theme.
"use strict";
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("buquet-theme");
  } catch {
    // without storage, the system's theme is used
  }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
})();
