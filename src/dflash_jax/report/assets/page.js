"use strict";
(() => {
  const root = document.documentElement;
  const css = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const mix = (from, to, share) => {
    const [a, b] = [channels(from), channels(to)];
    return `rgb(${a.map((value, place) => Math.round(value + (b[place] - value) * share)).join(",")})`;
  };
  const ramp = (share) => (share < 0.5
    ? mix(css("ramp0"), css("ramp1"), 2 * share) : mix(css("ramp1"), css("ramp2"), 2 * share - 1));
  const color = (meta) => (meta.ramp === undefined ? css(meta.color) : ramp(meta.ramp));

  const figures = [...document.querySelectorAll("figure")].map((figure) => ({
    box: figure.querySelector(".plot"),
    plot: JSON.parse(figure.querySelector("script").textContent),
  }));

  const themedTrace = (trace) => {
    const paint = color(trace.meta);
    const themed = { ...trace, marker: { ...trace.marker, color: paint }, line: { ...trace.line, color: paint } };
    if (trace.type === "bar") { delete themed.line; }
    if (trace.error_y) { themed.error_y = { ...trace.error_y, color: paint }; }
    return themed;
  };
  const themedAxis = (axis) => ({
    automargin: true, gridcolor: css("line"), zerolinecolor: css("muted"), linecolor: css("line"), ...axis,
    title: axis.title && { ...axis.title, font: { size: 13, color: css("soft") } },
  });
  const themedLayout = (layout) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 12, t: 12, b: 48 },
    font: { family: css("sans"), size: 13, color: css("ink") },
    hoverlabel: { bgcolor: css("card"), bordercolor: css("line"), font: { color: css("ink") }, namelength: -1 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("line"), activecolor: css("ink") },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    ...layout, xaxis: themedAxis(layout.xaxis), yaxis: themedAxis(layout.yaxis),
  });
  const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage"]] };
  // The paper is narrower than the window and nothing is laid out anew for it: printing needs a width of its own.
  const draw = (width) => {
    for (const { box, plot } of figures) {
      const layout = themedLayout(plot.layout);
      if (width) { layout.width = width; }
      Plotly.react(box, plot.data.map(themedTrace), layout, config);
    }
  };
  if (figures.length) {
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
    addEventListener("beforeprint", () => { root.dataset.print = ""; draw(640); });
    addEventListener("afterprint", () => { delete root.dataset.print; draw(); });
  }

  const copyByHand = (text) => {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };
  for (const button of document.querySelectorAll("button.copy")) {
    const label = button.textContent;
    button.addEventListener("click", async () => {
      const text = button.dataset.markdown;
      // The clipboard API is refused to pages opened from disk in some browsers; the old way is not.
      const done = await (navigator.clipboard?.writeText(text).then(() => true, () => copyByHand(text)) ?? copyByHand(text));
      button.textContent = done ? "Copied" : "Copying was refused";
      setTimeout(() => { button.textContent = label; }, 1500);
    });
  }
})();
