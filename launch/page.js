"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = [...document.querySelectorAll("pre span")];
const number = new Map(tokens.map((token, i) => [token, i]));
const panel = document.querySelector("#panel div");
let current = -1;
function show(i) {
  if (i === undefined || !tokens[i]) return;
  tokens[current]?.classList.remove("on");
  tokens[current = i].classList.add("on");
  const parts = data.columns.map((column) => [column.label, column.values[i]]);
  if (data.prompt[i]) parts.unshift(["prompt", "not a target"]);
  parts.unshift(["token", i + 1 + " of " + tokens.length]);
  panel.replaceChildren(...parts.map(([label, value]) => {
    const part = document.createElement("span");
    const name = document.createElement("em");
    name.textContent = label + " ";
    part.append(name, typeof value === "number" ? String(+value.toPrecision(4)) : value);
    return part;
  }));
}
for (const event of ["pointerover", "click"])
  document.addEventListener(event, (e) => show(number.get(e.target.closest("pre span"))));
document.addEventListener("keydown", (e) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
  if (!by || current < 0 || e.target.matches("input")) return;
  e.preventDefault();
  show(current + by);
  tokens[current].scrollIntoView({ block: "nearest" });
});
for (const input of document.querySelectorAll("input[name=by]"))
  input.addEventListener("change", () => { document.documentElement.dataset.by = input.value; });
