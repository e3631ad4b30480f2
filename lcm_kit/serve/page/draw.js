// Pictures of the prompt.

const Draw = (() => {
  const result = new Result($("drawn"), "Write what the picture shows. It is drawn as you type.");
  const request = () => ({ path: "/v1/pictures", body: Settings.body() });
  return {
    result,
    open() {},
    press() { result.latest.now((signal) => result.draw(request(), signal)); },
    /** Coming back to it: settings may have been moved meanwhile. */
    enter() {
      if (Settings.live && JSON.stringify(result.made?.body) !== JSON.stringify(request().body)) this.changed();
    },
    changed() {
      if (!Settings.prompt.trim()) return result.latest.stop();
      result.latest.soon((signal) => result.draw(request(), signal));
    },
  };
})();
