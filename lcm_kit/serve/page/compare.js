// What is set, beside the base alone at 50 steps, from the same noise; and votes for one of them.

const Compare = (() => {
  const TITLES = { left: "Left", right: "Right" };
  const WHO = { asked: "your settings", against: "the base alone at 50 steps" };
  let current = null; // what the server calls the two that are shown
  const bar = $("compare-bar");
  const latest = new Latest((on) => {
    busy(bar, on);
    $("compare").disabled = on;
  });

  const name = (side, leftIs) => WHO[(side === "left") === (leftIs === "asked") ? "asked" : "against"];
  const reveal = (leftIs) => {
    for (const [side, title] of Object.entries(TITLES)) {
      say($(`${side}-said`), leftIs ? `${title}: ${name(side, leftIs)}` : title);
    }
  };

  const votable = (on) => { for (const button of $("vote").querySelectorAll("button")) button.disabled = !on; };

  const draw = async (signal) => {
    const body = { ...Settings.body(), blind: $("blind").checked };
    const answer = await answerOf("/v1/comparisons", body, bar, signal);
    Live.alert(null);
    for (const each of answer.pictures) show($(each.side), pictureOf(each), `${TITLES[each.side]}: ${body.prompt}`);
    current = answer.id;
    reveal(answer.left_is);
    say($("verdict"), "");
    $("vote").hidden = !answer.id;
    votable(true);
    Live.told("Both pictures are drawn");
  };

  const vote = async (choice) => {
    votable(false);
    try {
      const said = await Server.call("/v1/votes", { method: "POST", body: { comparison: current, choice }, again: false });
      Live.alert(null);
      reveal(said.left_is);
      const words = { tie: "both alike", neither: "neither" };
      say($("verdict"), `Your vote: ${words[choice] ?? `${choice} (${name(choice, said.left_is)})`}.`);
      await tally();
    } catch (error) {
      votable(error.status !== 409);
      Live.alert(error);
    }
  };

  const tally = async () => {
    const found = await Server.call("/v1/votes");
    const rows = [["votes", found.votes], ["for your settings", found.asked], ["for the base", found.against],
      ["both alike", found.tie], ["neither", found.neither]];
    $("tally-list").replaceChildren(...rows.flatMap(([word, number]) => [make("dt", {}, word), make("dd", {}, String(number))]));
    $("tally").hidden = !found.votes;
    const by = found.by_adapter, heads = ["with", "votes", "for it", "for the base", "alike", "neither"];
    const cell = (name, value) => make(name, {}, String(value));
    $("tally-table").hidden = by.length < 2;
    $("tally-table").replaceChildren(
      make("thead", {}, make("tr", {}, ...heads.map((each) => Object.assign(cell("th", each), { scope: "col" })))),
      make("tbody", {}, ...by.map((row) => make("tr", {},
        cell("td", [row.base, ...Object.keys(row.adapters)].join(" + ")),
        ...["votes", "asked", "against", "tie", "neither"].map((key) => cell("td", row[key]))))),
    );
  };

  return {
    open(info) {
      $("blind").checked = Kept.get("blind", false);
      $("blind").addEventListener("change", () => Kept.set({ blind: $("blind").checked }));
      $("compare").addEventListener("click", () => latest.now(draw));
      $("vote").addEventListener("click", (event) => { if (event.target.dataset.choice) vote(event.target.dataset.choice); });
      $("csv").addEventListener("click", async () => {
        try {
          save(await Server.blob("/v1/votes.csv"), "votes.csv");
        } catch (error) {
          Live.alert(error);
        }
      });
      if (info.history) tally().catch((error) => Live.alert(error));
      else Live.missing("vote", "Votes are not kept here: the server keeps them with lcm-kit serve --data FOLDER.");
    },
    press: () => latest.now(draw),
    changed() {},
  };
})();
