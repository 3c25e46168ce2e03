// Notes on terms: by pointer, tap or Tab; Escape closes them. The texts stand in the list at the end of the page.
// The page of sd explain has this script, too.

const tip = document.createElement("span");
let leaving = null;
tip.id = "tip";
tip.setAttribute("role", "tooltip");

function explain(button) {
  clearTimeout(leaving);
  if (tip.previousSibling === button) return;
  tip.replaceChildren(...[...document.getElementById("term-" + button.dataset.term).children].map((part, i) => {
    const element = document.createElement(i ? "small" : "b");
    element.append(...[...part.childNodes].map(node => node.cloneNode(true)));
    return element;
  }));
  button.after(tip);  // so that the Tab key goes on to its link
  button.setAttribute("aria-describedby", "tip");
  tip.style.left = tip.style.top = "0";
  const box = button.getBoundingClientRect(), own = tip.getBoundingClientRect(), room = document.documentElement.clientWidth - own.width - 8;
  tip.style.left = Math.max(8, Math.min(room, box.left)) - own.left + "px";
  tip.style.top = (box.bottom + own.height + 8 > innerHeight && box.top > own.height + 8 ? box.top - own.height - 4 : box.bottom + 4) - own.top + "px";
}

function forget() {
  tip.previousSibling?.removeAttribute?.("aria-describedby");
  tip.remove();
}
const near = event => event.target.closest?.(".term, #tip");
const reach = event => {
  const found = near(event);
  if (!found) return;
  if (found === tip) clearTimeout(leaving); else explain(found);
};
const leave = event => {
  if (!near(event) || event.relatedTarget?.closest?.("#tip")) return;
  clearTimeout(leaving);
  leaving = setTimeout(() => { if (!document.activeElement.closest(".term, #tip")) forget(); }, 250);
};

export function explainTerms() {
  for (const kind of ["mouseover", "focusin", "click"]) document.addEventListener(kind, reach);
  for (const kind of ["mouseout", "focusout"]) document.addEventListener(kind, leave);
  document.addEventListener("pointerdown", event => { if (!near(event)) forget(); });
  document.addEventListener("keydown", event => { if (event.key === "Escape") forget(); });
}

export function term(name, text, parent) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "term";
  button.dataset.term = name;
  button.textContent = text;
  parent.append(button);
  return button;
}
