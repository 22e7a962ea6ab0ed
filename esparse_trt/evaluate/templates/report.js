// Sort a table by a click on a heading. Cells carry the exact value in data-v; absent values stay last.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.v ?? "";
      const compare = (a, b) => (head.classList.contains("n") ? a - b : a.localeCompare(b, undefined, { numeric: true }));
      const rows = [...body.rows].sort((x, y) => {
        const [a, b] = [key(x), key(y)];
        if (a === "" || b === "") return (a === "") - (b === "");
        return down ? compare(b, a) : compare(a, b);
      });
      body.append(...rows);
    });
  });
}
