// A long table gets a field above it that leaves the rows with all the words typed; without scripts all rows stay.
for (const table of document.querySelectorAll(".md-typeset table:not([class])")) {
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 60) continue;
  const field = document.createElement("input"), told = document.createElement("output"), bar = document.createElement("div");
  Object.assign(field, { type: "search", placeholder: "Search this table" });
  field.setAttribute("aria-label", "Search this table");
  bar.className = "search-table";
  bar.append(field, told);
  (table.closest(".md-typeset__scrollwrap") ?? table).before(bar);
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    told.textContent = words.length ? `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows` : "";
  });
}
