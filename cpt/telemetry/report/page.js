"use strict";
// The behavior of a page with charts: dark colors, tokens instead of steps, local times, print.
// BokehJS keeps the charts as models; a changed model is painted again.
(() => {
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");

  // ---- colors -------------------------------------------------------------------------------
  // every color of a model with its two values, as functions that set one
  const colored = [];

  function darkOf(color) {
    return typeof color === "string" ? facts.dark[color] : undefined;
  }

  function collectColors(model) {
    for (const [name, value] of Object.entries(model.attributes)) {
      if (!name.endsWith("_color")) continue;
      const isWrapped = value !== null && typeof value === "object" && "value" in value;
      const light = isWrapped ? value.value : value;
      const dark = darkOf(light);
      if (dark === undefined) continue;
      const wrap = (color) => (isWrapped ? {...value, value: color} : color);
      colored.push((isDark) => model.setv({[name]: wrap(isDark ? dark : light)}));
    }
    const light = model.data instanceof Map ? model.data.get("color") : model.data?.color;
    if (light === undefined) return;
    const lights = Array.from(light);
    const darks = lights.map((color) => darkOf(color) ?? color);
    colored.push((isDark) => replaceColumns(model, {color: isDark ? darks : lights}));
  }

  function columnsOf(source) {
    return source.data instanceof Map ? Object.fromEntries(source.data) : source.data;
  }

  function replaceColumns(source, columns) {
    source.data = {...columnsOf(source), ...columns};
  }

  function paint(isDark) {
    for (const set of colored) set(isDark);
  }

  // ---- steps or tokens ----------------------------------------------------------------------
  // everything that has a place on the step axis, as functions that move it
  const placed = [];
  const toTokens = (step) => interpolate(facts.axis.steps, facts.axis.tokens, step);
  const toSteps = (tokens) => interpolate(facts.axis.tokens, facts.axis.steps, tokens);

  // between the knots, and beyond them with the slope of the outermost two
  function interpolate(from, to, x) {
    let at = 1;
    while (at < from.length - 1 && from[at] < x) at += 1;
    const width = from[at] - from[at - 1];
    if (width === 0) return to[at];
    return to[at - 1] + ((x - from[at - 1]) * (to[at] - to[at - 1])) / width;
  }

  function collectPlaces(model) {
    if (model.data !== undefined) {
      const columns = columnsOf(model);
      const names = facts.columns.filter((name) => name in columns);
      const steps = names.map((name) => Array.from(columns[name]));
      const tokens = steps.map((column) => column.map(toTokens));
      placed.push((inTokens) => {
        const moved = {};
        names.forEach((name, index) => (moved[name] = (inTokens ? tokens : steps)[index]));
        replaceColumns(model, moved);
      });
    } else if (model.type === "Span" && model.dimension === "height") {
      const steps = model.location;
      placed.push((inTokens) => (model.location = inTokens ? toTokens(steps) : steps));
    } else if (model.type === "Label") {
      const steps = model.x;
      placed.push((inTokens) => (model.x = inTokens ? toTokens(steps) : steps));
    } else if (facts.labels.includes(model.axis_label)) {
      const {axis_label: label, formatter} = model;
      placed.push((inTokens) => {
        model.axis_label = inTokens ? facts.axis.unit : label;
        formatter.format = inTokens ? "0,0.[00]" : "0,0";
        model.ticker.min_interval = inTokens ? 0 : 1;
      });
    }
  }

  function collectRange(range) {
    const {start, end} = range;
    placed.push((inTokens) => {
      const move = inTokens ? toTokens : toSteps;
      const whole = inTokens ? [toTokens(start), toTokens(end)] : [start, end];
      const shown = [move(range.start), move(range.end)];
      range.setv({start: shown[0], end: shown[1], reset_start: whole[0], reset_end: whole[1]});
    });
  }

  function offerTokens(doc) {
    const form = document.querySelector(".axis");
    if (form === null || facts.axis === null) return;
    const ranges = new Set(doc.roots().map((figure) => figure.x_range));
    for (const model of doc.all_models) collectPlaces(model);
    for (const range of ranges) collectRange(range);
    let inTokens = false;
    form.addEventListener("change", (event) => {
      const wanted = event.target.value === "tokens";
      if (wanted !== inTokens) for (const move of placed) move(wanted);
      inTokens = wanted;
    });
    form.hidden = false;
  }

  // ---- room for labels ----------------------------------------------------------------------
  const LABEL_WIDTH = 72;

  function fitLabels() {
    for (const view of viewsOfCharts()) {
      const room = Math.floor(view.el.clientWidth / LABEL_WIDTH);
      for (const axis of view.model.below) {
        axis.ticker.desired_num_ticks = Math.min(14, Math.max(2, room - 1));
      }
    }
  }

  function viewsOfCharts() {
    return Bokeh.documents[0].roots().map((figure) => Bokeh.index[figure.id]);
  }

  // ---- print --------------------------------------------------------------------------------
  // the canvas of a chart has the size of the screen: paper gets a light copy of the right width,
  // made at once, since the browser prints as soon as this returns
  function copyForPrint() {
    removeCopies();
    paint(false);
    document.documentElement.classList.add("printing");
    fitLabels();
    for (const view of viewsOfCharts()) {
      view.compute_layout();
      // glyphs learn of new colors later than axes do, unless they are asked
      for (const renderer of view.renderer_views.values()) renderer.set_visuals?.();
      const {canvas} = view.export("png");
      canvas.className = "printed";
      canvas.removeAttribute("style");
      view.el.parentElement.append(canvas);
      view.el.classList.add("drawn");
    }
  }

  function removeCopies() {
    document.querySelectorAll("canvas.printed").forEach((copy) => copy.remove());
    for (const view of viewsOfCharts()) view.el.classList.remove("drawn");
    document.documentElement.classList.remove("printing");
    fitLabels();
    paint(prefersDark.matches);
  }

  // ---- times --------------------------------------------------------------------------------
  function ago(then) {
    const seconds = Math.max(0, (Date.now() - then) / 1000);
    if (seconds < 90) return `${Math.round(seconds)} s ago`;
    if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
    if (seconds < 172800) return `${Math.round(seconds / 3600)} h ago`;
    return `${Math.round(seconds / 86400)} days ago`;
  }

  function showLocalTimes() {
    const options = {dateStyle: "medium", timeStyle: "long"};
    const local = new Intl.DateTimeFormat(undefined, options);
    const inUtc = new Intl.DateTimeFormat(undefined, {...options, timeZone: "UTC"});
    for (const element of document.querySelectorAll("time")) {
      const then = new Date(element.dateTime);
      const isSame = local.format(then) === inUtc.format(then);
      if (!isSame) element.textContent = `${local.format(then)} (${element.textContent})`;
      element.title = ago(then);
      if (element.classList.contains("age")) element.textContent += `, ${ago(then)}`;
    }
  }

  // a page that says "running" and is older than this may be that of a run that has died
  const STALE_SECONDS = 1800;

  function showAge() {
    const written = document.querySelector("time.written");
    const note = document.querySelector(".stale");
    if (written === null || note === null) return;
    note.hidden = (Date.now() - new Date(written.dateTime)) / 1000 < STALE_SECONDS;
  }

  // ---- start --------------------------------------------------------------------------------
  function whenDrawn(action) {
    if (window.Bokeh?.documents.length > 0 && Bokeh.documents[0].is_idle) action();
    else setTimeout(() => whenDrawn(action), 20);
  }

  showLocalTimes();
  showAge();
  if (document.querySelector(".charts") === null) {
    document.documentElement.classList.add("ready");
    return;
  }
  document.documentElement.classList.add("waiting");
  whenDrawn(() => {
    try {
      const [doc] = Bokeh.documents;
      for (const model of doc.all_models) collectColors(model);
      if (prefersDark.matches) paint(true);
      prefersDark.addEventListener("change", () => paint(prefersDark.matches));
      fitLabels();
      addEventListener("resize", fitLabels);
      offerTokens(doc);
      addEventListener("beforeprint", copyForPrint);
      addEventListener("afterprint", removeCopies);
    } finally {
      // whatever has failed: the charts are there to be seen
      document.documentElement.classList.replace("waiting", "ready");
    }
  });
})();
