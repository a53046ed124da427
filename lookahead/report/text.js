"use strict";

// The text: a span for each step, and in it one for each token.
class Text {
  constructor(go) {
    this.box = document.getElementById("text");
    this.tip = document.getElementById("tip");
    this.box.addEventListener("click", (event) => {
      const step = this.stepOf(event.target);
      if (step !== null) go(step);
    });
    this.box.addEventListener("mouseover", (event) => this.say(event.target));
    this.box.addEventListener("focusin", (event) => this.say(event.target));
    for (const kind of ["mouseleave", "focusout", "scroll"]) this.box.addEventListener(kind, () => (this.tip.hidden = true));
    this.box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.tip.hidden = true;
    });
  }

  /** Write the whole text of a row. */
  show(row) {
    this.row = row;
    this.spans = [];
    this.origins = [];
    this.now = null;
    const all = document.createDocumentFragment();
    for (let step = 0; step <= STEPS; step++) {
      const [from, to] = row.span(step);
      const span = element("span", "pass later");
      span.dataset.step = step;
      if (row.tokens) this.fill(span, step, from);
      else if (to > from) span.append(element("span", "count", `+${number(to - from)}`));
      this.spans.push(span);
      if (to > from) all.append(span);
    }
    this.box.className = row.pieces ? "words" : "ids";
    this.box.replaceChildren(all);
    this.shown = -1;
  }

  fill(span, step, from) {
    this.row.origins(step).forEach((origin, i) => {
      const text = this.row.pieces ? this.row.pieces[from + i] : String(run.ids[this.row.tokens[from + i]]);
      const token = element("span", origin ? `token ${sourceAt(origin.source).kind}` : "token own", text);
      if (text === "") token.classList.add("void");
      if (/^[\n\r]+ *$/.test(text)) token.classList.add("line");
      token.dataset.at = from + i;
      span.append(token);
    });
  }

  stepOf(target) {
    const span = target.closest(".pass");
    return span ? Number(span.dataset.step) : null;
  }

  /** Mark what was written up to a step, and the tokens of the step. */
  mark(step) {
    const [low, high] = step > this.shown ? [this.shown + 1, step] : [step + 1, this.shown];
    for (let at = low; at <= high; at++) this.spans[at].classList.toggle("later", step < this.shown);
    this.shown = step;
    const refocus = this.now?.contains(document.activeElement);
    if (this.now) this.leave(this.now);
    this.now = this.spans[step];
    this.enter(this.now, step);
    if (refocus) (this.now.querySelector(".token") ?? this.box).focus({preventScroll: true});
    this.scrollTo(this.now);
  }

  /** The tokens of the step can be reached by Tab, and say what they are. */
  enter(span, step) {
    span.classList.add("now");
    for (const token of span.querySelectorAll(".token")) {
      token.tabIndex = 0;
      token.setAttribute("role", "button");
      token.setAttribute("aria-label", `${token.textContent}, ${this.about(step, Number(token.dataset.at))}`);
    }
  }

  leave(span) {
    span.classList.remove("now");
    for (const token of span.querySelectorAll(".token")) {
      for (const name of ["tabindex", "role", "aria-label"]) token.removeAttribute(name);
    }
  }

  /** Where a token comes from, in words. */
  about(step, at) {
    const origin = this.row.origins(step)[at - this.row.span(step)[0]];
    if (!origin) return `${stepName(step)}: the model's own pick`;
    const chance = origin.chance === null ? "" : `, chance ${percent(origin.chance, 1000)}`;
    return `${stepName(step)}: accepted, source ${sourceAt(origin.source).name}${chance}`;
  }

  say(target) {
    const token = target.closest(".token");
    if (!token) return void (this.tip.hidden = true);
    this.tip.textContent = this.about(this.stepOf(token), Number(token.dataset.at));
    this.tip.hidden = false;
    const place = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const left = Math.min(place.left, document.documentElement.clientWidth - this.tip.offsetWidth - 8);
    const above = place.top - this.tip.offsetHeight - 6;
    this.tip.style.left = `${Math.max(left, 8)}px`;
    this.tip.style.top = `${above < 0 ? place.bottom + 6 : above}px`;
  }

  scrollTo(span) {
    const place = span.getBoundingClientRect();
    const box = this.box.getBoundingClientRect();
    if (place.height && (place.top < box.top + 8 || place.bottom > box.bottom - 8)) {
      this.box.scrollTop += place.top - box.top - box.height / 4;
    }
  }
}

/** The prompt of a row, folded away. */
function showPrompt(row) {
  const prompt = run.prompts[row.number];
  const box = document.getElementById("prompt");
  box.hidden = prompt === undefined || prompt.length === 0;
  if (box.hidden) return;
  const words = typeof prompt === "string";
  const size = words ? many(prompt.length, "character", "characters") : many(prompt.length, "token", "tokens");
  box.querySelector("summary").textContent = `Prompt, ${size}`;
  document.getElementById("prompt-text").textContent = words ? prompt : prompt.join(" ");
}
