"use strict";

// The token tree of a pass: the path that was taken runs along the top.
const PITCH = 43; // from line to line
const GAP = 20; // from a node to its children
const SLIP = 6; // around the tree
const NARROW = 66; // what a chance needs
const CELL = 8; // pixels that are free or taken together
const MOST = 800; // nodes that are drawn

class TreeView {
  constructor() {
    this.box = document.getElementById("tree");
    this.nodes = document.getElementById("nodes");
    this.edges = document.getElementById("edges");
    const probe = element("li", "node", "0".repeat(20));
    this.nodes.append(probe);
    this.letter = (probe.firstChild, textWidth(probe) / 20) || 8;
    probe.remove();
  }

  /** Draw what a row drafted in a step. */
  show(row, step) {
    const drawn = branches(row, step);
    const size = this.layOut(drawn);
    this.nodes.replaceChildren(...drawn.filter(Boolean).map((node) => this.drawNode(node)));
    this.edges.replaceChildren(...drawn.filter((node) => node && node.above).map(drawEdge));
    for (const box of [this.nodes, this.edges]) {
      box.style.width = `${size.width}px`;
      box.style.height = `${size.height}px`;
    }
    this.box.scrollLeft = this.box.scrollTop = 0;
  }

  /** Give each node its place, and say how much room all take. */
  layOut(drawn) {
    const outline = new Outline();
    const waiting = drawn[0] ? [drawn[0]] : [];
    while (waiting.length) {
      const chain = chainFrom(waiting.pop());
      for (const node of chain) {
        node.width = Math.max(Math.ceil(columns(node.word) * this.letter) + 16, NARROW);
        node.left = node.above ? node.above.left + node.above.width + GAP : SLIP;
      }
      const {above} = chain[0];
      const end = chain.at(-1);
      const line = outline.add(above ? above.left + above.width : 0, end.left + end.width + GAP, above ? above.line + 1 : 0);
      for (const node of chain) Object.assign(node, {line, top: SLIP + line * PITCH});
      // What is popped first goes next to its parent: branches of the end of a chain, and likelier ones.
      for (const node of chain) waiting.push(...node.below.slice(1).reverse());
    }
    return {width: outline.width - GAP + SLIP, height: outline.lines * PITCH + SLIP};
  }

  drawNode(node) {
    const made = element("li", `node ${node.state} ${node.source ? node.source.kind : ""}`);
    const word = element("span", "word", node.word);
    word.dir = "auto";
    const note = element("span", "note");
    if (node.source) note.append(element("b", "mark", node.source.mark), ` ${percent(node.chance, 1000)}`);
    else note.append(node.state === "root" ? "so far" : "own pick");
    made.append(word, note);
    made.title = node.about;
    made.setAttribute("aria-label", node.about);
    made.style.left = `${node.left}px`;
    made.style.top = `${node.top}px`;
    made.style.width = `${node.width}px`;
    return made;
  }
}

/** A node, its first child, and so on: they share a line. */
function chainFrom(node) {
  const chain = [node];
  while (chain.at(-1).below.length) chain.push(chain.at(-1).below[0]);
  return chain;
}

/** How far down each stretch of the picture is taken. */
class Outline {
  constructor() {
    this.taken = [];
    this.width = this.lines = 0;
  }

  /** Take the first free line from one place to another, `least` or below; return it. */
  add(from, to, least) {
    const [first, last] = [Math.floor(from / CELL), Math.ceil(to / CELL)];
    let line = least;
    for (let at = first; at < last; at++) line = Math.max(line, this.taken[at] ?? 0);
    for (let at = first; at < last; at++) this.taken[at] = line + 1;
    this.width = Math.max(this.width, to);
    this.lines = Math.max(this.lines, line + 1);
    return line;
  }
}

function textWidth(item) {
  const range = document.createRange();
  range.selectNodeContents(item);
  return range.getBoundingClientRect().width;
}

/** The nodes to draw, the root first, each with those above and below it; the path that was taken before its siblings. */
function branches(row, step) {
  const tree = treeAt(row.number, step);
  const [from, to] = row.span(step);
  const nodes = tree ? drafted(tree) : [rootOf(row, from)];
  const path = tree ? tree.path : [0];
  if (path.length && to - from >= path.length) addPick(row, from + path.length - 1, nodes, nodes[path.at(-1)]);
  return nodes;
}

/** Add the token that the model picked after the last node that was accepted. */
function addPick(row, at, nodes, end) {
  const place = row.tokens ? row.tokens[at] : null;
  const same = end.below.find((node) => place !== null && node.token === place && node.state !== "probe");
  if (same?.state === "rejected") {
    same.state = "own";
    same.about = same.about.replace(STATES.rejected, "drafted, and picked, but the row went no further in this pass");
    end.below = [same, ...end.below.filter((node) => node !== same)];
    return;
  }
  if (same) same.about += "; it would have been right";
  const word = place === null ? "?" : wordOf(place);
  const own = {state: "own", word: shortened(word), above: end, below: [], about: `${word}: the model's own pick`};
  end.below.unshift(own);
  nodes.push(own);
}

function rootOf(row, from) {
  const word = row.tokens && from ? wordOf(row.tokens[from - 1]) : "…";
  return {state: "root", word: shortened(word), below: [], about: `${word}: the text so far ends with it`};
}

function drafted(tree) {
  const path = new Set(tree.path);
  const nodes = tree.tokens.map((token, at) => (at < MOST || path.has(at) ? nodeOf(tree, token, at, path) : null));
  nodes.forEach((node, at) => {
    node && at && (node.above = nodes[tree.parents[at]]).below.push(node);
  });
  for (const node of nodes) node?.below.sort((a, b) => b.rank - a.rank);
  return nodes;
}

const STATES = {
  root: "the text so far ends with it",
  accepted: "accepted",
  rejected: "ran, and is not what came",
  probe: "ran to learn from it, and can't be accepted",
  pruned: "proposed, and not run",
};

function nodeOf(tree, token, at, path) {
  const state =
    at === 0 ? "root" : path.has(at) ? "accepted" : tree.probes.has(at) ? "probe" : at < tree.ran ? "rejected" : "pruned";
  const source = at ? sourceAt(tree.sources[at]) : null;
  const chance = tree.chances[at];
  const from = source ? `, source ${source.name}, chance ${percent(chance, 1000)}` : "";
  const rank = {accepted: 4, rejected: 3, probe: 1, pruned: 0, root: 0}[state] + chance / 1001;
  const word = wordOf(token);
  return {state, source, chance, token, rank, word: shortened(word), below: [], about: `${word}: ${STATES[state]}${from}`};
}

function drawEdge(node) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const {above} = node;
  const y = node.top + 18;
  const begin = above.left + above.width;
  if (y === above.top + 18) made.setAttribute("d", `M${begin} ${y}H${node.left}`);
  else {
    const turn = begin + 10;
    made.setAttribute("d", `M${begin} ${above.top + 18}Q${turn} ${above.top + 18} ${turn} ${above.top + 26}V${y - 8}Q${turn} ${y} ${node.left} ${y}`);
  }
  made.setAttribute("class", node.state);
  return made;
}
