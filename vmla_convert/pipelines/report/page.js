
"use strict";

// Tables are sorted by the values in data-sort; a cell without one is absent and stays last.
function compareRows(column, numeric, sign) {
  const key = (row) => row.cells[column].dataset.sort;
  return (one, two) => {
    const [a, b] = [key(one), key(two)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
}

function sortBy(header) {
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = header.closest("table").tBodies[0];
  const numeric = header.dataset.kind === "number";
  body.append(...[...body.rows].sort(compareRows(header.cellIndex, numeric, ascending ? 1 : -1)));
}

// Made here, not in the page's text, so that without a script there is no button that does nothing.
function button(label, action) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = label;
  element.addEventListener("click", action);
  return element;
}

for (const header of document.querySelectorAll("thead th")) {
  header.replaceChildren(button(header.textContent, () => sortBy(header)));
}

const scheme = document.documentElement.style;
const system = matchMedia("(prefers-color-scheme: dark)");
const toggle = button("◐", () => {
  const dark = scheme.colorScheme ? scheme.colorScheme === "dark" : system.matches;
  scheme.colorScheme = dark ? "light" : "dark";
});
toggle.title = toggle.ariaLabel = "Light or dark";
document.querySelector("header").append(toggle);

// The contents stand beside the text where there is room, and are folded above it on a phone.
const contents = document.querySelector("nav details");
const roomy = matchMedia("(min-width: 72rem)");
const fold = () => (contents.open = roomy.matches);
roomy.addEventListener("change", fold);
fold();
