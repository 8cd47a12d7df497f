// Runs the scripts of the explorer's page outside a browser: node explore_node.mjs SCRIPT... reads
// a list of cases, and writes what each gives. A case has `layers`, `weights` and `z`, or
// `likelihood` and `params`; with `draws`, it gives that many draws in place of the mean.

import { readFileSync } from "node:fs";
import { runInThisContext } from "node:vm";

const source = process.argv.slice(2).map((path) => readFileSync(path, "utf8")).join("\n");
const { networks, likelihoods } = runInThisContext(`${source};({ networks, likelihoods })`);

function answer({ layers, weights, z, likelihood, params, draws }) {
  if (layers) {
    const decode = networks.build(layers, networks.floats(weights));
    return z.map((one) => [...decode(one)]);
  }
  const family = likelihoods.build(likelihood);
  const x = new Float64Array(likelihood.elements);
  if (!draws) {
    family.mean(params, x);
    return [...x];
  }
  return Array.from({ length: draws }, (_, seed) => {
    family.sample(params, x, seed);
    return [...x];
  });
}

console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).map(answer)));
