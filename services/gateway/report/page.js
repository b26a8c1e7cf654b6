"use strict";
// Sorting, filtering and a short first look of the slice table; without it the table stands whole, the surest slices first.
(() => {
  const table = document.getElementById("slice-table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const firstLook = 20;
  let whole = false;
  const heads = [...table.tHead.rows[0].cells];
  const tags = (row) => [...row.querySelectorAll(".tags .attribute, .tags b")].map((part) => part.textContent);
  const words = new Map(rows.map((row) => [row, tags(row).join(" ").toLowerCase().replace(/\s+/g, " ").trim()]));
  const value = (row, key) => (key === "tags" ? words.get(row) : Number(row.dataset[key]));

  const sort = (head) => {
    const was = head.getAttribute("aria-sort");
    const first = head.dataset.first || "ascending";
    const now = was ? (was === "ascending" ? "descending" : "ascending") : first;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", now);
    const key = head.dataset.key;
    const sign = now === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [value(a, key), value(b, key)];
      return sign * (x < y ? -1 : x > y ? 1 : 0) || a.dataset.place - b.dataset.place;
    });
    body.append(...rows);
    show();
  };
  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head));
    head.append(button);
  }

  const form = document.getElementById("filter");
  const text = document.getElementById("filter-text");
  const count = document.getElementById("filter-count");
  const luck = document.getElementById("filter-luck");
  const none = document.getElementById("none-left");
  const more = document.getElementById("show-all");
  const show = () => {
    const wanted = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const least = Number(count.value) || 0;
    let matching = 0;
    for (const row of rows) {
      const out = Number(row.dataset.count) < least || (luck.checked && row.classList.contains("luck"));
      row.hidden = out || !wanted.every((word) => words.get(row).includes(word));
      matching += row.hidden ? 0 : 1;
      row.classList.toggle("later", !whole && matching > firstLook);
    }
    const shown = whole ? matching : Math.min(matching, firstLook);
    document.getElementById("filter-shown").textContent = `${shown} of ${matching} matching slices shown`;
    none.hidden = matching > 0;
    more.hidden = shown === matching;
    more.textContent = `Show ${matching - shown} more`;
  };
  form.hidden = false;
  form.addEventListener("input", show);
  more.addEventListener("click", () => {
    whole = true;
    const next = rows.find((row) => row.classList.contains("later") && !row.hidden);
    show();
    next.tabIndex = -1;
    next.focus({ preventScroll: true });
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  document.getElementById("filter-clear").addEventListener("click", () => {
    form.reset();
    show();
    text.focus();
  });
  show();
})();
