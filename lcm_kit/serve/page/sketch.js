// A picture from what is drawn with a brush.

const Sketch = (() => {
  const COLOURS = [
    ["black", "#1b1d21"], ["grey", "#80848a"], ["white", "#ffffff"], ["red", "#cd3e3a"], ["orange", "#ec8c34"],
    ["yellow", "#eecd4a"], ["green", "#54a454"], ["blue", "#4274d0"], ["purple", "#8a54b2"], ["pink", "#ec92b2"],
    ["brown", "#7a5236"], ["skin", "#e3b18f"],
  ];
  const FINE = 512; // pixels of the sheet's longer side, at least: strokes are smooth where pictures are small
  const PAPER = "#ffffff";
  let surface, result, erasing, touched = false;

  const strength = $("sketch-strength");
  const said = () => say($("sketch-strength-said"), Number(strength.value).toFixed(2));

  const request = async () => {
    const { width, height } = Settings.size, small = canvasOf(width, height), context = small.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(surface.canvas, 0, 0, width, height);
    const body = { task: "sketch", ...Settings.body({ sized: false }), strength: Number(strength.value) };
    return { path: "/v1/edits", body, files: { picture: await blobOf(small) } };
  };
  const draw = async (signal) => result.draw(await request(), signal);

  let keeping = 0;
  const keep = () => {
    clearTimeout(keeping);
    keeping = setTimeout(() => {
      const text = touched ? surface.canvas.toDataURL("image/png") : null;
      Kept.set({ sketch: text && text.length < 1e6 ? text : null }); // browsers keep some 5 MB in all
    }, 500);
  };

  const changed = () => {
    touched = true;
    keep();
    if (Settings.live && Settings.prompt.trim()) result.latest.soon(draw, 60);
  };

  /** The sheet has the shape of the picture, and is finer where that is small. */
  const fit = () => {
    const { width, height } = Settings.size;
    if (!(width >= 8 && height >= 8 && width <= 8192 && height <= 8192)) return;
    const fine = Math.max(1, Math.ceil(FINE / Math.max(width, height)));
    surface.resize(Math.round(width) * fine, Math.round(height) * fine, PAPER);
  };

  const fill = (file) => Live.guarded(async () => surface.fill(await opened(file)));

  const swatches = () => {
    const chosen = Kept.get("colour", COLOURS[0][1]);
    const pick = (colour) => { surface.colour = colour; erasing(false); Kept.set({ colour }); };
    const own = make("input", { type: "color", value: chosen, label: "Another colour", title: "Another colour" });
    own.addEventListener("input", () => {
      for (const each of $("swatches").querySelectorAll("input[type=radio]")) each.checked = false;
      pick(own.value);
    });
    for (const [name, colour] of COLOURS) {
      const radio = make("input", { type: "radio", name: "colour", value: colour, label: name, title: name, checked: colour === chosen });
      radio.style.setProperty("--colour", colour);
      radio.addEventListener("change", () => { pick(colour); own.value = colour; });
      $("swatches").append(radio);
    }
    $("swatches").append(own);
    surface.colour = chosen;
  };

  return {
    open(info) {
      result = new Result($("sketched"), "Draw something: the picture follows.");
      surface = new Surface($("sketch-surface"), "Sketch", changed);
      surface.frame.classList.add("paper");
      erasing = tools("sketch", surface);
      swatches();
      fit();
      const old = Kept.get("sketch", "");
      if (old.startsWith("data:image/png;base64,")) {
        const image = new Image();
        image.onload = () => {
          surface.context.drawImage(image, 0, 0, surface.canvas.width, surface.canvas.height);
          touched = true;
          surface.empty = false;
        };
        image.src = old;
      }
      strength.value = Kept.get("sketchStrength", info.edits.sketch.strength);
      said();
      strength.addEventListener("input", () => { said(); Kept.set({ sketchStrength: Number(strength.value) }); changed(); });
      whenChosen($("sketch-file"), fill);
    },
    fill,
    press() { result.latest.now(draw); },
    changed() {
      if (touched && Settings.prompt.trim()) result.latest.soon(draw);
    },
    sized: fit,
  };
})();
