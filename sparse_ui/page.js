/* What the page does by itself: keeps the choice of light or dark over a reload and the zoom of a plot over updates,
   and lets plots have the width of their card. */
(() => {
  const paint = () => {
    const kept = localStorage.getItem("sparse-tuning-theme");
    if (kept) document.body.classList.toggle("dark", kept === "dark");
  };
  const begin = () => {
    paint();
    // Gradio follows the system some time after the page has loaded; the choice goes before it.
    new MutationObserver(paint).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  };
  // Gradio may bring this script in when the document has long been there.
  if (document.body) begin();
  else addEventListener("DOMContentLoaded", begin);

  /* Gradio builds a plot anew at each update. What the person zoomed to is remembered by plot and run, and put back. */
  const zooms = {};
  const remember = (key, change) => {
    if (change["xaxis.autorange"] || change["yaxis.autorange"]) return delete zooms[key];
    for (const axis of ["xaxis", "yaxis"]) {
      const low = change[`${axis}.range[0]`], high = change[`${axis}.range[1]`];
      if (low !== undefined) zooms[key] = { ...zooms[key], [`${axis}.range`]: [low, high] };
    }
  };
  /* A plot that is drawn while another tab is shown knows no width and takes 700 pixels. */
  const fit = ([{ target: plot, contentRect: card }]) => {
    const drawn = plot.querySelector(".main-svg")?.getBoundingClientRect().width;
    if (card.width && drawn && Math.abs(drawn - card.width) > 1) window.Plotly.Plots.resize(plot);
  };
  const adopt = (plot) => {
    const home = plot.closest("[id^='plot-']");
    if (!home || !plot.on || !plot.layout || plot.dataset.adopted) return;
    plot.dataset.adopted = "yes";
    const key = `${home.id} ${plot.layout.uirevision}`;
    if (zooms[key]) window.Plotly.relayout(plot, { ...zooms[key] });
    plot.on("plotly_relayout", (change) => remember(key, change));
    new ResizeObserver(fit).observe(plot);
  };
  new MutationObserver((records) => {
    const plots = new Set();
    for (const { target } of records) if (target.classList?.contains("js-plotly-plot")) plots.add(target);
    plots.forEach(adopt);
  }).observe(document, { subtree: true, childList: true });
})();
