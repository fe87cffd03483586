// What a conversation looks like: a turn has a question and one answer, or two side by side.
import { make } from "./dom.js";
import { milliseconds, ratio, table } from "./times.js";

/** One answer, filled as its chunks come. */
export class Card {
  constructor(budget) {
    this.budget = budget;
    this.title = "";
    this.kept = 0;
    this.words = "";
    this.timings = null;
    this.reused = null;
    this.usage = null;
    this.finish = null;
    this.failed = false;
    this.head = make("h4", {}, "Waiting …");
    this.text = make("p", { className: "text" });
    this.facts = make("p", { className: "facts" });
    this.text.setAttribute("aria-busy", "true");
    this.element = make("section", { className: "answer" }, this.head, this.text, this.facts);
  }

  /** Whether the picture's tokens were read already, as part of an earlier prompt. */
  get hasRead() {
    return (this.reused?.positions ?? 0) >= Math.max(1, this.kept);
  }

  add({ choices: [choice] = [], usage, leanvlm }) {
    const piece = choice?.delta?.content;
    if (piece) {
      this.words += piece;
      this.text.append(piece);
    }
    if (leanvlm?.images) {
      const [image] = leanvlm.images;
      this.kept = image ? image.kept : 0;
      this.title = image ? `${image.kept} of ${image.total} tokens` : "no picture";
      this.head.textContent = this.title;
    }
    this.timings = leanvlm?.timings_ms ?? this.timings;
    this.reused = leanvlm?.reused ?? this.reused;
    this.usage = usage ?? this.usage;
    this.finish = choice?.finish_reason ?? this.finish;
  }

  /** Say what is known at the end. */
  end(note = "") {
    const first = this.timings && `first token after ${milliseconds(this.timings.time_to_first_token)} ms`;
    const before = this.reused?.positions ? ` (${this.reused.positions} cached)` : "";
    const read = this.usage && `${this.usage.prompt_tokens} tokens read${before}`;
    const written = this.usage && `${this.usage.completion_tokens} written`;
    const encoded = this.reused?.images && "picture cached";
    const cut = this.finish === "length" && "ended by the limit of new tokens";
    this.text.setAttribute("aria-busy", "false");
    this.head.textContent = this.title || "No answer";
    this.facts.textContent = [first, encoded, read, written, cut, note].filter(Boolean).join(" · ");
  }

  /** Show an error, as it was said. */
  fail(message) {
    this.failed = true;
    this.end();
    this.element.append(make("p", { className: "error", role: "alert" }, message));
  }
}

/** Say what two runs tell, and what they do not. */
function verdict(lean, full) {
  const equal = `The answers are ${lean.words === full.words ? "equal" : "not equal"}.`;
  const isLike = (lean.reused?.images ?? 0) === (full.reused?.images ?? 0) && lean.hasRead === full.hasRead;
  if (!isLike) return ["Not like for like: only one found the picture in the cache. Compare again, and both do.", equal];
  const times = ratio(lean.timings.time_to_first_token, full.timings.time_to_first_token);
  return [times && `First token: the unpruned model took ${times} as long. One run of each, so a rough figure.`, equal];
}

/** A question with its answers; `compare` is called to ask it of the unpruned model. */
export class Turn {
  constructor(question, messages, options, compare) {
    this.messages = messages;
    this.options = options;
    this.cards = [];
    this.answers = make("div", { className: "answers" });
    this.times = make("details", { className: "times", open: true, hidden: true });
    this.button = make("button", { type: "button", className: "compare", hidden: true });
    this.button.addEventListener("click", () => compare(this));
    const asked = make("h3", { className: "asked" }, make("span", { className: "unseen" }, "You asked: "), question);
    this.element = make("article", { className: "turn" }, asked, this.answers, this.times, this.button);
  }

  add(card) {
    this.cards.push(card);
    this.answers.append(card.element);
  }

  /** Take an answer back, such as one that failed. */
  drop(card) {
    this.cards = this.cards.filter((one) => one !== card);
    card.element.remove();
  }

  /** Show what is known once an answer has ended: times, the ratio of two, and whether there is something to compare. */
  settle(unpruned) {
    const runs = this.cards.filter((card) => card.timings);
    const [lean, full] = runs;
    this.button.hidden = !lean || lean.budget === unpruned || !lean.kept;
    this.button.textContent = full ? "Compare again" : "Compare with the unpruned model";
    this.times.hidden = !runs.length;
    if (!runs.length) return;
    const parts = full ? verdict(lean, full).filter(Boolean).map((note) => make("p", {}, note)) : [];
    this.times.replaceChildren(make("summary", {}, "Stage times"), table(runs), ...parts);
  }
}
