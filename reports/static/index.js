// Search, filters and order of the table, kept in the address so that a view can be shared.
"use strict";
(() => {
  const form = document.querySelector(".tools");
  const body = document.querySelector(".papers tbody");
  const status = document.querySelector(".status");
  const rows = [...body.rows];
  const start = new Map(rows.map((row, position) => [row, position]));
  const text = new Map(rows.map((row) => [row, `${row.cells[0].textContent} ${row.dataset.topic} ${row.dataset.year} ${row.dataset.text}`.toLowerCase()]));
  const fields = ["q", "verdict", "topic", "scale"];
  const numeric = new Set(["year", "claims", "margin", "seeds", "duration"]);
  let state = {};
  let sorted = "verdict"; // the order in which the page comes

  // An address such as #q=rank&verdict=reproduced&sort=-year; one without "=" is a place on the page.
  const read = () => {
    const found = location.hash.includes("=") ? Object.fromEntries(new URLSearchParams(location.hash.slice(1))) : {};
    state = { sort: "verdict", ...found };
    for (const name of fields) form.elements[name].value = state[name] || "";
    show();
  };

  const write = () => {
    const entries = Object.entries(state).filter(([name, value]) => value && !(name === "sort" && value === "verdict"));
    history.replaceState(null, "", `#${new URLSearchParams(entries)}`);
    show();
  };

  const key = (row, name) => {
    if (name === "verdict") return start.get(row);
    if (name === "title") return row.cells[0].textContent.trim().toLowerCase();
    return numeric.has(name) && row.dataset[name] !== "" ? Number(row.dataset[name]) : row.dataset[name];
  };

  // What has no value stays last in either direction.
  const compare = (name, sign) => (a, b) => {
    const [x, y] = [key(a, name), key(b, name)];
    if (x === "" || y === "") return (x === "") - (y === "") || start.get(a) - start.get(b);
    return sign * (x < y ? -1 : x > y ? 1 : 0) || start.get(a) - start.get(b);
  };

  const show = () => {
    const words = (state.q || "").toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (row) =>
      words.every((word) => text.get(row).includes(word)) &&
      (!state.verdict || row.dataset.verdict === state.verdict) &&
      (!state.topic || row.dataset.topic === state.topic) &&
      (!state.scale || row.dataset.scale.split(" ").includes(state.scale));
    let visible = 0;
    for (const row of rows) visible += !(row.hidden = !fits(row));
    const name = state.sort.replace(/^-/, "");
    if (state.sort !== sorted) body.append(...[...rows].sort(compare(name, state.sort.startsWith("-") ? -1 : 1)));
    sorted = state.sort;
    for (const head of document.querySelectorAll("th[data-sort]")) {
      if (head.dataset.sort !== name) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", state.sort.startsWith("-") ? "descending" : "ascending");
    }
    for (const link of document.querySelectorAll("[data-filter]")) {
      if (state[link.dataset.filter] === link.dataset.value) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
    status.textContent = visible === rows.length ? `${visible} papers` : `${visible} of ${rows.length} papers`;
    document.querySelector(".empty").hidden = visible > 0;
  };

  const clear = () => {
    state = { sort: state.sort };
    for (const name of fields) form.elements[name].value = "";
    write();
  };

  form.addEventListener("input", () => {
    for (const name of fields) state[name] = form.elements[name].value;
    write();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => { event.preventDefault(); clear(); });
  document.querySelector(".empty button").addEventListener("click", clear);

  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-filter]");
    const head = event.target.closest("th[data-sort]");
    if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
      event.preventDefault();
      const { filter, value } = link.dataset;
      state[filter] = form.elements[filter].value = state[filter] === value ? "" : value;
      write();
      if (!link.closest(".legend")) document.querySelector("#papers").scrollIntoView();
    } else if (head) {
      const name = head.dataset.sort;
      state.sort = state.sort === name ? `-${name}` : name;
      write();
    }
  });

  // "/" goes to the search, the arrows walk through the papers, Escape leaves the search.
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input, select");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      form.elements.q.focus();
    } else if (event.key === "Escape" && event.target === form.elements.q) {
      clear();
    } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && (event.target === form.elements.q || event.target.closest("td.title"))) {
      const links = [...body.querySelectorAll("tr:not([hidden]) .title a")];
      const next = links.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1);
      event.preventDefault();
      (next < 0 ? form.elements.q : links[Math.min(next, links.length - 1)])?.focus();
    }
  });

  addEventListener("hashchange", () => { if (location.hash.includes("=") || !location.hash) read(); });
  read();
})();
