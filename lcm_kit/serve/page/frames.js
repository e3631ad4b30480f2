// From one prompt to another, as frames to play.

const Frames = (() => {
  let frames = [], request = null, timer = 0, at = 0, way = 1;
  const bar = document.querySelector("#panel-frames .bar");
  const latest = new Latest((on) => {
    busy(bar, on);
    $("frames-draw").disabled = on;
  });

  const showFrame = (k) => {
    at = clamp(k, 0, frames.length - 1);
    $("frame").src = frames[at].url;
    $("frame-number").value = at + 1;
    say($("frame-said"), `${at + 1} of ${frames.length}`);
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    say($("play"), "Play");
  };
  const play = () => {
    clearInterval(timer);
    timer = setInterval(() => { // there and back again
      if (at + way < 0 || at + way >= frames.length) way = -way;
      showFrame(at + way);
    }, 1000 / clamp(Number($("rate").value) || 6, 1, 30));
    say($("play"), "Pause");
  };

  const draw = async (signal) => {
    const body = {
      task: "interpolate", ...Settings.body({ sized: false }), prompt_to: $("prompt-to").value, frames: Number($("frames-count").value),
    };
    const answer = await answerOf("/v1/edits", body, bar, signal);
    Live.alert(null);
    for (const each of frames) URL.revokeObjectURL(each.url);
    frames = answer.pictures.map(pictureOf).map((blob) => ({ blob, url: URL.createObjectURL(blob) }));
    request = { path: "/v1/edits", body, files: {}, settings: answer.settings };
    $("frame").alt = `Frames from "${body.prompt}" to "${body.prompt_to}"`;
    $("frame").hidden = $("player").hidden = false;
    $("frame-number").max = frames.length;
    way = 1;
    showFrame(0);
    Live.told(`${frames.length} frames drawn`);
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
  };
  const ask = () => { stop(); latest.now(draw); };

  return {
    open(info) {
      $("frames-count").max = info.limits.frames;
      $("prompt-to").value = Kept.get("promptTo", "");
      $("frames-count").value = Kept.get("frames", 8);
      $("rate").value = Kept.get("rate", 6);
      $("prompt-to").addEventListener("input", () => Kept.set({ promptTo: $("prompt-to").value }));
      $("frames-count").addEventListener("input", () => Kept.set({ frames: Number($("frames-count").value) || 8 }));
      $("rate").addEventListener("input", () => {
        Kept.set({ rate: Number($("rate").value) || 6 });
        if (timer) play();
      });
      $("frames-draw").addEventListener("click", ask);
      $("play").addEventListener("click", () => (timer ? stop() : play()));
      $("frame-number").addEventListener("input", () => { stop(); showFrame(Number($("frame-number").value) - 1); });
      $("frames-save").addEventListener("click", () => {
        save(frames[at].blob, fileName(request.settings).replace(/\.png$/, `-${at + 1}.png`));
      });
      $("frames-copy").addEventListener("click", () => Copies.open(request));
    },
    press: ask,
    changed() {},
    leave: stop,
  };
})();
