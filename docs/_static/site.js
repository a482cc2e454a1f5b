// Names and keyboard access that the theme and the gallery leave out.

for (const [part, name] of [[".sidebar-drawer", "Pages"], [".toc-drawer", "On this page"]])
  document.querySelector(part)?.setAttribute("aria-label", name);

const results = document.getElementById("search-results");
results?.insertAdjacentHTML("beforebegin", "<h1>Search</h1>");

// Sphinx writes the parameters of a long signature as a list of definitions, which it is not.
document.querySelectorAll("dt.sig dl").forEach((list) => list.setAttribute("role", "none"));

// The first paragraph of an example ends in the `::` of reStructuredText.
for (const card of document.querySelectorAll(".sphx-glr-thumbcontainer"))
  card.setAttribute("tooltip", card.getAttribute("tooltip").replace(/::$/, "."));

// What scrolls can be reached with Tab and scrolled with the arrow keys.
const boxes = new ResizeObserver((entries) => {
  for (const { target: box } of entries) {
    const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
    const kind = box.matches("pre") ? "Code" : box.matches("p") ? "Figure" : "Table";
    const section = box.closest("section")?.querySelector("h1, h2, h3, h4")?.firstChild.textContent ?? "";
    const attributes = { tabindex: "0", role: "group", "aria-label": `${kind}: ${section}` };
    for (const [name, value] of Object.entries(attributes))
      scrolls ? box.setAttribute(name, value) : box.removeAttribute(name);
  }
});
document.querySelectorAll("article :is(pre, .table-wrapper, p:has(> img))").forEach((box) => boxes.observe(box));
