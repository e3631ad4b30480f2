"use strict";
(() => {
  const view = document.getElementById("view");
  const part = (name) => view.querySelector("." + name);
  let shot = null;

  // -- Enlarge: the dialog shows what the page already holds, the picture and the table's row

  const show = (button) => {
    shot = button;
    const picture = part("picture");
    picture.src = document.getElementById(button.dataset.of).getAttribute("href");
    picture.alt = button.dataset.prompt;
    part("prompt").textContent = button.dataset.prompt;
    part("which").textContent = button.dataset.which;
    part("how").textContent = button.dataset.how;
    const row = document.getElementById("cell-" + button.dataset.cell);
    const names = row.closest("table").tHead.rows[0].cells;
    part("figures-of").replaceChildren();
    for (const cell of row.querySelectorAll("td[data-metric]")) {
      if (cell.dataset.v === "") continue;
      const name = document.createElement("dt"), text = document.createElement("dd");
      name.textContent = names[cell.cellIndex].innerText.trim();
      text.textContent = cell.textContent.replace(/\s+/g, " ").trim();
      part("figures-of").append(name, text);
    }
    for (const key of view.querySelectorAll("button[data-move]")) key.disabled = !next(key.dataset.move);
    if (!view.open) view.showModal();
  };

  // The nearest picture in a direction of the grid that it stands in; of another sample of the cell for + and -
  const next = (move) => {
    const at = (button) => [+button.dataset.r, +button.dataset.c, +button.dataset.k];
    const [r, c, k] = at(shot);
    const fits = {
      left: (y, x, s) => y === r && s === k && x < c, right: (y, x, s) => y === r && s === k && x > c,
      up: (y, x, s) => x === c && s === k && y < r, down: (y, x, s) => x === c && s === k && y > r,
      "-": (y, x, s) => y === r && x === c && s < k, "+": (y, x, s) => y === r && x === c && s > k,
    }[move];
    const far = (button) => at(button).reduce((sum, value, i) => sum + Math.abs(value - [r, c, k][i]), 0);
    return [...shot.closest(".board").querySelectorAll(".shot")].filter((button) => fits(...at(button)))
      .sort((a, b) => far(a) - far(b))[0];
  };

  const go = (move) => {
    const found = next(move);
    if (!found) return;
    const chosen = document.getElementById("k" + found.dataset.k);
    if ("+-".includes(move) && chosen) chosen.checked = true;
    show(found);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (event.target === view) view.close();
    else if (button?.matches(".shot")) show(button);
    else if (button?.dataset.move) go(button.dataset.move);
    else if (button?.dataset.close !== undefined) view.close();
    else if (button?.matches("th button")) sort(button.closest("th"));
  });
  view.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down", PageUp: "-", PageDown: "+" }[event.key];
    if (!move) return;
    event.preventDefault();
    go(move);
  });
  view.addEventListener("close", () => shot?.focus());

  // -- Sort: figures as numbers, what was not measured last

  const sort = (head) => {
    const down = head.getAttribute("aria-sort") === "ascending", body = head.closest("table").tBodies[0];
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[head.cellIndex].dataset.v;
    const order = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b) * (down ? -1 : 1);
    const rows = [...body.rows].sort((a, b) => {
      const x = value(a), y = value(b);
      return x === "" || y === "" ? (x === "") - (y === "") : order(x, y);
    });
    body.append(...rows);
  };

  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
})();
