"use strict";

// Tables and sentences.

/** Fill a table; the first column is words, the others are numbers. */
function fillTable(name, headings, rows, foot = null) {
  const table = document.getElementById(name);
  const head = element("thead");
  head.append(line("th", headings));
  const body = element("tbody");
  body.append(...rows.map((cells) => line("td", cells)));
  table.replaceChildren(head, body);
  if (foot) table.append(element("tfoot"));
  table.tFoot?.append(line("td", foot));
}

function line(name, cells) {
  const made = element("tr");
  cells.forEach((cell, i) => {
    const box = element(i === 0 ? "th" : name);
    if (i === 0 || name === "th") box.scope = name === "th" ? "col" : "row";
    box.append(cell);
    made.append(box);
  });
  return made;
}

/** A source as it is drawn everywhere: its letters on its colour, and its name. */
function label(place) {
  const source = sourceAt(place);
  const made = element("span", `source ${source.kind}`);
  made.append(element("b", "mark", source.mark), element("bdi", "", ` ${source.name}`));
  return made;
}

function showLegend() {
  const items = run.sources.map(([, , ran, accepted], place) => {
    const item = element("li");
    item.append(label(place), element("small", "", `${number(accepted)} of ${number(ran)} accepted, ${percent(accepted, ran)}`));
    return item;
  });
  const own = element("li");
  own.append(element("span", "token own", "own"), element("small", "", "the model's own picks"));
  document.getElementById("legend").replaceChildren(...items, own);
}

function showTotals() {
  const money = (micro) => (micro === null ? UNKNOWN : milliseconds(micro));
  fillTable(
    "sources",
    ["source", "nodes", "accepted", "hit rate", "earned ms", "cost ms", "net ms"],
    run.sources.map(([, , ran, accepted, earned, cost], place) => [
      label(place), number(ran), number(accepted), percent(accepted, ran), money(earned), money(cost),
      money(earned === null ? null : earned - cost),
    ]),
  );
  document.getElementById("unpriced").textContent = run.unpriced
    ? `${many(run.unpriced, "pass", "passes")} did not know yet what a token is worth: earned, cost and net leave that out.` : "";
  fillTable(
    "reasons",
    ["why", "passes", "nodes", "expected", "came"],
    run.why.map(([why, sentence, passes, nodes, expected, came]) => {
      const cell = element("span");
      cell.append(element("bdi", "", visible(why).replaceAll("␣", " ")), element("small", "", sentence));
      return [cell, number(passes), number(nodes), expected ? number(expected) : UNKNOWN, number(came)];
    }),
  );
}

/** What a step brought in a row, in a sentence. */
function sentence(row, step) {
  const [from, to] = row.span(step);
  if (step === 0 && run.opens) return "The prompt ran together with the first draft: its tokens came with pass 1.";
  if (to === from) return step ? "This row got no token: it was done, or waited for the others." : "No token.";
  if (step === 0) return "The prefill read the prompt, and the model picked the first token.";
  const accepted = row.origins(step).filter(Boolean).length;
  const own = to - from - accepted;
  const drafted = accepted ? `${many(accepted, "drafted token", "drafted tokens")} accepted` : "nothing drafted was accepted";
  return `${many(to - from, "token", "tokens")}: ${drafted}${own ? ", and the model's own pick" : ""}.`;
}

function showFacts(row, step) {
  document.getElementById("came").textContent = sentence(row, step);
  const pass = step ? passAt(step) : null;
  document.getElementById("why").textContent = pass ? `${run.why[pass.why][1]}.`.replace(/^./, (letter) => letter.toUpperCase()) : "The prompt is read in one go.";
  const facts = pass ? numbers(pass, treeAt(row.number, step)) : [];
  document.getElementById("numbers").replaceChildren(
    ...facts.map(([name, value]) => {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd", "", value));
      return pair;
    }),
  );
  fillTable("shares", ["source of this pass", "nodes", "accepted"], pass ? pass.shares.map(([place, ran, accepted]) => [label(place), number(ran), number(accepted)]) : []);
  document.getElementById("shares").hidden = !pass || pass.shares.length === 0;
}

function numbers(pass, tree) {
  const came = pass.committed.reduce((sum, count) => sum + count, 0);
  const all = pass.committed.length > 1 ? ", all rows" : "";
  const left = tree ? tree.tokens.length - tree.ran : 0;
  return [
    ["nodes run, with the root", number(pass.nodes)],
    ["proposed, not run", tree ? number(left) : UNKNOWN],
    [`tokens expected${all}`, pass.expected ? number(pass.expected) : UNKNOWN],
    [`tokens came${all}`, number(came)],
    ["a token was worth", pass.token ? `${milliseconds(pass.token)} ms` : "not known yet"],
    ["one more node cost", pass.row ? `${milliseconds(pass.row)} ms` : "not known yet"],
  ];
}

/** The time of a step beside that of all passes. */
function showTimes(step) {
  const mine = step ? passAt(step).parts : null;
  const sum = (parts) => parts.reduce((total, part) => total + part, 0);
  const all = sum(run.seconds);
  const rows = PARTS.map((part, i) => {
    const name = element("span");
    name.append(element("i", `swatch part-${i}`), ` ${part}`);
    return [name, mine ? milliseconds(mine[i]) : UNKNOWN, milliseconds(run.seconds[i]), percent(run.seconds[i], all)];
  });
  const name = element("span");
  name.append(element("i", "swatch prefill"), " prefill");
  rows.push([name, step ? UNKNOWN : milliseconds(run.prefill), milliseconds(run.prefill), ""]);
  const total = mine ? sum(mine) : run.prefill;
  fillTable("times", ["part", `${stepName(step)}, ms`, "run, ms", "of passes"], rows, ["sum", milliseconds(total), milliseconds(all + run.prefill), ""]);
}
