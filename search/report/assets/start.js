// Fills the sections of the page.
"use strict";

function showNav() {
  const sections = [...document.querySelectorAll("main section")];
  const links = new Map(
    sections.map((section) => [
      section,
      el("a", { href: `#${section.id}` }, section.dataset.short || section.querySelector("h2").textContent),
    ]),
  );
  $("nav").append(...links.values());
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        for (const [section, link] of links)
          section === entry.target ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
      }
    },
    { rootMargin: "-15% 0px -80% 0px" },
  );
  sections.forEach((section) => near.observe(section));
}

showNav();
for (const show of [
  showFigures,
  showFront,
  showBaselines,
  showCurves,
  showChoices,
  showRouters,
  showWinner,
  showValidation,
  showSpending,
  showTrials,
  showSettings,
])
  show();
addEventListener("hashchange", showPanel);
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("panel").hidden) leave();
});
showPanel();
