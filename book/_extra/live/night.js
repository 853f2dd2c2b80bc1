/* A long night in every element of class `live-night`: two models asleep on one ring, one that always had N passes in
   training and one that had one to eight, and what each answers if it is woken after any of sixteen.

   `data-say` is a sentence to stand above the panel. What is drawn here comes from `sleepeduLive` in model.js. */
document.querySelectorAll(".live-night").forEach((here) => {
  "use strict";
  if (!globalThis.sleepeduLive) return;
  const stored = globalThis.sleepeduLiveWeights;
  const { words, nodes } = stored;
  const hops = Array.from({ length: stored.hops }, (_, i) => i + 1);
  const passes = Array.from({ length: 16 }, (_, i) => i + 1);
  const walks = nodes * hops.length;
  const trained = Object.keys(stored.models).map(Number).filter(Boolean);
  const state = { ring: [...stored.example.ring], told: [...stored.example.told], shown: 8, N: 2 };
  const sleepers = [{ name: state.N }, { name: "1 to 8" }];

  const slider = (name, label, values) => `
    <div class="live-control">
      <label for="night-${name}">${label}: <output for="night-${name}"></output></label>
      <input type="range" id="night-${name}" min="${values[0]}" max="${values.at(-1)}" step="1">
      <div class="live-ticks" aria-hidden="true">${values.map((value) => `<span>${values.length < 5 || value === 1 || value % 4 === 0 ? value : "·"}</span>`).join("")}</div>
    </div>`;
  const live = document.createElement("div");
  live.className = "live";
  live.setAttribute("role", "group");
  live.setAttribute("aria-label", "Two models left asleep, running in this page");
  live.innerHTML = `
    <div class="live-controls">
      ${slider("trained", "Trained with N", trained)}${slider("passes", "Passes before waking", passes)}
      <button type="button" class="live-sleep" id="night-sleep">Sleep</button>
      <p class="live-buttons"><button type="button" id="night-shuffle">New ring</button></p>
    </div>
    <p class="live-verdict" role="status"></p>
    ${sleepers.map(() => `
      <section class="live-lane live-long">
        <h3></h3>
        <div class="live-map-of-night" role="img">
          ${hops.map((k) => `<b>${k} hop${k > 1 ? "s" : ""}</b>${passes.map((pass) => `<i data-pass="${pass}"></i>`).join("")}`).join("")}
          <b>pass</b>${passes.map((pass) => `<span>${pass}</span>`).join("")}
        </div>
      </section>`).join("")}
    <p class="live-small">A number is how many of the ${nodes} walks of that length, one from every node of this ring, are
      right if the model is woken after that pass. <span class="live-run"></span></p>`;
  const find = (selector) => live.querySelector(selector);

  const after = (node, steps) => state.ring[(state.ring.indexOf(node) + steps) % nodes];
  const total = (counts) => counts.reduce((sum, count) => sum + count, 0);
  const size = (numbers) => Math.hypot(...numbers);
  const numbersOf = (S) => S.flat(2).flatMap((row) => [...row]);

  /** Go to bed with the ring. What is known after a pass is asked when it is first shown. */
  function sleepOn() {
    sleepers[0].name = state.N;
    const edges = state.told.map((node) => [node, after(node, 1)]);
    for (const sleeper of sleepers) {
      sleeper.trace = sleepeduLive.sleep(sleeper.name, edges, passes.at(-1));
      sleeper.right = [];
    }
    find(".live-run").textContent = `Runs ${sleepers.map(({ name }) => stored.models[name].run).join(" and ")}, weights rounded.`;
    draw();
  }

  /** How many walks are right after a pass, for every number of hops. */
  function askAll({ name, trace }, pass) {
    const isRight = (k, start) => {
      const logits = sleepeduLive.wake(name, trace[pass - 1], k, start);
      return logits.indexOf(Math.max(...logits)) === after(start, k);
    };
    return hops.map((k) => state.ring.filter((start) => isRight(k, start)).length);
  }

  /** The change of S in a pass, beside its size, as the chapter has it. */
  function changeOf({ trace }, pass) {
    const now = numbersOf(trace[pass - 1]);
    const before = pass > 1 ? numbersOf(trace[pass - 2]) : now.map(() => 0);
    return size(now.map((value, i) => value - before[i])) / size(now);
  }

  function draw() {
    for (const [name, value] of [["trained", state.N], ["passes", state.shown]]) {
      find(`output[for=night-${name}]`).textContent = find(`#night-${name}`).value = value;
    }
    const said = [...live.querySelectorAll(".live-long")].map((lane, i) => {
      const sleeper = sleepers[i];
      for (let pass = sleeper.right.length + 1; pass <= state.shown; pass++) sleeper.right.push(askAll(sleeper, pass));
      const known = sleeper.right[state.shown - 1];
      const title = typeof sleeper.name === "number" ? `Trained with N = ${sleeper.name}` : `Trained with N = ${sleeper.name}, drawn for every batch`;
      lane.querySelector("h3").textContent = title;
      lane.querySelector("[role=img]").setAttribute(
        "aria-label",
        `${title}, right after pass ${state.shown}: ${hops.map((k) => `${known[k - 1]} of ${nodes} at ${k} hop${k > 1 ? "s" : ""}`).join(", ")}`,
      );
      lane.querySelectorAll("i").forEach((cell, place) => {
        const pass = Number(cell.dataset.pass);
        const count = pass <= state.shown ? sleeper.right[pass - 1][Math.floor(place / passes.length)] : null;
        cell.textContent = count ?? "";
        cell.className = count === null ? "" : sleepeduLive.shading(count / nodes);
        cell.classList.toggle("now", pass === state.shown);
      });
      return `N = ${sleeper.name}: ${total(known)} of ${walks} walks right; the last pass changed S by ${(100 * changeOf(sleeper, state.shown)).toFixed(0)}%.`;
    });
    find(".live-verdict").textContent = `Woken after ${state.shown === 1 ? "one pass" : `${state.shown} passes`}. ${said.join(" ")}`;
  }

  let timer = 0;

  /** A night is read aloud where it ends, not at every pass of it. */
  const speak = (aloud) => find(".live-verdict").setAttribute("aria-live", aloud ? "polite" : "off");

  function show(pass, aloud = true) {
    clearTimeout(timer);
    speak(aloud);
    state.shown = pass;
    draw();
  }

  /** The night as it goes, from its first pass; a pass at a press for those who want no motion. */
  function play() {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    show(still && state.shown < passes.at(-1) ? state.shown + 1 : 1, still);
    const next = () => {
      show(state.shown + 1, state.shown + 1 === passes.at(-1));
      if (state.shown < passes.at(-1)) timer = setTimeout(next, 500);
    };
    if (!still) timer = setTimeout(next, 500);
  }

  here.prepend(live);
  if (here.dataset.say) live.insertAdjacentHTML("beforebegin", `<p>${here.dataset.say}</p>`);
  find("#night-passes").addEventListener("input", ({ target }) => show(Number(target.value)));
  find("#night-trained").addEventListener("input", ({ target }) => {
    clearTimeout(timer);
    speak(true);
    state.N = Number(target.value);
    sleepOn();
  });
  find("#night-sleep").addEventListener("click", play);
  find("#night-shuffle").addEventListener("click", () => {
    clearTimeout(timer);
    speak(true);
    sleepeduLive.shuffle(state.ring);
    sleepeduLive.shuffle(state.told);
    sleepOn();
  });
  live.querySelectorAll("i").forEach((cell) => cell.addEventListener("click", () => show(Number(cell.dataset.pass))));
  sleepOn();
});
