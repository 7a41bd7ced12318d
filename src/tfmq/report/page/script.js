"use strict";

// The line between full precision and quantized, in all images at once.
const divide = document.getElementById("divide");
if (divide) {
  const move = () => document.getElementById("wall").style.setProperty("--divide", `${divide.value}%`);
  divide.addEventListener("input", move);
  move();
}

// Columns sort by number where a cell has one, else by text; what was not measured stays last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const text = cell.dataset.value ?? cell.textContent.trim();
        return text === "" ? null : cell.classList.contains("number") ? Number(text) : text;
      };
      const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : (down ? -1 : 1) * compare(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

// The plotting library is compressed in the page; figures take their colours from the page's own light or dark ones.
async function plot() {
  const packed = Uint8Array.from(atob(document.getElementById("library").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const library = document.createElement("script");
  library.textContent = await new Response(stream).text();
  document.head.append(library);
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const [text, line] = ["--text", "--line"].map((name) => style.getPropertyValue(name).trim());
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line };
    return { text, axis };
  };
  const themed = (layout) => {
    const { text, axis } = colours();
    const clear = "rgba(0,0,0,0)";
    return { ...layout, paper_bgcolor: clear, plot_bgcolor: clear, font: { color: text }, xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis } };
  };
  const figures = [...document.querySelectorAll("script[data-chart]")].map((source) => [document.getElementById(source.dataset.chart), JSON.parse(source.textContent)]);
  // Otherwise a figure that is drawn anew for another width loses its height, and what follows moves up under it.
  for (const [place, figure] of figures) place.style.height = `${figure.layout.height}px`;
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  const draw = () => Promise.all(figures.map(([place, figure]) => Plotly.react(place, figure.data, themed(figure.layout), options)));
  await draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

if (document.getElementById("library")) {
  const drawn = typeof DecompressionStream === "undefined" ? Promise.reject() : plot();
  drawn.then(
    () => { document.documentElement.dataset.drawn = "yes"; },
    (error) => {
      document.getElementById("no-plot").hidden = false;
      if (error) throw error;
    },
  );
}
