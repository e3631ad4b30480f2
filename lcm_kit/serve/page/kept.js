// What survives a reload: settings, the mode, the sketch. In this browser alone, and never the token.

const Kept = (() => {
  const KEY = "lcm-kit live";
  let known = {};
  try {
    const found = JSON.parse(localStorage.getItem(KEY));
    if (found && typeof found === "object" && !Array.isArray(found)) known = found;
  } catch { /* nothing usable is kept: begin anew */ }
  return {
    get: (name, otherwise) => (typeof known[name] === typeof otherwise ? known[name] ?? otherwise : otherwise),
    set: (changes) => {
      Object.assign(known, changes);
      try {
        localStorage.setItem(KEY, JSON.stringify(known));
      } catch { /* full or forbidden: the page works without it */ }
    },
  };
})();
