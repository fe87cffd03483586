// The page of `leanvlm serve`: holds the conversation, and ties together what the other files do.
import { camera as cameraIn } from "./camera.js";
import { Card, Turn } from "./card.js";
import { chunks, models, ServerError } from "./client.js";
import { by, make } from "./dom.js";
import { blank, decode, draw, drawScale, isCut, layers, words } from "./overlay.js";

const KEY = "leanvlm-key";
// Of the page's end, in pixels: as near as this a reader follows the text.
const NEAR = 160;

let key = sessionStorage.getItem(KEY);
let served = null;
let picture = null;
/** What pruning did to the picture, once the server has said so. */
let seen = null;
/** Replaced by every new conversation, so that a late answer finds that its own is over. */
let talk = { messages: [] };
let asking = null;
let watching = null;
/** The picture that is being read; of two the later one counts. */
let newest = null;
let preparing = false;

const say = (text) => (by("said").textContent = text);
const camera = cameraIn(by("video"), showCamera);

function notice(text) {
  by("notice").textContent = text;
  by("notice").hidden = !text;
}

/** Return an error in words: the server's as they are. */
function explain(error) {
  if (!(error instanceof ServerError)) return `No answer from the server: ${error.message}`;
  const later = error.retryAfter ? ` (try again in ${error.retryAfter} s)` : "";
  return `${[error.status, error.type].filter(Boolean).join(" ")}: ${error.message}${later}`;
}

/* The key. */

/** Ask for the key; resolves to whether one was given. */
function askForKey(why) {
  const dialog = by("locked");
  by("refused").textContent = why;
  by("key").value = "";
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue === "given"), { once: true });
  });
}

/** Do what needs a key, and ask for one as long as the server refuses it. */
async function withKey(action) {
  for (;;) {
    try {
      return await action();
    } catch (error) {
      if (error.status !== 401 || !(await askForKey(error.message))) throw error;
    }
  }
}

by("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  key = by("key").value.trim();
  sessionStorage.setItem(KEY, key);
  by("locked").close("given");
});
by("without").addEventListener("click", () => by("locked").close(""));

/* The model. */

async function connect() {
  try {
    [served] = await withKey(() => models(key));
  } catch (error) {
    by("served").textContent = "Not connected";
    notice(`${explain(error)} `);
    const again = make("button", { type: "button" }, "Try again");
    again.addEventListener("click", connect);
    return by("notice").append(again);
  }
  notice("");
  const { budgets, default_budget: usual, unpruned, target, precision } = served.leanvlm;
  by("served").textContent = [served.id, target, precision].filter(Boolean).join(" · ");
  const text = (budget) => (budget === unpruned ? `all ${budget}, unpruned` : `${budget} of ${unpruned}`);
  const option = (budget) => make("option", { value: budget, selected: budget === usual }, text(budget));
  by("budget").replaceChildren(...budgets.map(option));
}

/* The picture. */

/** Draw the picture and what is known of it. */
function show() {
  by("figure").hidden = !picture;
  by("hint").hidden = Boolean(picture) || camera.isOn();
  by("views").hidden = !seen;
  if (!picture) return;
  const found = seen ? layers(seen.crops) : [];
  const view = document.querySelector("[name=view]:checked").value;
  const layer = Number(document.querySelector("[name=layer]:checked")?.value ?? 0);
  draw(by("canvas"), picture.canvas, found[layer] ?? [], view);
  by("scale").hidden = view !== "attention";
  const told = seen ? words(seen) : "";
  const cut = seen && isCut(seen.crops) ? "Hatched: cut off before the model." : "";
  by("canvas").setAttribute("aria-label", ["The picture.", told].join(" "));
  by("caption").textContent = [told, cut, picture.note].filter(Boolean).join(" ") || picture.name;
}

