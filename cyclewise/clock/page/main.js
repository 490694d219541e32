// Draws the report from top to bottom.

const dark = matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const other = theme === "dark" ? "light" : "dark";
  byId("theme").textContent = other[0].toUpperCase() + other.slice(1);
  byId("theme").setAttribute("aria-label", `switch to ${other}`);
}

setTheme(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
byId("theme").addEventListener("click", () =>
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));

drawHeader();
drawVerdict();
drawFigures();
drawToken();
drawHeatMaps();
drawRooflineSection();
drawTokens();
drawGrowth();
drawChanges();
drawMoments();
drawClock();
drawSources();

byId("contents").append(...[...document.querySelectorAll("section[data-nav]")].map((section) =>
  html("a", { href: `#${section.id}` }, section.dataset.nav)));
