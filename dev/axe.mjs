// Check every page of the site, or the pages named, with axe: light and dark, on a desktop and a phone.
//
//   npm install --prefix /tmp/axe axe-core puppeteer-core      (once; Node >= 20)
//   cd /tmp/axe && node /path/to/dev/axe.mjs /path/to/docs/_build/html [report.html ...]
//
// CHROMIUM names the browser; default: /usr/bin/chromium. Prints one line per violation; exits with 1 if any.

import { readdirSync, readFileSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.cwd(), "here.js")); // packages come from the current folder
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

function pagesOf(path) {
  if (!statSync(path).isDirectory()) return [path];
  const names = readdirSync(path).filter((name) => !/^[_.]/.test(name)); // _modules, _static, ...
  return names.flatMap((name) => pagesOf(join(path, name))).filter((page) => page.endsWith(".html"));
}

const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
});
const tab = await browser.newPage();
const counts = {};
const pages = process.argv.slice(2).map((path) => resolve(path)).flatMap(pagesOf);
for (const width of [1280, 390]) {
  await tab.setViewport({ width, height: 900 });
  for (const scheme of ["light", "dark"]) {
    await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    for (const page of pages) {
      await tab.goto(pathToFileURL(page).href);
      await tab.evaluate(axe);
      await tab.evaluate(() => new Promise((done) => setTimeout(done, 100))); // for site.js after the layout
      const { violations } = await tab.evaluate(() => axe.run({ resultTypes: ["violations"] }));
      for (const { id, nodes } of violations) {
        counts[id] ??= {};
        counts[id][`${scheme} ${width}`] = (counts[id][`${scheme} ${width}`] ?? 0) + nodes.length;
        for (const node of nodes) {
          const html = node.html.replace(/\s+/g, " ").slice(0, 160);
          const why = id === "color-contrast" ? ` ${node.any[0].message}` : "";
          console.log(`${id} | ${page} | ${scheme} ${width} | ${node.target.join(" ")} | ${html}${why}`);
        }
      }
    }
  }
}
await browser.close();
console.log(`${pages.length} pages`);
console.table(counts);
process.exitCode = Object.keys(counts).length ? 1 : 0;
