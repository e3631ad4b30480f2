// Pictures of the prompt.

const Draw = (() => {
  const result = new Result($("drawn"), "Write what the picture shows. It is drawn as you type.");
  const draw = (signal) => result.draw({ path: "/v1/pictures", body: Settings.body() }, signal);
  return {
    open() {},
    press() { result.latest.now(draw); },
    /** Coming back to it: settings may have been moved meanwhile. */
    enter() {
      if (Settings.live && JSON.stringify(result.made?.body) !== JSON.stringify(Settings.body())) this.changed();
    },
    changed() {
      if (!Settings.prompt.trim()) return result.latest.stop();
      result.latest.soon(draw);
    },
  };
})();
