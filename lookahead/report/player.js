"use strict";

// The step that is shown, and what moves it.
class Player {
  constructor() {
    this.text = new Text((step) => this.go(step));
    this.tree = new TreeView();
    this.timeline = new Timeline((step) => this.go(step));
    this.slider = document.getElementById("slider");
    this.where = document.getElementById("where");
    this.slider.max = STEPS;
    this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
    this.timer = null;
    this.waits = false;
    this.button("first", () => this.go(0));
    this.button("previous", () => this.go(this.step - 1));
    this.button("next", () => this.go(this.step + 1));
    this.button("last", () => this.go(STEPS));
    this.button("play", () => this.play());
    document.addEventListener("keydown", (event) => this.press(event));
    this.choose(run.row);
  }

  button(name, act) {
    document.getElementById(name).addEventListener("click", act);
  }

  /** Show a row of the batch, first at the step with the most tokens. */
  choose(number) {
    this.stop();
    this.row = new Row(number);
    this.text.show(this.row);
    showPrompt(this.row);
    this.step = this.step ?? this.row.best();
    this.draw();
  }

  /** Go to a step. What is shown follows with the next frame, so that it keeps up with a slider. */
  go(step) {
    this.step = Math.min(Math.max(step, 0), STEPS);
    if (this.step === STEPS) this.stop();
    if (this.waits) return;
    this.waits = true;
    requestAnimationFrame(() => {
      this.waits = false;
      this.draw();
    });
  }

  draw() {
    const {step, row} = this;
    this.slider.value = step;
    const shown = step ? `pass ${number(step)} of ${number(STEPS)}` : `prefill, before ${many(STEPS, "pass", "passes")}`;
    this.slider.setAttribute("aria-valuetext", `${shown}. ${sentence(row, step)}`);
    this.where.textContent = shown;
    document.getElementById("pass-title").textContent = step ? `Pass ${number(step)}` : "Prefill";
    document.getElementById("tree-title").textContent = `Token tree of ${step ? stepName(step) : "the prefill"}`;
    this.text.mark(step);
    this.tree.show(row, step);
    this.timeline.mark(step);
    showFacts(row, step);
    showTimes(step);
    for (const [name, end] of [["first", 0], ["previous", 0], ["next", STEPS], ["last", STEPS]]) {
      document.getElementById(name).setAttribute("aria-disabled", step === end);
    }
    document.documentElement.dataset.step = step;
  }

  play() {
    if (this.timer !== null) return this.stop();
    if (this.step === STEPS) this.go(0);
    const pause = Math.min(Math.max(20000 / (STEPS + 1), 80), 700);
    this.timer = setInterval(() => this.go(this.step + 1), pause);
    this.showPlaying();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    this.showPlaying();
  }

  showPlaying() {
    const button = document.getElementById("play");
    const plays = this.timer !== null;
    button.setAttribute("aria-pressed", plays);
    this.where.setAttribute("aria-live", plays ? "off" : "polite");
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select")) return;
    const act = {
      ArrowLeft: () => this.go(this.step - 1),
      ArrowRight: () => this.go(this.step + 1),
      Home: () => this.go(0),
      End: () => this.go(STEPS),
      " ": () => this.play(),
    }[event.key];
    const own = event.key === " " ? event.target.closest("button, summary") : event.target === this.slider || scrolls(event);
    if (!act || own) return;
    event.preventDefault();
    act();
  }
}

/** Whether the arrow keys scroll the tree, because it has the focus and is wider than its box. */
function scrolls(event) {
  const box = event.target;
  return box.id === "tree" && box.scrollWidth > box.clientWidth;
}

function offerRows(player) {
  const select = document.getElementById("row");
  document.getElementById("rows").hidden = run.rows < 2;
  for (let row = 0; row < run.rows; row++) select.append(new Option(`${row + 1} of ${run.rows}`, row, false, row === run.row));
  select.addEventListener("change", () => player.choose(Number(select.value)));
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

showLegend();
showTotals();
offerRows(new Player());
document.getElementById("theme").addEventListener("click", switchTheme);
performance.mark("ready");
document.documentElement.dataset.ready = "";
