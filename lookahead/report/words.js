"use strict";

// How things are written. Whatever comes from the run gets into the page as text, never as markup.
const UNKNOWN = "–";
const SIGNS = {" ": "␣", "\n": "↵", "\t": "→", "\x7f": "␡"};
const LONGEST = 28;

/** A new element with a class and a text. */
function element(name, kind = "", text = "") {
  const made = document.createElement(name);
  if (kind) made.className = kind;
  if (text !== "") made.textContent = text;
  return made;
}

/** What a token says, with signs for what can't be seen. */
function visible(text) {
  if (text === "") return "∅";
  const shown = text.replace(/ {5,}/g, (blanks) => `␣×${blanks.length}`);
  return shown.replace(/[\p{C}\p{Z}]/gu, sign);
}

function sign(letter) {
  const code = letter.codePointAt(0);
  if (SIGNS[letter]) return SIGNS[letter];
  if (code < 32) return String.fromCodePoint(0x2400 + code);
  return `⟨${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
}

/** What the token at a place of `run.ids` says. */
function wordOf(place) {
  const word = run.words?.[place];
  return word === null || word === undefined ? `#${run.ids[place]}` : visible(word);
}

function shortened(text) {
  const letters = [...text];
  return letters.length > LONGEST ? `${letters.slice(0, LONGEST - 1).join("")}…` : text;
}

/** How many columns of a fixed-width font a text takes. */
function columns(text) {
  return [...text].reduce((sum, letter) => sum + (letter.codePointAt(0) < 0x1100 || /[\u2000-\u27ff]/.test(letter) ? 1 : 2), 0);
}

function milliseconds(micro) {
  const value = micro / 1000;
  const digits = Math.abs(value) >= 99.95 ? 0 : Math.abs(value) >= 9.995 ? 1 : 2;
  return value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits});
}

function percent(part, whole) {
  if (!whole) return UNKNOWN;
  const share = (100 * part) / whole;
  return share > 0 && share < 1 ? "<1%" : `${Math.round(share)}%`;
}

function number(value) {
  return value.toLocaleString("en", {maximumFractionDigits: 2});
}

function many(count, one, more) {
  return `${number(count)} ${count === 1 ? one : more}`;
}

/** The name of a source, its colour and two letters that stand for it. */
function sourceAt(place) {
  const [name, hue] = place === null ? ["not recorded", 0] : run.sources[place];
  const shown = name === "" ? "∅" : visible(name).replaceAll("␣", " ");
  const digits = /^source (\d+)$/.exec(shown);
  const mark = hue === 0 ? "?" : digits ? `S${digits[1]}` : [...shown].slice(0, 2).join("");
  return {name: shown, kind: `h${hue}`, mark: mark[0].toUpperCase() + mark.slice(1)};
}

function stepName(step) {
  return step ? `pass ${number(step)}` : "prefill";
}
