"use strict";

// The run: step 0 is the prefill, step i the i-th pass. A pass that ran the prompt, too, has left no token to step 0.
const run = JSON.parse(document.getElementById("run").textContent);
const PARTS = run.parts;
const STEPS = run.passes.length;

/** A pass by the names of its fields. */
function passAt(step) {
  const [nodes, committed, expected, why, token, row, parts, shares, trees] = run.passes[step - 1];
  return {nodes, committed, expected, why, token, row, parts, shares, trees};
}

/** The tree of a row in a step, or null. */
function treeAt(row, step) {
  const found = step ? passAt(step).trees.find((tree) => tree[0] === row) : undefined;
  if (!found) return null;
  const [, ran, tokens, parents, chances, sources, probes, path] = found;
  return {ran, tokens, parents: [-1, ...parents], chances: [1000, ...chances], sources: [null, ...sources],
    probes: new Set(probes), path};
}

/** One row of the batch: which step committed which of its tokens. */
class Row {
  constructor(number) {
    this.number = number;
    this.tokens = run.outputs[number] ?? null;
    this.pieces = run.pieces?.[number] ?? null;
    const committed = [run.opens ? 0 : 1, ...run.passes.map((pass) => pass[1][number] ?? 0)];
    const room = this.tokens ? this.tokens.length : Infinity;
    this.bounds = [0];
    for (const count of committed) this.bounds.push(Math.min(this.bounds.at(-1) + count, room));
  }

  /** The tokens of a step: from, and to. */
  span(step) {
    return [this.bounds[step], this.bounds[step + 1]];
  }

  /** Who proposed the tokens of a step: for each its source and chance, or null for the model's own pick. */
  origins(step) {
    const [from, to] = this.span(step);
    const tree = treeAt(this.number, step);
    if (tree && tree.path.length) {
      return Array.from({length: to - from}, (_, i) => {
        const node = tree.path[i + 1];
        return node === undefined ? null : {source: tree.sources[node], chance: tree.chances[node]};
      });
    }
    const source = step ? onlySource(passAt(step)) : null;
    return Array.from({length: to - from}, (_, i) => (i < to - from - 1 ? {source, chance: null} : null));
  }

  /** The first of the passes that brought most tokens. */
  best() {
    let best = Math.min(1, STEPS);
    for (let step = 1; step <= STEPS; step++) {
      const [from, to] = this.span(step);
      if (to - from > this.span(best)[1] - this.span(best)[0]) best = step;
    }
    return best;
  }
}

/** The source of all that was accepted in a pass, where there is but one; else null. */
function onlySource(pass) {
  const earning = pass.shares.filter(([, , accepted]) => accepted > 0);
  return earning.length === 1 ? earning[0][0] : null;
}
