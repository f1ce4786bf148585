// Sorting and searching of the tables. The page is whole without it: buttons and search fields are made here.
(() => {
  "use strict";

  const texts = new Intl.Collator(undefined, { numeric: true });

  // A table is sorted by its groups of lines where it has several (one tbody for each parameter), else by its lines.
  const units = (table) => (table.tBodies.length > 1 ? [...table.tBodies] : [...table.tBodies[0].rows]);

  const key = (unit, column, kind) => {
    const lines = unit.rows ? [...unit.rows] : [unit];
    const cells = lines.map((line) => line.cells[column]).filter(Boolean);
    if (kind === "text") return cells.length ? cells[0].textContent.trim() : "";
    const numbers = cells.map((cell) => parseFloat(cell.dataset.v)).filter((value) => !Number.isNaN(value));
    return numbers.length ? Math.max(...numbers) : NaN;
  };

  const compare = (a, b, kind, sign) => {
    if (kind === "text") return sign * texts.compare(a, b);
    if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // what is missing comes last
    return a === b ? 0 : sign * (a < b ? -1 : 1);
  };

  const sort = (table, column, kind, direction) => {
    const all = units(table);
    const place = new Map(all.map((unit) => [unit, Number(unit.dataset.place)]));
    const keys = new Map(all.map((unit) => [unit, key(unit, column, kind)]));
    const sign = direction === "descending" ? -1 : 1;
    const before = (a, b) => place.get(a) - place.get(b);
    all.sort(direction === "none" ? before : (a, b) => compare(keys.get(a), keys.get(b), kind, sign) || before(a, b));
    all[0]?.parentNode.append(...all);
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    units(table).forEach((unit, i) => { unit.dataset.place = i; });
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const kind = head.dataset.sort; // "text", or "up" and "down" for numbers, by the end that is read first
      if (!kind) return;
      const first = kind === "down" ? "descending" : "ascending";
      const second = kind === "down" ? "ascending" : "descending";
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const next = now === first ? second : now === second ? "none" : first;
        for (const other of heads) other.removeAttribute("aria-sort");
        if (next !== "none") head.setAttribute("aria-sort", next);
        sort(table, column, kind, next);
      });
    });
  }

  for (const box of document.querySelectorAll(".search")) {
    const table = document.getElementById(box.dataset.table);
    const field = box.querySelector("input");
    const count = box.querySelector("output");
    const groups = [...table.tBodies];
    const names = new Map(groups.map((group) => [group, group.rows[0].cells[0].textContent.toLowerCase()]));
    box.hidden = false;
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const group of groups) {
        group.hidden = !words.every((word) => names.get(group).includes(word));
        shown += group.hidden ? 0 : 1;
      }
      count.textContent = words.length ? `${shown} of ${groups.length}` : "";
    });
  }

  // What is folded on the screen is printed.
  const folded = () => [...document.querySelectorAll("details:not([open])")];
  let opened = [];
  addEventListener("beforeprint", () => { opened = folded(); for (const one of opened) one.open = true; });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
})();
