// Pictures that the server keeps, each with its exact settings.

const History = (() => {
  const PAGE = 12;
  let entries = []; // newest first
  const blobs = new Map(); // of pictures by id
  let current = null;

  const blob = async (id) => {
    if (!blobs.has(id)) blobs.set(id, await Server.blob(`/v1/history/${encodeURIComponent(id)}`));
    return blobs.get(id);
  };

  /** As a picture that was just drawn: what it was made from is known by its hash alone. */
  const made = async (entry) => {
    const edit = entry.kind === "edit", files = {};
    const body = { ...entry.settings };
    if (edit) {
      for (const key of ["picture", "mask", "to"]) {
        if (body[key]) files[key] = body[key].sha256 ?? String(body[key]);
        delete body[key];
      }
      for (const key of Object.keys(body)) if (body[key] === null) delete body[key];
    }
    return { path: edit ? "/v1/edits" : "/v1/pictures", body, files, settings: entry.settings, blob: await blob(entry.id) };
  };

  /** The newest ones; below `newer`, those that come after them. */
  const load = async (newer = []) => {
    const before = newer.length ? `&before=${encodeURIComponent(newer.at(-1).id)}` : "";
    const found = await Server.call(`/v1/history?limit=${PAGE}${before}`);
    entries = [...newer, ...found.pictures];
    list();
    $("history-more").hidden = !found.more;
  };

  const list = () => {
    $("history").replaceChildren(...entries.map((entry) => {
      const image = make("img", { alt: "", loading: "lazy" });
      const words = `${entry.settings.prompt || "no prompt"}, seed ${entry.settings.seed}`;
      const button = make("button", { type: "button", label: words, title: words, data: { id: entry.id } }, image);
      button.addEventListener("click", guarded(() => open(entry)));
      blob(entry.id).then((found) => show(image, found, "")).catch((error) => Live.alert(error));
      return make("li", {}, button);
    }));
    for (const id of blobs.keys()) if (!entries.some((entry) => entry.id === id)) blobs.delete(id);
    $("history-empty").hidden = entries.length > 0;
    $("history-clear").hidden = !entries.length;
  };

  const words = (value) => {
    if (value === null || value === undefined) return null;
    if (typeof value !== "object") return String(value);
    return Object.entries(value).map(([key, each]) => `${key} ${each}`).join(", ") || "none";
  };

  const open = async (entry) => {
    current = entry;
    show($("kept-picture"), await blob(entry.id), `Picture of: ${entry.settings.prompt}`);
    const rows = Object.entries({ ...entry.settings, drawn: new Date(entry.created).toLocaleString() })
      .map(([key, value]) => [key.replaceAll("_", " "), words(value)]).filter(([, value]) => value !== null);
    $("kept-settings").replaceChildren(...rows.flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, value)]));
    $("kept").showModal();
  };

  const guarded = (work) => async () => {
    try {
      await work();
    } catch (error) {
      $("kept").close();
      Live.alert(error);
    }
  };

  const remove = async () => {
    const k = entries.indexOf(current);
    await Server.call(`/v1/history/${encodeURIComponent(current.id)}`, { method: "DELETE" }, () => null);
    $("kept").close();
    await load();
    ($("history").querySelectorAll("button")[Math.min(k, entries.length - 1)] ?? $("stage")).focus();
  };
  const clear = async () => {
    if (!await sure("Delete all kept pictures for good?", "Delete")) return;
    await Server.call("/v1/history", { method: "DELETE" }, () => null);
    await load();
  };

  return {
    refresh: () => load(),
    open(info) {
      if (!info.history) return Live.missing("history", "Pictures are not kept here: the server keeps them with lcm-kit serve --data FOLDER.");
      const act = (id, work) => $(id).addEventListener("click", guarded(work));
      act("kept-restore", () => { $("kept").close(); Live.mode("draw"); Settings.restore(current.settings); });
      act("kept-edit", async () => { const found = await blob(current.id); $("kept").close(); Live.edit(found); });
      act("kept-sketch", async () => { const found = await blob(current.id); $("kept").close(); Live.sketch(found); });
      act("kept-save", async () => save(await blob(current.id), fileName(current.settings)));
      act("kept-copy", async () => Copies.open(await made(current)));
      act("kept-delete", remove);
      act("history-more", () => load(entries));
      act("history-clear", clear);
      load().catch((error) => Live.alert(error));
    },
  };
})();
