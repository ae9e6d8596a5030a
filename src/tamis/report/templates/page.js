"use strict";
const page = JSON.parse(document.getElementById("page").textContent);
const byId = (id) => document.getElementById(id);

// --- light and dark ---
const stored = (name, value) => {
  try {
    if (value !== undefined) localStorage.setItem(name, value);
    return localStorage.getItem(name);
  } catch { return null; } // a browser may refuse it to files
};
if (stored("tamis-theme")) document.documentElement.dataset.theme = stored("tamis-theme");
byId("theme").addEventListener("click", () => {
  const shown = document.documentElement.dataset.theme;
  const isDark = shown ? shown === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = isDark ? "light" : "dark";
  stored("tamis-theme", document.documentElement.dataset.theme);
});

// --- a run that is going on ---
if (page.version_url) {
  const [url, version] = page.version_url.split("#");
  setInterval(async () => {
    const answer = await fetch(url).then((response) => response.text(), () => version);
    if (answer !== version && !byId("detail").open) location.reload();
  }, 5000);
}

// --- rows ---
const unpacked = async (text) => {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
};

const showRows = async () => {
  const found = await unpacked(byId("data").textContent.trim());
  const names = Object.keys(found.columns);
  const rows = found.columns.place.map((_, i) => {
    const row = Object.fromEntries(names.map((name) => [name, found.columns[name][i]]));
    row.source = found.sources[row.source];
    row.border = row.p_right === null ? 2 : Math.abs(row.p_right - 0.5);
    return row;
  });
  if (rows.some((row) => Math.max((row.prompt ?? "").length, (row.response ?? "").length) >= found.limit))
    byId("cut").textContent = `Texts are cut after ${found.limit} characters.`;
  const marks = new Set();
  const isNarrow = matchMedia("(max-width: 600px)").matches;
  const number = (digits) => (cell) => cell.getValue() === null ? "" : Number(cell.getValue()).toFixed(digits);
  const columns = [
    { title: "kept", field: "kept", formatter: (cell) => (cell.getValue() ? "yes" : "no"), width: 78 },
    { title: "p right", field: "p_right", formatter: number(3), hozAlign: "right", width: 96, visible: page.is_believed },
    { title: "weight", field: "weight", formatter: number(2), hozAlign: "right", width: 98, visible: !isNarrow },
    { title: "score", field: "score", formatter: number(3), hozAlign: "right", width: 92, visible: !isNarrow && page.is_believed },
    { title: "prompt", field: "prompt", widthGrow: 3, minWidth: 110 },
    { title: "response", field: "response", widthGrow: 3, minWidth: 110 },
    { title: "length", field: "length", hozAlign: "right", width: 98, visible: !isNarrow },
    { title: "label", field: "label", width: 110, visible: !isNarrow && "label" in found.columns },
    { title: "source", field: "source", width: 120, visible: !isNarrow && found.sources.length > 1 },
    { title: "row", field: "row", hozAlign: "right", width: 76, visible: !isNarrow },
  ];
  const table = new Tabulator("#table", {
    data: rows, columns, index: "place", layout: "fitColumns", height: isNarrow ? "70vh" : "620px",
    pagination: true, paginationSize: 50, paginationSizeSelector: [50, 200, 1000], paginationCounter: "rows",
    columnDefaults: { resizable: false, headerSortTristate: true }, placeholder: "No row fits.",
    rowFormatter: (row) => {
      const element = row.getElement();
      element.tabIndex = 0;
      element.classList.toggle("marked", marks.has(row.getIndex()));
      element.classList.toggle("dropped", !row.getData().kept);
    },
  });
  await new Promise((resolve) => table.on("tableBuilt", resolve));

  const orders = {
    worst: page.is_believed ? [["p_right", "asc"]] : [["weight", "asc"]],
    best: page.is_believed ? [["p_right", "desc"]] : [["weight", "desc"]],
    border: [["border", "asc"]],
  };
  for (const button of document.querySelectorAll("[data-order]")) {
    button.disabled = button.dataset.order === "border" && !page.is_believed;
    button.addEventListener("click", () => {
      for (const other of document.querySelectorAll("[data-order]")) other.setAttribute("aria-pressed", other === button);
      rows.sort((a, b) => compare(a, b, ...orders[button.dataset.order][0]));
      table.clearSort();
      table.replaceData(rows);
    });
  }
  const compare = (a, b, name, direction) => {
    const [x, y] = [a[name] ?? Infinity, b[name] ?? Infinity];
    return (direction === "asc" ? x - y : y - x) || (b.score ?? 0) - (a.score ?? 0) || a.place - b.place;
  };

  // --- search and filter ---
  const refilter = () => {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const which = byId("filter").value;
    table.setFilter((row) => {
      if (which === "kept" && !row.kept) return false;
      if (which === "dropped" && row.kept) return false;
      if (which === "marked" && !marks.has(row.place)) return false;
      const text = `${row.prompt ?? ""}\n${row.response ?? ""}\n${row.label ?? ""}\n${row.source}`.toLowerCase();
      return words.every((word) => text.includes(word));
    });
  };
  let waiting;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refilter, 150); });
  byId("filter").addEventListener("change", refilter);

  // --- marks ---
  const storage = `tamis-marks ${found.columns.hash.length} ${found.columns.hash[0]} ${found.columns.hash.at(-1)}`;
  for (const place of JSON.parse(stored(storage) ?? "[]")) marks.add(place);
  const remember = () => {
    stored(storage, JSON.stringify([...marks]));
    byId("export").disabled = marks.size === 0;
    byId("export").textContent = marks.size ? `Export ${marks.size} mark${marks.size > 1 ? "s" : ""}` : "Export marks";
  };
  const toggle = (row) => {
    if (!marks.delete(row.place)) marks.add(row.place);
    remember();
    table.getRow(row.place)?.reformat();
  };
  byId("export").addEventListener("click", () => {
    const lines = rows.filter((row) => marks.has(row.place)).sort((a, b) => a.place - b.place).map((row) =>
      JSON.stringify({ source: row.source, row: row.row, content_hash: row.hash, keep: !row.kept }) + "\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = "marks.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  remember();

  // --- one row ---
  let open = null;
  const fill = (row) => {
    open = row;
    const facts = [`${row.source}, row ${row.row}`, row.kept ? "kept" : "dropped", `weight ${row.weight}`];
    if (row.p_right !== null) facts.push(`right with probability ${row.p_right}`);
    if (row.score !== null) facts.push(`score ${row.score}`);
    byId("where").textContent = facts.join(", ");
    byId("prompt").textContent = row.prompt ?? "(no text)";
    byId("response").textContent = row.response ?? "(no text)";
    byId("disagree").setAttribute("aria-pressed", marks.has(row.place));
    byId("disagree").textContent = row.kept ? "I disagree: drop it" : "I disagree: keep it";
    const nearest = byId("nearest");
    nearest.replaceChildren();
    for (const place of found.neighbours[row.place] ?? []) {
      const title = document.createElement("h3");
      title.textContent = "A trusted row near it";
      const text = document.createElement("pre");
      text.textContent = found.trusted[place].join("\n");
      nearest.append(title, text);
    }
    if (!byId("detail").open) byId("detail").showModal();
  };
  const step = (by) => {
    const active = table.getData("active");
    const next = active[active.findIndex((row) => row.place === open.place) + by];
    if (next) fill(next);
  };
  table.on("rowClick", (event, row) => fill(row.getData()));
  byId("table").addEventListener("keydown", (event) => {
    const row = event.target.closest(".tabulator-row");
    if (!row || row !== event.target) return;
    const data = table.getRows("visible").find((other) => other.getElement() === row)?.getData();
    if (event.key === "Enter" && data) fill(data);
    if (event.key === "d" && data) toggle(data);
  });
  byId("previous").addEventListener("click", () => step(-1));
  byId("following").addEventListener("click", () => step(1));
  byId("disagree").addEventListener("click", () => { toggle(open); fill(open); });
  document.addEventListener("keydown", (event) => {
    const isTyping = /INPUT|SELECT|TEXTAREA/.test(event.target.tagName);
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); byId("search").focus(); }
    if (!byId("detail").open) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    if (event.key === "d") { toggle(open); fill(open); }
  });
  document.querySelector('[data-order="worst"]').click();
  document.documentElement.dataset.ready = "true";
};
if (byId("table")) showRows();
