// A picture that is being drawn or was drawn: progress, how it was made, and what can be done with it.

/** The answer to a request for pictures, whose steps are seen on `bar`. */
const answerOf = (path, body, bar, signal) => Server.draw(path, body, {
  signal, step: (done, steps) => progress(bar, done, steps), waiting: Live.waiting,
});

/**
 * What was made: {blob, path, body, files, settings, notes, seconds, kept}. `body` draws it again when it is sent to
 * `path` with `files` (blobs of pictures by key) in base64.
 */
class Result {
  constructor(root, nothing) {
    root.append($("result").content.cloneNode(true));
    const part = (name) => root.querySelector(`.${name}`);
    Object.assign(this, {
      root, made: null, image: part("picture"), mat: part("mat"), bar: part("bar"), how: part("how"), notes: part("notes"),
      actions: part("actions"), nothing: part("nothing"),
    });
    say(this.nothing, nothing);
    this.latest = new Latest((on) => this.busy(on));
    this.actions.addEventListener("click", (event) => this.act(event.target.dataset.do));
  }

  busy(on) {
    this.mat.setAttribute("aria-busy", on);
    busy(this.bar, on);
  }

  /** Ask for a picture and show it. `files` are what the request holds besides `body`. */
  async draw({ path, body, files = {} }, signal, keep = false) {
    const whole = { ...body };
    for (const [key, blob] of Object.entries(files)) whole[key] = await base64Of(blob);
    if (keep) whole.keep = true;
    const answer = await answerOf(path, whole, this.bar, signal);
    if (signal.aborted) return;
    this.show({ path, body, files, blob: pictureOf(answer.pictures[0]), ...answer });
  }

  show(made) {
    Live.alert(null);
    this.made = made;
    const { settings, notes, seconds } = made;
    show(this.image, made.blob, `Picture of: ${settings.prompt}`);
    this.nothing.hidden = true;
    const fact = (name, value) => (value === undefined || value === null ? null : `${name} ${value}`);
    const facts = [
      fact("seed", settings.seed), settings.steps === undefined ? null : `${settings.steps} step${settings.steps === 1 ? "" : "s"}`,
      fact("guidance", settings.guidance_scale), settings.sampler, fact("strength", settings.strength),
      settings.width === undefined ? null : `${settings.width} \u00d7 ${settings.height}`,
      seconds === undefined ? null : `${seconds.toFixed(2)} s`,
    ];
    const parts = facts.filter(Boolean).flatMap((each, k) => [...(k ? [" \u00b7 "] : []), make("span", {}, each)]);
    this.how.replaceChildren(...parts);
    this.notes.replaceChildren(...(notes ?? []).map((each) => make("li", {}, each)));
    this.actions.hidden = false;
    this.kept(Boolean(made.kept?.length));
    Live.told(`Picture drawn: ${this.how.textContent}`);
  }

  kept(on) {
    const button = this.actions.querySelector("[data-do=keep]");
    button.hidden = !Settings.info.history;
    button.disabled = on;
    say(button, on ? "Kept" : "Keep");
  }

  act(what) {
    const made = this.made;
    if (!what || !made) return;
    if (what === "save") save(made.blob, fileName(made.settings));
    else if (what === "copy") Copies.open(made);
    else if (what === "edit") Live.edit(made.blob);
    else if (what === "sketch") Live.sketch(made.blob);
    else if (what === "keep") this.keep();
  }

  /** Draw it once more, exactly as it is, for the server to keep: pictures on the way are not kept. */
  keep() {
    this.latest.now(async (signal) => {
      await this.draw(this.made, signal, true);
      this.actions.querySelector("[data-do=save]").focus();
      await History.refresh();
    });
  }
}
