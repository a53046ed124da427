"use strict";

// The time of all steps: one bar a step, its parts on top of each other, the model call lowest.
const STACK = ["forward", ...PARTS.filter((part) => part !== "forward")];
const HIGH = 100;

class Timeline {
  constructor(go) {
    this.picture = document.getElementById("timeline");
    this.top = scale();
    const paths = STACK.map((part) => shape(`part-${PARTS.indexOf(part)}`, this.bars(part)));
    this.cursor = document.getElementById("cursor");
    this.picture.setAttribute("viewBox", `0 0 ${STEPS + 1} ${HIGH}`);
    this.picture.append(shape("prefill", bar(0, 0, this.part(run.prefill))), ...paths, shape("cut", this.cuts()));
    this.picture.setAttribute("aria-label", `Time of each pass; the highest bar is ${milliseconds(this.top)} ms`);
    this.picture.addEventListener("click", (event) => go(this.stepAt(event.clientX)));
    this.picture.addEventListener("pointermove", (event) => event.buttons === 1 && go(this.stepAt(event.clientX)));
    const cut = times().filter((time) => time > this.top).length;
    document.getElementById("clipped").textContent = cut
      ? `${many(cut, "bar of the timeline is", "bars of the timeline are")} cut at ${milliseconds(this.top)} ms.` : "";
    document.getElementById("track").style.setProperty("--slots", STEPS + 1);
  }

  part(micro) {
    return (HIGH * Math.min(Math.max(micro, 0), this.top)) / this.top;
  }

  bars(part) {
    const below = STACK.slice(0, STACK.indexOf(part)).map((name) => PARTS.indexOf(name));
    const place = PARTS.indexOf(part);
    return run.passes.map((_, i) => {
      const parts = run.passes[i][6];
      const from = below.reduce((sum, at) => sum + Math.max(parts[at], 0), 0);
      return bar(i + 1, this.part(from), this.part(from + Math.max(parts[place], 0)));
    }).join("");
  }

  cuts() {
    return times().map((time, step) => (time > this.top ? bar(step, HIGH - 4, HIGH) : "")).join("");
  }

  stepAt(x) {
    const place = this.picture.getBoundingClientRect();
    return Math.floor(((x - place.left) / place.width) * (STEPS + 1));
  }

  mark(step) {
    this.cursor.style.left = `${(100 * step) / (STEPS + 1)}%`;
  }
}

function times() {
  return [run.prefill, ...run.passes.map((pass) => pass[6].reduce((sum, part) => sum + Math.max(part, 0), 0))];
}

/** The time of a full bar: the longest, unless few are far longer than the others. */
function scale() {
  const sorted = times().toSorted((a, b) => a - b);
  const usual = sorted[Math.floor(0.9 * (sorted.length - 1))];
  return Math.max(Math.min(sorted.at(-1), 2.5 * usual || Infinity), 1);
}

function bar(step, from, to) {
  if (to <= from) return "";
  const wide = STEPS > 300 ? 1 : 0.86;
  const left = step + (1 - wide) / 2;
  return `M${left.toFixed(2)} ${(HIGH - to).toFixed(1)}h${wide}v${(to - from).toFixed(1)}h-${wide}z`;
}

function shape(kind, path) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
  made.setAttribute("class", kind);
  made.setAttribute("d", path);
  return made;
}