/** Take what pruning did to the picture from the server's words. */
function showSeen(image) {
  seen = image;
  const found = layers(image.crops);
  const text = (layer) => (layer.length > 1 ? `${layer.length} tiles` : "Whole picture");
  const choice = (layer, index) => {
    const input = make("input", { type: "radio", name: "layer", value: index, checked: index === 0 });
    return make("label", {}, input, make("span", {}, text(layer)));
  };
  by("layers").hidden = found.length < 2;
  by("layers").replaceChildren(by("layers").querySelector("legend"), ...found.map(choice));
  show();
}

function read(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => done(reader.result));
    reader.addEventListener("error", () => failed(reader.error));
    reader.readAsDataURL(file);
  });
}

/** Begin a conversation about a picture: its bytes go to the server as they are. */
async function take(file, name = file.name) {
  newest = file;
  let url;
  try {
    url = await read(file);
  } catch (error) {
    return notice(`${name} cannot be read: ${error.message}`);
  }
  const canvas = await decode(file).catch(() => null);
  if (newest !== file) return;
  afresh();
  notice("");
  const note = canvas ? "" : `This browser cannot show ${name}; the server may know how to read it.`;
  picture = { url, name, note, canvas: canvas ?? blank() };
  seen = null;
  show();
  say(`Picture: ${name}. A new conversation.`);
}

/** Take what the camera sees now; returns whether it gave something, and is on still. */
async function snap() {
  try {
    await take(await camera.frame(), "frame of the camera");
    return camera.isOn();
  } catch (error) {
    notice(`The camera cannot be used: ${error.message}`);
    return false;
  }
}

function takeFirst(files) {
  const [file] = files ?? [];
  if (file) take(file).then(() => matchMedia("(pointer: coarse)").matches || by("question").focus());
  return Boolean(file);
}

/** Begin a new conversation, about the same picture. */
function afresh() {
  asking?.abort();
  talk = { messages: [] };
  by("turns").replaceChildren();
}

/* Questions. */

/** Put Stop in the place of Ask, or back; the focus goes with them. */
function busy(is) {
  const [gone, come] = is ? [by("ask"), by("stop")] : [by("stop"), by("ask")];
  const isFocused = document.activeElement === gone;
  come.hidden = false;
  gone.hidden = true;
  if (isFocused) come.focus();
  // Not `disabled`, which would take the focus away.
  for (const button of document.querySelectorAll(".compare")) button.setAttribute("aria-disabled", String(is));
}

/** Scroll along, if the reader is at the end. */
function follow(change) {
  const page = document.documentElement;
  const near = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR;
  change();
  if (near) page.scrollTop = page.scrollHeight;
}

/** Ask for an answer to a turn, and show it as it comes. */
async function answer(turn, budget, isShown) {
  const card = new Card(budget);
  const control = (asking = new AbortController());
  const mine = talk;
  const body = { model: served?.id, messages: turn.messages, ...turn.options, budget };
  busy(true);
  follow(() => turn.add(card));
  try {
    await withKey(async () => {
      for await (const chunk of chunks(body, key, control.signal)) {
        follow(() => card.add(chunk));
        const [image] = chunk.leanvlm?.images ?? [];
        if (image && isShown && mine === talk) showSeen(image);
      }
    });
    card.end();
    say(`${isShown ? "Answer" : "The unpruned model's answer"}: ${card.words}`);
  } catch (error) {
    if (error.name !== "AbortError") card.fail(explain(error));
    else card.end("stopped");
    if (error.name === "AbortError" && mine === talk) say("Stopped.");
  } finally {
    if (asking === control) {
      asking = null;
      busy(false);
    }
  }
  follow(() => turn.settle(served?.leanvlm.unpruned));
  return card;
}

async function compare(turn) {
  if (asking || preparing) return;
  for (const card of turn.cards.slice(1)) turn.drop(card);
  await answer(turn, served.leanvlm.unpruned, false);
}

