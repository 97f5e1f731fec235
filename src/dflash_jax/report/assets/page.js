"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const status = document.querySelector("[role=status]");
  root.classList.add("scripted");

  // Colours: a custom property holds light-dark(a, b); only a real property of an element says which one holds now.
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const css = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
  const channels = (rgb) => rgb.match(/[\d.]+/g).slice(0, 3).map(Number);
  const mix = (from, to, share) => {
    const [a, b] = [channels(from), channels(to)];
    return `rgb(${a.map((value, place) => Math.round(value + (b[place] - value) * share)).join(",")})`;
  };
  const ramp = (share) => (share < 0.5
    ? mix(css("ramp0"), css("ramp1"), 2 * share) : mix(css("ramp1"), css("ramp2"), 2 * share - 1));
  const paints = (meta) => {
    if (meta.colors) { return [meta.colors.map(css), css("ink")]; }
    const one = meta.ramp === undefined ? css(meta.color) : ramp(meta.ramp);
    return [one, one];
  };

  const figures = all("figure").map((figure) => ({
    figure, box: figure.querySelector(".plot"), plot: JSON.parse(figure.querySelector("script").textContent),
    title: figure.querySelector("h3").textContent,
  }));

  const themedTrace = (trace) => {
    const [paint, plain] = paints(trace.meta);
    const themed = { ...trace, marker: { ...trace.marker, color: paint } };
    if (trace.type !== "bar") { themed.line = { ...trace.line, color: plain }; }
    // On a bar of its own colour an error bar would not be seen.
    const bar = trace.type === "bar" ? css("ink") : plain;
    for (const error of ["error_x", "error_y"]) {
      if (trace[error]) { themed[error] = { ...trace[error], color: bar }; }
    }
    return themed;
  };
  const themedAxis = (axis) => ({
    automargin: true, gridcolor: css("line"), zerolinecolor: css("muted"), linecolor: css("line"), ...axis,
    title: axis.title && { ...axis.title, standoff: 12, font: { size: 13, color: css("soft") } },
  });
  const themedLayout = (layout) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 12, t: 12, b: 48 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: css("ink") },
    hoverlabel: { bgcolor: css("card"), bordercolor: css("line"), font: { color: css("ink") }, namelength: -1 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    ...layout, xaxis: themedAxis(layout.xaxis), yaxis: themedAxis(layout.yaxis),
    shapes: (layout.shapes ?? []).map((shape) => ({ ...shape, fillcolor: css(shape.name) })),
  });
  const config = { displayModeBar: false, responsive: true };
  let drawable = false;
  // Nothing is drawn into a closed tab: it has no width. The paper is narrower than the window and nothing is laid out
  // anew for it: printing needs a width of its own.
  const draw = (width) => {
    if (!drawable) { return; }
    for (const { box, plot } of figures) {
      if (!box.offsetWidth) { continue; }
      const layout = themedLayout(plot.layout);
      if (width) { layout.width = width; }
      Plotly.react(box, plot.data.map(themedTrace), layout, config);
      box.dataset.drawn = "";
    }
  };

  const unpack = async (packed) => {
    const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const packed = document.getElementById("plotly");
  if (packed && typeof DecompressionStream === "undefined") {
    document.getElementById("undrawn").hidden = false;
  } else if (packed) {
    unpack(packed.textContent).then(() => { drawable = true; draw(); root.dataset.ready = ""; });
  } else {
    root.dataset.ready = "";
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  const themes = all(".themes button");
  for (const button of themes) {
    button.addEventListener("click", () => {
      root.style.colorScheme = button.dataset.theme;
      for (const other of themes) { other.setAttribute("aria-pressed", String(other === button)); }
      draw();
    });
  }

  for (const list of all("[role=tablist]")) {
    const tabs = all("[role=tab]", list);
    const panel = (tab) => document.getElementById(tab.getAttribute("aria-controls"));
    const select = (chosen) => {
      for (const tab of tabs) {
        tab.setAttribute("aria-selected", String(tab === chosen));
        tab.tabIndex = tab === chosen ? 0 : -1;
        panel(tab).classList.toggle("closed", tab !== chosen);
      }
      draw();
    };
    tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => select(tab));
      tab.addEventListener("keydown", (event) => {
        const last = tabs.length - 1;
        const to = { ArrowRight: place === last ? 0 : place + 1, ArrowLeft: place ? place - 1 : last, Home: 0, End: last };
        if (!(event.key in to)) { return; }
        event.preventDefault();
        select(tabs[to[event.key]]);
        tabs[to[event.key]].focus();
      });
    });
    select(tabs[0]);
  }

  const opened = [];
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    for (const details of all(".sample:not([open])")) { details.open = true; opened.push(details); }
    draw(640);
  });
  addEventListener("afterprint", () => {
    delete root.dataset.print;
    for (const details of opened.splice(0)) { details.open = false; }
    draw();
  });

  for (const { figure, box, title } of figures) {
    figure.querySelector("button.picture").addEventListener("click", () => {
      if (!("drawn" in box.dataset)) { return; }
      const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
      // A picture has no page behind it: without a ground of its own, the light ink of the dark colours stands on white.
      const picture = { data: box.data, layout: { ...box.layout, paper_bgcolor: css("card") } };
      Plotly.downloadImage(picture, { format: "png", scale: 2, width: box.offsetWidth, height: box.offsetHeight, filename: name });
    });
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
  for (const button of all("button.copy")) {
    const label = button.textContent;
    button.addEventListener("click", async () => {
      const text = button.dataset.markdown;
      // The clipboard API is refused to pages opened from disk in some browsers; the old way is not.
      const done = await (navigator.clipboard?.writeText(text).then(() => true, () => copyByHand(text)) ?? copyByHand(text));
      status.textContent = button.textContent = done ? "Copied" : "Copying was refused";
      setTimeout(() => { button.textContent = label; status.textContent = ""; }, 1500);
    });
  }
})();
