"use strict";
const { levels, panels } = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("level");
const search = document.getElementById("search");

function show() {
  const index = Number(slider.value);
  const [name, numbers] = levels[index];
  document.getElementById("level-name").textContent = name;
  const groups = Object.entries(numbers).map(([name, value]) => {
    const group = document.createElement("div");
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    group.append(term, text);
    return group;
  });
  document.getElementById("numbers").replaceChildren(...groups);
  for (const { name, moving, points } of panels) {
    if (moving !== null) {
      const [x, y] = points[index];
      Plotly.restyle(name, { x: [x], y: [y] }, [moving]);
    }
  }
  list();
}

function list() {
  if (search === null) return;
  const wanted = search.value.toLowerCase();
  let shown = 0;
  for (const row of document.querySelectorAll("#changed > tbody > tr")) {
    const fits = row.textContent.toLowerCase().includes(wanted);
    row.hidden = row.dataset.level !== slider.value || !fits;
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent =
    shown === 1 ? "1 prompt" : `${shown} prompts`;
}

for (const { name, traces, layout } of panels) {
  Plotly.newPlot(name, traces, layout, { responsive: true, displaylogo: false });
}
if (search !== null) search.addEventListener("input", list);
if (slider !== null) {
  slider.addEventListener("input", show);
  show();
}
