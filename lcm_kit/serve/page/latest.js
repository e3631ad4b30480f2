// The latest wins: what is asked takes the place of what was asked before, which the server is told to leave.

class Latest {
  /** `during(busy)` is told when work begins and ends. What went wrong is said. */
  constructor(during) {
    Object.assign(this, { during, seconds: 0.3, controller: null, timer: 0, since: 0 });
  }

  /**
   * Do `work(signal)` soon: when nothing newer is asked for `calm` milliseconds. Who moves on and on sees
   * pictures too, as often as they can be drawn.
   */
  soon(work, calm = 120) {
    const now = performance.now();
    if (!this.timer) this.since = now;
    clearTimeout(this.timer);
    const longest = this.since + clamp(this.seconds * 1500, 250, 2000);
    this.timer = setTimeout(() => this.now(work), clamp(longest - now, 0, calm));
  }

  /** Do it at once; what is being done is given up. */
  async now(work) {
    this.stop();
    const mine = this.controller = new AbortController(), began = performance.now();
    this.during(true);
    try {
      await work(mine.signal);
      this.seconds = (performance.now() - began) / 1000;
    } catch (error) {
      if (!mine.signal.aborted) Live.alert(error);
    } finally {
      if (this.controller === mine) {
        this.controller = null;
        this.during(false);
      }
    }
  }

  stop() {
    clearTimeout(this.timer);
    this.timer = 0;
    this.controller?.abort();
    this.controller = null;
    this.during(false);
  }
}
