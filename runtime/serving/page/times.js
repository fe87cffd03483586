// The table of stage times, for one answer or for two side by side.
import { make } from "./dom.js";

// As in `Timings.to_dict`.
const STAGES = {
  preprocess: "preprocess",
  vision_graph: "vision, project, prune",
  splice: "splice",
  prefill: "prefill",
  sample: "sample",
  decode: "decode",
  time_to_first_token: "first token",
};
// Below it, in ms, a ratio of two single runs says nothing.
const SHORTEST = 0.5;

/** Return ms as text of about three digits. */
export const milliseconds = (value) => value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);

/** Return how many times `value` is `base`, or nothing where that says nothing. */
export const ratio = (base, value) => (base >= SHORTEST && value >= SHORTEST ? `${(value / base).toPrecision(2)}×` : "");

function cell(value, most) {
  const bar = make("span", { className: "bar" });
  bar.style.inlineSize = `${(100 * value) / most}%`;
  return make("td", {}, make("span", { className: "number" }, milliseconds(value)), bar);
}

/**
 * Return a table of stage times in ms.
 *
 * Each run is {title, timings}; a second one stands beside the first, with how many times longer it took.
 */
export function table(runs) {
  const stages = Object.keys(STAGES).filter((stage) => stage in runs[0].timings);
  const most = Math.max(SHORTEST, ...runs.flatMap(({ timings }) => stages.map((stage) => timings[stage])));
  const heads = ["stage", ...runs.map(({ title }) => `${title}, ms`), ...(runs.length > 1 ? ["ratio"] : [])];
  const rows = stages.map((stage) => {
    const values = runs.map(({ timings }) => timings[stage]);
    const row = make("tr", {}, make("th", { scope: "row" }, STAGES[stage]), ...values.map((value) => cell(value, most)));
    if (runs.length > 1) row.append(make("td", { className: "number" }, ratio(...values)));
    return row;
  });
  const head = make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text))));
  const caption = make("caption", { className: "unseen" }, "Time of each stage in milliseconds");
  return make("table", {}, caption, head, make("tbody", {}, ...rows));
}
