// What is to be drawn: the controls, what serves where nothing was set, and the request that they make.

const Settings = (() => {
  let info = null, changed = () => {};
  let weights; // of the adapters, by name; 0 is off
  let own; // steps, guidance and sampler; null: as recommended
  let size; // width, height, and the shape that is named

  const sliders = {
    steps: { range: $("steps"), number: $("steps-number"), reset: $("steps-reset") },
    guidance: { range: $("guidance"), number: $("guidance-number"), reset: $("guidance-reset") },
  };

  /** What serves the first adapter that is on, or the base alone: as the server chooses where it is told nothing. */
  const recommended = () => {
    const { sampler, steps, guidance_scale } =
      (info.adapters.find((each) => weights[each.name]) ?? info.base).settings;
    return { sampler, steps, guidance: guidance_scale };
  };
  const current = (name) => own[name] ?? recommended()[name];

  const keep = () => Kept.set({
    prompt: $("prompt").value, negative: $("negative").value, seed: $("seed").value,
    locked: locked(), live: $("live").checked, weights, own, size,
  });
  const locked = () => $("lock").getAttribute("aria-pressed") === "true";
  const lock = (on) => $("lock").setAttribute("aria-pressed", on);

  /** Controls as the values are, but for the one in which somebody types just now. */
  const refresh = ({ all = false } = {}) => {
    const put = (field, value) => { if (all || field !== document.activeElement) field.value = value; };
    const said = recommended(), alone = info.adapters.every((each) => !weights[each.name]);
    sliders.steps.range.max = Math.min(info.limits.steps, alone ? info.limits.steps : Math.max(8, said.steps));
    for (const [name, { range, number, reset }] of Object.entries(sliders)) {
      put(range, current(name));
      put(number, current(name));
      reset.hidden = own[name] === null;
      say(reset, `as recommended: ${said[name]}`);
    }
    $("sampler").value = own.sampler ?? "";
    say($("sampler").options[0], `as recommended: ${said.sampler}`);
    $("negative-field").hidden = !(current("guidance") > 1);
    for (const each of info.adapters) {
      const row = $("adapter-list").querySelector(`[data-name="${CSS.escape(each.name)}"]`);
      const [range, number] = row.querySelectorAll("input");
      put(range, weights[each.name]);
      put(number, weights[each.name]);
      row.classList.toggle("off", !weights[each.name]);
    }
    put($("width"), size.width);
    put($("height"), size.height);
    $("shape").value = size.shape;
  };

  const done = () => { refresh(); keep(); changed(); };

  const fit = (shape) => {
    const [x, y] = shape.split(":").map(Number), { side, multiple } = info.base;
    const most = Math.floor(info.limits.side / multiple) * multiple;
    const round = (pixels) => clamp(Math.round(pixels / multiple) * multiple, multiple, most);
    size = { width: round(side * Math.sqrt(x / y)), height: round(side * Math.sqrt(y / x)), shape };
  };

  /** A number that was typed; null while it is none yet. */
  const typed = (field) => (field.value === "" ? null : Number(field.value));

  const both = (range, number, set) => {
    range.addEventListener("input", () => { set(Number(range.value)); done(); });
    number.addEventListener("input", () => {
      const value = typed(number);
      if (value === null) return;
      set(value);
      done();
    });
    number.addEventListener("change", () => refresh({ all: true }));
  };

  const adapterRow = (adapter) => {
    const most = Math.max(1.5, 2 * adapter.weight), id = `adapter-${info.adapters.indexOf(adapter)}`;
    const range = make("input", { type: "range", id, min: 0, max: most, step: 0.05 });
    const number = make("input", {
      type: "number", min: -1000, max: 1000, step: "any", label: `Weight of ${adapter.name}, as a number`,
    });
    const row = make("div", { className: "slider", data: { name: adapter.name } },
      make("label", { htmlFor: id }, adapter.name), range, number);
    const words = [adapter.method, adapter.measured, ...adapter.warnings].filter(Boolean);
    row.append(make("p", { className: "hint" }, words.join(". ")));
    both(range, number, (value) => { weights[adapter.name] = value; });
    return row;
  };

  const listen = () => {
    for (const [name, { range, number, reset }] of Object.entries(sliders)) {
      both(range, number, (value) => { own[name] = value; });
      reset.addEventListener("click", () => { own[name] = null; done(); range.focus(); });
    }
    for (const id of ["prompt", "negative", "seed"]) $(id).addEventListener("input", () => { keep(); changed(); });
    $("live").addEventListener("change", () => { keep(); changed(); });
    $("sampler").addEventListener("change", () => { own.sampler = $("sampler").value || null; done(); });
    $("dice").addEventListener("click", () => { roll(); changed(); });
    $("lock").addEventListener("click", () => { lock(!locked()); keep(); });
    $("shape").addEventListener("change", () => {
      const shape = $("shape").value;
      if (shape === "own") size.shape = shape;
      else fit(shape);
      done();
    });
    for (const name of ["width", "height"]) {
      $(name).addEventListener("input", () => {
        const value = typed($(name));
        if (value === null) return;
        Object.assign(size, { [name]: value, shape: "own" });
        done();
      });
    }
    $("reset").addEventListener("click", () => { recommend(); done(); });
    $("more").addEventListener("toggle", () => Kept.set({ more: $("more").open }));
  };

  const roll = () => {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
    keep();
  };

  /** Everything but words and seed as the server recommends it. */
  const recommend = () => {
    own = { steps: null, guidance: null, sampler: null };
    weights = Object.fromEntries(info.adapters.map((each, k) => [each.name, k ? 0 : each.weight]));
    fit("1:1");
  };

  return {
    /** Build the controls for a server, with what was kept of an earlier visit. */
    open(found, told) {
      info = found;
      $("sampler").append(make("option", { value: "" }));
      for (const name of info.samplers) $("sampler").append(make("option", { value: name }, name));
      $("adapters").hidden = !info.adapters.length;
      for (const each of info.adapters) $("adapter-list").append(adapterRow(each));
      $("prompt").maxLength = $("negative").maxLength = info.limits.prompt;
      sliders.steps.number.max = info.limits.steps;
      for (const name of ["width", "height"]) Object.assign($(name), { step: info.base.multiple, max: info.limits.side });
      recommend();
      const old = Kept.get("weights", {}), numbers = Kept.get("own", {}), sides = Kept.get("size", {});
      for (const each of info.adapters) if (Number.isFinite(old[each.name])) weights[each.name] = old[each.name];
      for (const name of ["steps", "guidance"]) if (Number.isFinite(numbers[name])) own[name] = numbers[name];
      if (info.samplers.includes(numbers.sampler)) own.sampler = numbers.sampler;
      if (sides.width > 0 && sides.width <= info.limits.side && sides.height > 0 && sides.height <= info.limits.side) {
        size = { width: sides.width, height: sides.height, shape: `${sides.shape}` };
      }
      $("prompt").value = Kept.get("prompt", "");
      $("negative").value = Kept.get("negative", "");
      $("seed").value = Kept.get("seed", "0") || "0";
      $("live").checked = Kept.get("live", true);
      $("more").open = Kept.get("more", !matchMedia("(max-width: 760px)").matches);
      lock(Kept.get("locked", true));
      listen();
      refresh();
      changed = told;
    },
    get live() { return $("live").checked; },
    get size() { return { width: size.width, height: size.height }; },
    get prompt() { return $("prompt").value; },
    get info() { return info; },
    /** Another seed, unless this one is to be kept. */
    press() { if (!locked()) roll(); },
    /** The request for a picture; without a size for an edit, whose picture has one. */
    body({ sized = true } = {}) {
      const on = info.adapters.filter((each) => weights[each.name]).map((each) => [each.name, weights[each.name]]);
      const negative = current("guidance") > 1 ? $("negative").value.trim() : "";
      return {
        prompt: $("prompt").value,
        ...(negative && { negative_prompt: negative }),
        seed: Number($("seed").value || 0),
        ...(own.steps !== null && { steps: own.steps }),
        ...(own.guidance !== null && { guidance_scale: own.guidance }),
        ...(own.sampler !== null && { sampler: own.sampler }),
        ...(sized && { width: size.width, height: size.height }),
        adapters: Object.fromEntries(on),
      };
    },
    /** Controls as a picture was drawn. */
    restore(found) {
      $("prompt").value = found.prompt ?? "";
      $("negative").value = found.negative_prompt ?? "";
      $("seed").value = found.seed ?? 0;
      lock(true);
      for (const each of info.adapters) weights[each.name] = found.adapters?.[each.name] ?? 0;
      const said = recommended();
      const set = { steps: found.steps, guidance: found.guidance_scale, sampler: found.sampler };
      for (const name of Object.keys(own)) own[name] = set[name] === undefined || set[name] === said[name] ? null : set[name];
      if (found.width && found.height) size = { width: found.width, height: found.height, shape: "own" };
      done();
    },
  };
})();
