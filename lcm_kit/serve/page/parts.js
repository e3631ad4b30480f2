// Small things that all others use. What comes from outside becomes text, never HTML.

const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings are text. */
const make = (name, properties = {}, ...children) => {
  const { role, label, data, ...own } = properties;
  const element = Object.assign(document.createElement(name), own);
  if (role) element.setAttribute("role", role);
  if (label) element.setAttribute("aria-label", label);
  Object.assign(element.dataset, data ?? {});
  element.append(...children);
  return element;
};

const say = (element, text) => { if (element.textContent !== text) element.textContent = text; };
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const pause = (milliseconds, signal) => new Promise((done, stop) => {
  const ended = () => { clearTimeout(timer); stop(signal.reason); };
  const timer = setTimeout(() => { signal?.removeEventListener("abort", ended); done(); }, milliseconds);
  if (signal?.aborted) ended();
  else signal?.addEventListener("abort", ended, { once: true });
});

/** A picture of an answer as a blob; and a blob in base64, in pieces that a call takes as arguments. */
const pictureOf = ({ base64 }) =>
  new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type: "image/png" });
const base64Of = async (blob) => {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let k = 0; k < bytes.length; k += 32768) text += String.fromCharCode(...bytes.subarray(k, k + 32768));
  return btoa(text);
};

/** Show a blob in an <img>; the address of the one before is given back. */
const show = (image, blob, alt) => {
  const before = image.src;
  image.src = URL.createObjectURL(blob);
  image.alt = alt;
  image.hidden = false;
  if (before.startsWith("blob:")) URL.revokeObjectURL(before);
};

/** How far a drawing is, on a bar that is seen while `on`. */
const progress = (bar, done, steps) => {
  bar.firstElementChild.style.transform = `scaleX(${done / steps})`;
  Object.assign(bar, { ariaValueNow: done, ariaValueMax: steps });
};
const busy = (bar, on) => {
  bar.classList.toggle("on", on);
  if (on) progress(bar, 0, 1);
};

const save = (blob, name) => {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
};

/** A name for a file: what was drawn, in letters that every file system takes. */
const fileName = (settings) => {
  const words = (settings.prompt ?? "").toLowerCase().normalize("NFKD").replace(/[^a-z0-9]+/g, "-");
  return `${words.replace(/^-+|-+$/g, "").slice(0, 48) || "picture"}-${settings.seed ?? 0}.png`;
};

/** A file as a bitmap; a sentence where it is none. */
const opened = async (file) => {
  const most = 64 * 2 ** 20;
  if (file.size > most) throw new Error(`${file.name} has more than 64 MB; give a smaller picture`);
  try {
    return await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "what was pasted"} is no picture that this browser reads; try PNG or JPEG`);
  }
};

/** `take` each file that is chosen in `field`, also the same one again. */
const whenChosen = (field, take) => field.addEventListener("change", () => {
  const [file] = field.files;
  field.value = "";
  if (file) take(file);
});

const blobOf = (canvas) => new Promise((done) => canvas.toBlob(done, "image/png"));
const canvasOf = (width, height) => make("canvas", { width, height });

/** Ask before something is lost; whether the answer was yes. */
const sure = (question, verb) => new Promise((done) => {
  const dialog = $("sure");
  say($("sure-title"), question);
  say($("sure-yes"), verb);
  let answer = false;
  $("sure-yes").onclick = () => { answer = true; dialog.close(); };
  dialog.addEventListener("close", () => done(answer), { once: true });
  dialog.showModal();
});

document.addEventListener("click", (event) => event.target.closest("[data-close]")?.closest("dialog").close());
