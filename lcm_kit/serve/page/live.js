// The page as a whole: modes, what is said to whoever sits here, and how it begins.

const Live = (() => {
  const MODES = { draw: Draw, sketch: Sketch, edit: Edit, frames: Frames, compare: Compare };
  const NAMES = Object.keys(MODES);
  let mode = "draw";

  /** What went wrong, in the sentence that says so; null when it is over. */
  const alert = (error) => say($("alert"), error === null ? "" : error.message || String(error));

  /** Do `work`, and say what went wrong. */
  const guarded = async (work) => {
    try {
      await work();
      alert(null);
    } catch (error) {
      alert(error);
    }
  };

  let counting = 0;
  const waiting = (seconds, said) => {
    clearInterval(counting);
    let left = Math.ceil(seconds);
    const tell = () => say($("wait"), left > 0 ? `${said}; it is asked again in ${left} s` : "");
    tell();
    if (left > 0) counting = setInterval(() => { left -= 1; tell(); if (left <= 0) clearInterval(counting); }, 1000);
  };

  let telling = 0;
  /** For those who cannot see it: once it is calm, so that moving a slider is no stream of words. */
  const told = (text) => {
    clearTimeout(telling);
    telling = setTimeout(() => say($("told"), text), 1000);
  };

  const missing = (name, text) => {
    const said = $(`${name}-missing`);
    said.hidden = false;
    say(said, text);
  };

  const select = (name, { focus = false } = {}) => {
    if (mode !== name) MODES[mode].leave?.();
    mode = name;
    for (const each of NAMES) {
      const tab = $(`tab-${each}`), on = each === name;
      tab.setAttribute("aria-selected", on);
      tab.tabIndex = on ? 0 : -1;
      $(`panel-${each}`).hidden = !on;
      if (on && focus) tab.focus();
    }
    alert(null);
    MODES[mode].enter?.();
    Kept.set({ mode });
  };

  const press = () => {
    Settings.press();
    MODES[mode].press();
  };
  const changed = () => {
    Sketch.sized();
    if (Settings.live) MODES[mode].changed();
  };

  // -- Files that are pasted or dropped

  const received = (file) => {
    if (mode === "edit") Edit.fill(file);
    else {
      select("sketch");
      Sketch.fill(file);
    }
  };
  const fileOf = (data) => [...(data?.files ?? [])][0];

  const listen = () => {
    for (const name of NAMES) $(`tab-${name}`).addEventListener("click", () => select(name));
    $("stage").querySelector("[role=tablist]").addEventListener("keydown", (event) => {
      const to = { ArrowLeft: NAMES.indexOf(mode) - 1, ArrowRight: NAMES.indexOf(mode) + 1, Home: 0, End: NAMES.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      select(NAMES[(to + NAMES.length) % NAMES.length], { focus: true });
    });
    $("draw").addEventListener("click", press);
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      press();
    });
    document.addEventListener("paste", (event) => {
      const file = fileOf(event.clipboardData);
      if (!file || document.querySelector("dialog[open]")) return;
      event.preventDefault();
      received(file);
    });
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => { // or the browser would leave for the file
      event.preventDefault();
      const file = fileOf(event.dataTransfer);
      if (file && !document.querySelector("dialog[open]")) received(file);
    });
    $("forget").addEventListener("click", () => { Server.forget(); location.reload(); });
  };

  const about = (info) => {
    say($("what"), [info.base.path, ...info.adapters.map((each) => each.name)].join(" + "));
    $("forget").hidden = !Server.hasToken();
  };

  const begin = async () => {
    Server.listeners.lost = (seconds) => {
      $("state").classList.add("lost");
      say($("state"), `Connection lost; trying again in ${seconds} s`);
    };
    Server.listeners.found = () => {
      if (!$("state").classList.contains("lost")) return;
      $("state").classList.remove("lost");
      say($("state"), "Connected again");
    };
    let info = await Server.call("/v1/info", { waiting });
    while (info.state === "loading") {
      say($("state"), "The server is loading its base ...");
      await pause(1000);
      info = await Server.call("/v1/info", { waiting });
    }
    say($("state"), "");
    about(info);
    Settings.open(info, changed);
    for (const each of Object.values(MODES)) each.open(info);
    History.open(info);
    listen();
    const old = Kept.get("mode", "draw");
    select(NAMES.includes(old) ? old : "draw");
    document.body.classList.add("ready");
  };

  return {
    alert, guarded, waiting, told, missing, begin, mode: select,
    edit(blob) { select("edit", { focus: true }); Edit.take(blob); },
    sketch(blob) { select("sketch", { focus: true }); Sketch.fill(blob); },
  };
})();

Live.begin().catch((error) => Live.alert(error));
