// Opens a page in headless Chromium and carries out a list of steps, each a DevTools command:
//   node browser.mjs CHROMIUM PAGE < steps.json > results.json
// A step is one of
//   ["Domain.method", {parameters}]
//   ["evaluate", "an expression, awaited if it is a promise"]
//   ["mouse" or "touch", "kind of event", "selector", across, down], at that share of the element
//   ["screenshot", "file.png"]
//   ["wait", milliseconds]
// The results are one value a step, and besides them the errors of the page and every address that
// it asked for. DevTools is spoken to over a pipe, which needs no package.

import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [chromium, page] = process.argv.slice(2);
const steps = JSON.parse(readFileSync(0, "utf8"));
const profile = mkdtempSync(join(tmpdir(), "chromium-"));
const flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
  "--no-first-run", "--remote-debugging-pipe", `--user-data-dir=${profile}`, "about:blank"];
const browser = spawn(chromium, flags, { stdio: ["ignore", "ignore", "ignore", "pipe", "pipe"] });
const closed = new Promise((done) => browser.on("close", done));

const errors = [];
const requests = [];
const answers = new Map();
let session;
let serial = 0;
let loaded;

function send(method, params = {}) {
  const id = ++serial;
  browser.stdio[3].write(JSON.stringify({ id, method, params, sessionId: session }) + "\0");
  return new Promise((accept, refuse) => answers.set(id, { accept, refuse, method }));
}

function receive({ id, result, error, method, params }) {
  if (id) {
    const { accept, refuse, method: asked } = answers.get(id);
    if (error) refuse(new Error(`${asked}: ${error.message}`));
    else accept(result);
  }
  if (method === "Page.loadEventFired") loaded?.();
  if (method === "Runtime.exceptionThrown")
    errors.push(params.exceptionDetails.exception?.description ?? params.exceptionDetails.text);
  if (method === "Log.entryAdded" && params.entry.level === "error") errors.push(params.entry.text);
  if (method === "Network.requestWillBeSent") requests.push(params.request.url);
}

let received = "";
browser.stdio[4].setEncoding("utf8").on("data", (text) => {
  const messages = (received + text).split("\0");
  received = messages.pop();
  for (const message of messages) receive(JSON.parse(message));
});

async function evaluate(expression) {
  const params = { expression, awaitPromise: true, returnByValue: true };
  const { result, exceptionDetails: wrong } = await send("Runtime.evaluate", params);
  if (wrong) throw new Error(wrong.exception?.description ?? wrong.text);
  return result.value;
}

async function pointer(name, type, selector, across, down) {
  const { x, y } = await evaluate(`(() => {
    const element = document.querySelector(${JSON.stringify(selector)});
    element.scrollIntoView({ block: "center" });
    const box = element.getBoundingClientRect();
    return { x: box.left + ${across} * box.width, y: box.top + ${down} * box.height };
  })()`);
  if (name === "touch") {
    const touchPoints = type === "touchEnd" ? [] : [{ x, y }];
    return send("Input.dispatchTouchEvent", { type, touchPoints });
  }
  const held = { button: "left", buttons: type === "mouseReleased" ? 0 : 1, clickCount: 1 };
  return send("Input.dispatchMouseEvent", { type, x, y, ...held });
}

async function perform([name, what, ...rest]) {
  if (name === "wait") return new Promise((done) => setTimeout(done, what));
  if (name === "evaluate") return evaluate(what);
  if (name === "mouse" || name === "touch") return pointer(name, what, ...rest);
  if (name === "screenshot") {
    const { data } = await send("Page.captureScreenshot", { captureBeyondViewport: false });
    writeFileSync(what, Buffer.from(data, "base64"));
    return what;
  }
  return send(name, what);
}

try {
  const { targetInfos } = await send("Target.getTargets");
  const { targetId } = targetInfos.find((target) => target.type === "page");
  session = (await send("Target.attachToTarget", { targetId, flatten: true })).sessionId;
  for (const domain of ["Page", "Runtime", "Log", "Network"]) await send(`${domain}.enable`);
  const results = [];
  const opened = new Promise((done) => (loaded = done));
  await send("Page.navigate", { url: pathToFileURL(resolve(page)).href });
  await opened;
  for (const step of steps) results.push(await perform(step));
  console.log(JSON.stringify({ results, errors, requests }));
} finally {
  browser.kill();
  await closed;
  // Processes that the browser had started may still write there for a moment.
  rmSync(profile, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
}
