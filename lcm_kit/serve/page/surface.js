// A sheet to draw on, with a pointer, a pen or the keyboard; what was done can be taken back.

class Surface {
  static MOST = 128 * 2 ** 20; // bytes of what can be taken back

  /** `changed()` is told of every stroke; `label` names the sheet for those who cannot see it. */
  constructor(root, label, changed) {
    Object.assign(this, {
      root, changed, size: 8, colour: "#000000", erasing: false, done: [], undone: [], pen: null, at: null, paper: null,
      empty: true,
    });
    this.canvas = make("canvas", { width: 8, height: 8, tabIndex: 0, role: "application", label });
    this.canvas.setAttribute("aria-roledescription", "drawing sheet");
    this.cross = make("span", { className: "cross" });
    const keys = make("p", { className: "keys", id: `${root.id}-keys` },
      "Arrow keys move the brush, Shift makes them quick; Space sets it down and lifts it; [ and ] change its size; " +
      "Ctrl+Z takes back, Ctrl+Y does it again.");
    this.told = make("span", { className: "away", role: "status" });
    this.canvas.setAttribute("aria-describedby", keys.id);
    this.frame = make("div", { className: "sheet" }, this.canvas, this.cross);
    root.append(this.frame, keys, this.told);
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.listen();
  }

  /** A sheet of this size; `paper` is the colour below, null: none. What is drawn is stretched to it. */
  resize(width, height, paper) {
    const same = this.canvas.width === width && this.canvas.height === height;
    if (same && this.paper === paper) return;
    const before = this.copy();
    this.paper = paper;
    Object.assign(this.canvas, { width, height });
    this.frame.style.aspectRatio = `${width} / ${height}`;
    this.frame.style.setProperty("--ratio", width / height);
    this.clear();
    if (!this.empty) this.context.drawImage(before, 0, 0, width, height);
    this.at = null;
  }

  clear() {
    this.context.globalCompositeOperation = "source-over";
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (this.paper) {
      this.context.fillStyle = this.paper;
      this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    }
  }

  copy() {
    const copy = canvasOf(this.canvas.width, this.canvas.height);
    copy.getContext("2d").drawImage(this.canvas, 0, 0);
    return copy;
  }

  /** Remember what is there before it is changed. */
  remember() {
    this.done.push(this.copy());
    this.undone = [];
    this.empty = false;
    const most = Math.max(2, Math.floor(Surface.MOST / (4 * this.canvas.width * this.canvas.height)));
    this.done.splice(0, this.done.length - most);
  }

  forget() {
    this.done = [];
    this.undone = [];
  }

  back(from = this.done, to = this.undone) {
    if (!from.length) return;
    to.push(this.copy());
    const found = from.pop();
    this.clear();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.context.drawImage(found, 0, 0, this.canvas.width, this.canvas.height);
    this.changed();
  }
  again() { this.back(this.undone, this.done); }

  wipe() {
    this.remember();
    this.clear();
    this.changed();
  }

  /** A picture over the whole sheet, its middle where it has another shape. */
  fill(bitmap) {
    this.remember();
    this.clear();
    const { width, height } = this.canvas, scale = Math.max(width / bitmap.width, height / bitmap.height);
    const [w, h] = [bitmap.width * scale, bitmap.height * scale];
    this.context.imageSmoothingQuality = "high";
    this.context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
    this.changed();
  }

  /** A part of the sheet's shorter side: of a hundred. */
  get brush() { return Math.max(1, (this.size / 250) * Math.min(this.canvas.width, this.canvas.height)); }