/** Ask what stands in the box; returns whether there was an answer. */
async function ask() {
  const question = by("question").value.trim();
  if (asking || preparing || !question) return false;
  const round = watching;
  preparing = true;
  const isReady = !camera.isOn() || (await snap());
  preparing = false;
  // Stopped meanwhile: nothing is sent any more.
  if (!isReady || round !== watching) return false;
  const mine = talk;
  const image = picture && !mine.messages.length ? [{ type: "image_url", image_url: { url: picture.url } }] : [];
  const content = image.length ? [...image, { type: "text", text: question }] : question;
  const options = { max_tokens: Number(by("most").value), temperature: Number(by("temperature").value) };
  const turn = new Turn(question, [...mine.messages, { role: "user", content }], options, compare);
  for (const times of document.querySelectorAll(".times")) times.open = false;
  by("turns").append(turn.element);
  if (!watching) by("question").value = "";
  const card = await answer(turn, Number(by("budget").value) || undefined, true);
  if (card.words && !card.failed) mine.messages = [...turn.messages, { role: "assistant", content: card.words }];
  // To ask it again.
  else if (!by("question").value) by("question").value = question;
  return !card.failed;
}

function stop() {
  unwatch();
  asking?.abort();
}

/* The camera. */

function showCamera(reason = "") {
  const every = watching ? `A frame is sent every ${watching.seconds} s.` : "A frame is sent when you ask.";
  if (!camera.isOn()) unwatch();
  by("live").hidden = by("shots").hidden = !camera.isOn();
  by("camera").classList.toggle("on", camera.isOn());
  by("camera").textContent = camera.isOn() ? "Turn the camera off" : "Use the camera";
  by("watch").classList.toggle("on", Boolean(watching));
  by("watch").textContent = watching ? "Stop asking" : "Ask at an interval";
  by("camera-state").textContent = camera.isOn() ? `The camera is on. ${every}` : "";
  say(reason || by("camera-state").textContent || "The camera is off.");
  if (reason) notice(reason);
  show();
}

function unwatch() {
  if (!watching) return;
  clearTimeout(watching.timer);
  watching = null;
  showCamera();
}

/** Ask about a frame now and then; an answer that takes longer is waited for, and an error ends it. */
async function watch(seconds) {
  const mine = (watching = { seconds, timer: 0 });
  showCamera();
  while (watching === mine) {
    const start = performance.now();
    if (!(await ask())) break;
    const left = Math.max(0, 1000 * seconds - (performance.now() - start));
    await new Promise((done) => (mine.timer = setTimeout(done, left)));
  }
  if (watching === mine) unwatch();
}

/* Events. */

by("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
// A field in the closed settings could not show what is wrong with it.
by("settings").addEventListener("invalid", () => (by("settings").open = true), true);
by("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  by("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
by("stop").addEventListener("click", () => {
  stop();
  by("question").focus();
});
by("afresh").addEventListener("click", () => {
  afresh();
  say("A new conversation.");
  by("question").focus();
});
by("views").addEventListener("change", show);
by("file").addEventListener("change", (event) => {
  takeFirst(event.target.files);
  // The same file may be chosen again.
  event.target.value = "";
});
document.addEventListener("paste", (event) => takeFirst(event.clipboardData?.files) && event.preventDefault());
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  by("place").classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget || by("place").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  by("place").classList.remove("over");
  if (!takeFirst(event.dataTransfer?.files)) notice("That was no file. Save the picture first, and drop its file.");
});
by("camera").addEventListener("click", () => {
  if (camera.isOn()) return camera.stop();
  notice("");
  camera.start().catch((error) => notice(`The camera cannot be used: ${error.message}`));
});
by("shot").addEventListener("click", async () => {
  if (await snap()) camera.stop();
});
by("watch").addEventListener("click", () => {
  if (watching) return stop();
  if (!by("question").value.trim()) return by("question").reportValidity();
  if (by("interval").reportValidity()) watch(Number(by("interval").value));
});

drawScale(by("colours"));
connect();
