// The one door to the server: the token, its sentences, waiting where it says so, and streams of events.

const Server = (() => {
  const KEY = "lcm-kit token";
  const LONGEST = 15; // seconds between two tries to reach it

  /** An answer that is an error, in the server's own sentence. */
  class Problem extends Error {
    constructor(found, status, wait = null) {
      super([found.detail ?? `the server answers ${status}`, ...(found.errors ?? [])].join("\n"));
      this.status = status;
      this.wait = wait;
    }
  }
  class Lost extends Error {}

  const listeners = { lost: () => {}, found: () => {} };
  let asking = null; // the dialog that is open, if one is

  /** The token from whoever sits here; all who wait for one are answered by one dialog. */
  const askToken = (said) => {
    asking ??= new Promise((done) => {
      const dialog = $("token"), field = $("token-field");
      say($("token-said"), said);
      field.value = "";
      dialog.oncancel = (event) => event.preventDefault(); // without one nothing can be done here
      dialog.querySelector("form").onsubmit = (event) => {
        event.preventDefault();
        sessionStorage.setItem(KEY, field.value.trim());
        field.value = "";
        asking = null;
        dialog.close();
        done();
      };
      dialog.showModal();
      field.focus();
    });
    return asking;
  };

  const once = async (path, { method = "GET", body, accept = "application/json", signal } = {}) => {
    const headers = { Accept: accept }, token = sessionStorage.getItem(KEY);
    if (token !== null) headers.Authorization = `Bearer ${token}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, {
        method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store",
        credentials: "omit", redirect: "error",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Lost();
    }
    if (answer.ok) return answer;
    const found = await answer.json().catch(() => ({}));
    const wait = parseFloat(answer.headers.get("Retry-After"));
    throw Object.assign(new Problem(found, answer.status, Number.isFinite(wait) ? wait : null), { token });
  };

  /**
   * `work` with the answer of a request, which is asked again when there is a token, when the server says how
   * long to wait, and when the connection was lost. `waiting(seconds)` is told of a wait, 0 when it is over.
   */
  const call = async (path, options = {}, work = (answer) => answer.json()) => {
    const { signal, waiting = () => {}, again = true } = options;
    for (let lost = 0; ;) {
      try {
        const found = await work(await once(path, options));
        listeners.found();
        return found;
      } catch (error) {
        if (error.name === "AbortError" || signal?.aborted) throw new DOMException("", "AbortError");
        if (!(error instanceof Lost)) listeners.found();
        if (error instanceof Problem && error.status === 401) {
          // another call may have been given a token meanwhile
          if (sessionStorage.getItem(KEY) === error.token) await askToken(error.token === null ? "" : error.message);
        } else if (error instanceof Problem && error.wait !== null && again) {
          waiting(error.wait, error.message);
          try { await pause(Math.max(error.wait, 0.5) * 1000, signal); } finally { waiting(0); }
        } else if (error instanceof Lost) {
          const seconds = Math.min(2 ** lost++, LONGEST);
          listeners.lost(seconds);
          if (!again) throw new Error("the connection to the server was lost; try again");
          await pause(seconds * 1000, signal);
        } else throw error;
      }
    }
  };

  /** The events of a stream, one after another: {event, data}. */
  async function* events(answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "", name = "", data = [];
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Lost();
      });
      if (done) return;
      text += value;
      const lines = text.split(/\r\n|\n|\r(?!$)/);
      text = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield { event: name, data: JSON.parse(data.join("\n")) };
          name = "";
          data = [];
        } else if (line.startsWith("event:")) name = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
    }
  }

  /** Ask for pictures; `step(k, n)` is told of steps. What `done` says, with all `pictures`. */
  const draw = (path, body, { step, ...options }) =>
    call(path, { ...options, method: "POST", body, accept: "text/event-stream" }, async (answer) => {
      const pictures = [];
      let last = null; // the stream is read to its end, or the server would take it that nobody waited for it
      for await (const { event, data } of events(answer)) {
        if (event === "step") step(data.step, data.steps);
        else if (event === "picture") pictures.push(data);
        else if (event === "problem") throw new Problem(data, data.status);
        else if (event === "done") last = data;
      }
      if (last === null) throw new Lost(); // it ended before it was done
      return { ...last, pictures };
    });

  const blob = (path) => call(path, { accept: "image/png, text/csv, */*" }, (answer) => answer.blob());

  return {
    call, draw, blob, listeners,
    hasToken: () => sessionStorage.getItem(KEY) !== null,
    forget: () => sessionStorage.removeItem(KEY),
  };
})();
