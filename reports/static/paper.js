// Copy buttons, and curves drawn when they come into view, in the colours of the page.
"use strict";
(() => {
  const library = document.currentScript.dataset.plotly;

  // Where the folder is on a web server, the lines to copy name it.
  if (location.protocol.startsWith("http")) {
    const address = new URL(document.querySelector(".brand").getAttribute("href"), location.href).href.replace(/\/[^/]*$/, "");
    for (const code of document.querySelectorAll(".command code")) code.textContent = code.textContent.replaceAll("ADDRESS", address);
    for (const hint of document.querySelectorAll(".replace")) hint.hidden = true;
  }

  for (const button of document.querySelectorAll("button.copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
  if (!library) return;

  const COLOURS = ["--reproduced", "--not-reproduced", "--needs-an-accelerator", "--inconclusive", "--in-part", "--not-run"];
  const DASHES = { claim: "solid", control: "dash", "": "solid" };
  const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x", "cross"];
  const plain = (value) => String(value).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const traces = (curve) => {
    const names = [...new Set(curve.series.map((series) => series.name))];
    const bothArms = new Set(curve.series.map((series) => series.arm)).size > 1;
    return curve.series.flatMap((series) => {
      const index = names.indexOf(series.name);
      const colour = css(COLOURS[index % COLOURS.length]);
      const name = plain([series.name, bothArms || !series.name ? series.arm : ""].filter(Boolean).join(", "));
      const line = { color: colour, width: series.dash === "solid" ? 3 : 2, dash: series.dash || DASHES[series.arm] };
      const symbol = SYMBOLS[(index + Math.floor(index / SYMBOLS.length)) % SYMBOLS.length];
      const marker = { symbol: symbol + (series.arm === "control" ? "-open" : ""), size: 7 };
      const mode = series.x.length > 40 ? "lines" : "lines+markers";
      const main = { x: series.x, y: series.y, name, line, marker, mode, legendgroup: name };
      if (!series.low || !series.high) return [main];
      const edge = { x: series.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, legendgroup: name };
      return [{ ...edge, y: series.low }, { ...edge, y: series.high, fill: "tonexty", fillcolor: `${colour}33` }, main];
    });
  };

  // Below two decades 1, 2 and 5 of each power of ten, above that powers alone.
  const logTicks = (curve, name) => {
    const values = curve.series.flatMap((series) => series[name]).filter((value) => value > 0);
    if (!values.length) return {};
    const [low, high] = [Math.floor(Math.log10(Math.min(...values))), Math.ceil(Math.log10(Math.max(...values)))];
    if (high - low > 2) return { dtick: Math.ceil((high - low) / 6) };
    return { tickvals: Array.from({ length: 3 * (high - low + 1) }, (_, i) => [1, 2, 5][i % 3] * 10 ** (low + Math.floor(i / 3))) };
  };

  // Many lines on a narrow screen: their names go below, and the plot grows by as much.
  const layout = (curve, crowded) => {
    const axis = (title, name) => ({
      title: { text: plain(title), standoff: 8 }, type: curve.log.includes(name) ? "log" : "linear", tickfont: { size: 12 },
      gridcolor: css("--line"), linecolor: css("--muted"), zerolinecolor: css("--line"), ticks: "outside", tickcolor: css("--line"),
      automargin: true, exponentformat: "power", nticks: 7, ...(curve.log.includes(name) ? logTicks(curve, name) : {}),
    });
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "x unified",
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--ink") },
      margin: { l: 8, r: 8, t: 8, b: 8 }, showlegend: curve.series.length > 1,
      legend: { orientation: "h", x: 0, ...(crowded ? { y: -0.35, yanchor: "top" } : { y: 1.02, yanchor: "bottom" }) },
      hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line") },
      xaxis: axis(curve.x_label, "x"), yaxis: axis(curve.y_label, "y"),
    };
  };

  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const drawn = new Map();
  const draw = (element) => {
    const curve = drawn.get(element) || JSON.parse(element.parentElement.querySelector("script").textContent);
    drawn.set(element, curve);
    const crowded = curve.series.length > 4 && element.clientWidth < 500;
    element.style.height = crowded ? `${18 + 2 * curve.series.length}rem` : "";
    Plotly.react(element, traces(curve), layout(curve, crowded), config);
  };

  let loading;
  const load = () => (loading ||= new Promise((resolve, reject) => {
    const script = Object.assign(document.createElement("script"), { src: library, onload: resolve, onerror: reject });
    document.head.append(script);
  }));

  const watcher = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      load().then(() => draw(target));
    }
  }, { rootMargin: "400px" });
  for (const element of document.querySelectorAll(".chart")) watcher.observe(element);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => [...drawn.keys()].forEach(draw));
})();
