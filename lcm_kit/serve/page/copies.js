// What draws a picture again: as a command of lcm-kit, as curl and as Python, quoted so that words stay words.

const Copies = (() => {
  const DRAWN = ["prompt", "negative_prompt", "seed", "count", "sampler", "steps", "guidance_scale", "width", "height", "adapters"];
  const EDITED = ["sampler", "steps", "guidance_scale", "strength", "seed", "adapters"];
  const TOKEN = "LCM_KIT_TOKEN"; // the variable that holds it: the token itself stands in no text

  /** For a POSIX shell: nothing within single quotes means anything. */
  const quoted = (value) => {
    const text = String(value);
    return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
  };

  /** A value as Python writes it. */
  const python = (value) => {
    if (value === null) return "None";
    if (typeof value === "boolean") return value ? "True" : "False";
    if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
    if (typeof value === "object") {
      return `{${Object.entries(value).map(([key, each]) => `${python(key)}: ${python(each)}`).join(", ")}}`;
    }
    return JSON.stringify(value); // its escapes are among Python's
  };

  const chosen = (settings, keys) => Object.fromEntries(
    keys.filter((key) => settings[key] !== undefined && settings[key] !== null).map((key) => [key, settings[key]]));

  /** The whole request, with everything that the server settled. */
  const exact = ({ path, body, settings }) =>
    (path === "/v1/pictures" ? chosen(settings, DRAWN) : { ...body, ...chosen(settings, EDITED) });
  const file = (key) => `${key}.png`;

  const command = (made) => {
    const asked = exact(made), { base, adapters } = Settings.info;
    const on = Object.entries(asked.adapters ?? {});
    if (on.length > 1) return [null, `lcm-kit draws with one adapter, and here ${on.length} are on: copy as curl or Python.`];
    const options = { base: base.path };
    if (on.length) {
      options.adapter = adapters.find((each) => each.name === on[0][0])?.given ?? on[0][0];
      options.weight = on[0][1];
    }
    const names = { negative_prompt: "negative", guidance_scale: "guidance", prompt_to: "prompt-to" };
    for (const [key, value] of Object.entries(asked)) {
      if (!["adapters", "task", "keep", "count"].includes(key)) options[names[key] ?? key] = Array.isArray(value) ? value.join(",") : value;
    }
    const words = made.path === "/v1/pictures" ? ["lcm-kit sample"] : [`lcm-kit edit ${asked.task}`];
    for (const key of Object.keys(made.files)) {
      if (key === "picture") words.push(file(key));
      else options[key] = file(key);
    }
    for (const [key, value] of Object.entries(options)) words.push(`--${key}=${quoted(value)}`);
    return [words.join(" \\\n  "), "On the server's machine, or one that has its base and adapter."];
  };

  const curl = (made) => {
    const asked = exact(made), files = Object.keys(made.files), many = asked.task === "interpolate";
    const words = [`curl ${quoted(location.origin + made.path)}`, "-H 'Content-Type: application/json'"];
    words.push(`-H 'Accept: ${many ? "application/json" : "image/png"}'`);
    if (Server.hasToken()) words.push(`-H "Authorization: Bearer $${TOKEN}"`);
    const said = JSON.stringify(asked), out = `-o ${many ? "frames.json" : fileName(made.settings)}`;
    if (!files.length) return [[...words, `-d ${quoted(said)}`, out].join(" \\\n  "), tokenNote()];
    const pieces = [`printf '%s' ${quoted(said.slice(0, -1))}`];
    for (const key of files) pieces.push(`printf '%s' ',"${key}":"'; base64 < ${file(key)} | tr -d '\\n'; printf '\"'`);
    pieces.push("printf '}'");
    return [`{ ${pieces.join("; ")}; } | \\\n${[...words, "--data-binary @-", out].join(" \\\n  ")}`, tokenNote()];
  };

  const inPython = (made) => {
    const { prompt, task, ...rest } = exact(made), files = Object.keys(made.files);
    const token = Server.hasToken() ? `, token=os.environ["${TOKEN}"]` : "";
    const given = made.path === "/v1/pictures" ? [prompt] : [task, files.includes("picture") ? file("picture") : null, prompt];
    const options = Object.entries(rest).map(([key, value]) => `${key}=${python(value)}`);
    for (const key of files) if (key !== "picture") options.push(`${key}=${python(file(key))}`);
    const lines = [
      ...(token ? ["import os", ""] : []), "import lcm_kit", "", `client = lcm_kit.Client(${python(location.origin)}${token})`,
      `pictures = client.${made.path === "/v1/pictures" ? "draw" : "edit"}(`,
      ...[...given.map(python), ...options].map((each) => `    ${each},`), ")",
      ...(task === "interpolate"
        ? ["for number, picture in enumerate(pictures, 1):", '    picture.save(f"frame-{number:03}.png")']
        : [`pictures[0].save(${python(fileName(made.settings))})`]), "",
    ];
    return [lines.join("\n"), tokenNote()];
  };

  const tokenNote = () => (Server.hasToken() ? `The token is read from the variable ${TOKEN}.` : "");
  const KINDS = { command, curl, python: inPython };

  let made = null;
  const radios = () => [...document.getElementsByName("as")];

  const refresh = () => {
    const kind = radios().find((each) => each.checked).value;
    Kept.set({ as: kind });
    const [text, note] = KINDS[kind](made);
    $("copy-text").value = text ?? "";
    $("copy-go").disabled = text === null;
    const files = Object.entries(made.files);
    const lacking = files.filter(([, blob]) => !(blob instanceof Blob));
    const names = files.map(([key]) => file(key)).join(" and ");
    const where = !files.length ? "" : lacking.length
      ? `It was made from ${names}, which the server did not keep: sha256 ${lacking.map(([, each]) => each).join(", ")}.`
      : `It reads ${names} in the folder where it is run.`;
    say($("copy-note"), [where, note].filter(Boolean).join(" "));
    $("copy-files").hidden = !files.length || lacking.length > 0;
    say($("copy-said"), "");
  };

  const copy = async () => {
    try {
      await navigator.clipboard.writeText($("copy-text").value);
      say($("copy-said"), "Copied.");
    } catch { // browsers forbid it where the address is no https
      $("copy-text").focus();
      $("copy-text").select();
      say($("copy-said"), "It is marked: copy it with Ctrl+C.");
    }
  };

  for (const radio of radios()) radio.addEventListener("change", refresh);
  $("copy-go").addEventListener("click", copy);
  $("copy-files").addEventListener("click", () => {
    for (const [key, blob] of Object.entries(made.files)) save(blob, file(key));
  });

  return {
    open(what) {
      made = what;
      const kind = Kept.get("as", "command");
      for (const radio of radios()) radio.checked = radio.value === kind;
      refresh();
      $("copy").showModal();
    },
  };
})();