  line(from, to, pressure = 1) {
    const context = this.context, erased = this.erasing && !this.paper;
    context.globalCompositeOperation = erased ? "destination-out" : "source-over";
    context.strokeStyle = this.erasing && this.paper ? this.paper : this.colour;
    Object.assign(context, { lineCap: "round", lineJoin: "round", lineWidth: this.brush * pressure });
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x + 0.001, to.y); // a point, too, is a line
    context.stroke();
    context.globalCompositeOperation = "source-over";
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.canvas.width,
      y: ((event.clientY - box.top) / box.height) * this.canvas.height,
    };
  }

  listen() {
    const canvas = this.canvas;
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || this.pen !== null) return;
      canvas.setPointerCapture(event.pointerId);
      this.remember();
      this.pen = event.pointerId;
      this.at = this.place(event);
      this.line(this.at, this.at, this.pressure(event));
      this.changed();
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerId !== this.pen) return;
      const moves = event.getCoalescedEvents?.() ?? [];
      for (const each of moves.length ? moves : [event]) {
        const to = this.place(each);
        this.line(this.at, to, this.pressure(each));
        this.at = to;
      }
      this.changed();
    });
    for (const kind of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(kind, (event) => {
        if (event.pointerId !== this.pen) return;
        this.pen = null;
        this.changed();
      });
    }
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focus", () => this.aim());
    canvas.addEventListener("blur", () => { if (this.pen === "keys") this.lift(); });
  }

  pressure(event) { return event.pointerType === "pen" ? 0.3 + 0.7 * event.pressure : 1; }

  // -- Without a pointer

  key(event) {
    const far = this.brush * (event.shiftKey ? 4 : 0.75), name = event.key.toLowerCase();
    const way = { arrowleft: [-1, 0], arrowright: [1, 0], arrowup: [0, -1], arrowdown: [0, 1] }[name];
    if (event.ctrlKey || event.metaKey) {
      if (name === "z") event.shiftKey ? this.again() : this.back();
      else if (name === "y") this.again();
      else return;
    } else if (way) this.go(way[0] * far, way[1] * far);
    else if (name === " ") this.pen === "keys" ? this.lift() : this.set();
    else if (name === "[" || name === "]") this.sized(clamp(this.size + (name === "]" ? 4 : -4), 1, 100));
    else if (name === "escape" && this.pen === "keys") this.lift();
    else return;
    event.preventDefault();
  }

  sized(size) { this.size = size; }

  aim() {
    this.at ??= { x: this.canvas.width / 2, y: this.canvas.height / 2 };
    this.cross.style.left = `${(100 * this.at.x) / this.canvas.width}%`;
    this.cross.style.top = `${(100 * this.at.y) / this.canvas.height}%`;
    this.cross.classList.toggle("down", this.pen === "keys");
  }

  where() { return `${Math.round((100 * this.at.x) / this.canvas.width)}% from the left, ${Math.round((100 * this.at.y) / this.canvas.height)}% from the top`; }

  set() {
    this.aim();
    this.remember();
    this.pen = "keys";
    this.line(this.at, this.at);
    this.aim();
    say(this.told, `Brush down, ${this.where()}`);
    this.changed();
  }

  lift() {
    this.pen = null;
    this.aim();
    say(this.told, `Brush up, ${this.where()}`);
  }

  go(x, y) {
    this.aim();
    const to = { x: clamp(this.at.x + x, 0, this.canvas.width), y: clamp(this.at.y + y, 0, this.canvas.height) };
    if (this.pen === "keys") {
      this.line(this.at, to);
      this.changed();
    }
    this.at = to;
    this.aim();
  }
}

/** Buttons and a slider that belong to a sheet: `name`-size, -erase, -undo, -redo, -clear. */
const tools = (name, surface) => {
  const size = $(`${name}-size`), erase = $(`${name}-erase`);
  const bound = (value) => { surface.size = value; size.value = value; Kept.set({ [`${name}Brush`]: value }); };
  bound(Kept.get(`${name}Brush`, 30));
  surface.sized = bound;
  size.addEventListener("input", () => bound(Number(size.value)));
  const erasing = (on) => { surface.erasing = on; erase.setAttribute("aria-pressed", on); };
  erase.addEventListener("click", () => erasing(!surface.erasing));
  $(`${name}-undo`).addEventListener("click", () => surface.back());
  $(`${name}-redo`).addEventListener("click", () => surface.again());
  $(`${name}-clear`).addEventListener("click", () => surface.wipe());
  return erasing;
};
