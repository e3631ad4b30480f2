// A picture that is there, edited: a part of it drawn anew, what lies around it, the whole of it.

const Edit = (() => {
  const MASK = "#e11d48"; // as it is shown over the picture
  const SIDES = ["left", "top", "right", "bottom"];
  let surface, result;
  let source = null; // a blob
  let before = []; // sources that were edited earlier
  let last = null; // the task that was asked for last
  const picture = make("img", { className: "below", alt: "" });

  const said = () => {
    const auto = $("edit-auto").checked;
    $("edit-strength").disabled = auto;
    say($("edit-strength-said"), auto ? "" : Number($("edit-strength").value).toFixed(2));
  };

  const mask = async () => {
    const { width, height } = surface.canvas, copy = surface.copy(), context = copy.getContext("2d");
    const pixels = context.getImageData(0, 0, width, height), data = pixels.data;
    for (let k = 0; k < data.length; k += 4) {
      data.fill(data[k + 3] >= 128 ? 255 : 0, k, k + 3);
      data[k + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
    return blobOf(copy);
  };

  const TASKS = {
    inpaint: async () => ({ files: { mask: await mask() } }),
    outpaint: () => ({ body: { grow: SIDES.map((side) => Number($(`grow-${side}`).value) || 0) } }),
    vary: () => ({}), colorize: () => ({}), upscale: () => ({ body: { scale: 2 } }),
  };

  const draw = async (signal) => {
    const own = await TASKS[last]();
    const body = { task: last, ...Settings.body({ sized: false }), ...own.body };
    if (!$("edit-auto").checked) body.strength = Number($("edit-strength").value);
    await result.draw({ path: "/v1/edits", body, files: { picture: source, ...own.files } }, signal);
  };
  const ask = (task) => {
    last = task;
    result.latest.now(draw);
  };
  const again = (calm) => { if (source && last && Settings.live) result.latest.soon(draw, calm); };

  const enable = () => {
    for (const id of ["edit-mask", "edit-grow", "edit-whole", "edit-how"]) $(id).disabled = !source;
    $("edit-none").hidden = Boolean(source);
    $("edit-surface").hidden = !source;
    $("edit-back").disabled = !before.length;
  };

  const put = async (blob) => {
    const bitmap = await opened(blob);
    source = blob;
    surface.empty = true;
    surface.forget();
    surface.resize(bitmap.width, bitmap.height, null);
    surface.clear();
    surface.canvas.classList.toggle("coarse", Math.max(bitmap.width, bitmap.height) < 256);
    show(picture, blob, "The picture to edit");
    last = null;
    enable();
  };

  /** A file of the user's, at a size that the server draws. */
  const fitted = async (file) => {
    const bitmap = await opened(file), most = Settings.info.limits.side;
    const scale = Math.min(1, most / Math.max(bitmap.width, bitmap.height));
    const canvas = canvasOf(Math.max(8, Math.round(bitmap.width * scale)), Math.max(8, Math.round(bitmap.height * scale)));
    const context = canvas.getContext("2d");
    context.fillStyle = "#ffffff"; // below what is transparent, as the server does it
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return blobOf(canvas);
  };

  const take = async (blob) => {
    if (source) before.push(source);
    before = before.slice(-20);
    await put(blob);
  };

  const invert = () => {
    surface.remember();
    const context = surface.context, { width, height } = surface.canvas;
    context.globalCompositeOperation = "xor";
    context.fillStyle = MASK;
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "source-over";
    changed();
  };
  const changed = () => { if (last === "inpaint") again(60); };

  return {
    take: (blob) => Live.guarded(() => take(blob)),
    fill: (file) => Live.guarded(async () => take(await fitted(file))),
    open(info) {
      result = new Result($("edited"), "What you ask for is shown here.");
      surface = new Surface($("edit-surface"), "Mask over the picture", changed);
      surface.frame.prepend(picture);
      surface.frame.classList.add("masked");
      surface.colour = MASK;
      tools("mask", surface);
      for (const task of Object.keys(TASKS)) $(task).addEventListener("click", () => ask(task));
      for (const side of SIDES) {
        $(`grow-${side}`).value = Math.round(info.base.side / 32) * 8;
        $(`grow-${side}`).addEventListener("input", () => { if (last === "outpaint") again(400); });
      }
      $("edit-strength").value = 0.5;
      for (const id of ["edit-auto", "edit-strength"]) $(id).addEventListener("input", () => { said(); again(); });
      $("mask-invert").addEventListener("click", invert);
      $("edit-back").addEventListener("click", () => Live.guarded(() => put(before.pop())));
      whenChosen($("edit-file"), this.fill);
      said();
      enable();
    },
    press() {
      if (!source) Live.alert(new Error('there is no picture to edit yet: press "Edit" under one, or open one'));
      else if (!last) Live.alert(new Error("choose what to do with the picture first"));
      else result.latest.now(draw);
    },
    changed: () => again(),
  };
})();
