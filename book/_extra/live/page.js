/* A live panel in every element of class `live-here`: one ring, read by a model that sleeps one pass and by one that
   sleeps N.

   In the figure of the first page it takes the place of the still picture; in a chapter the element is empty, and may
   say where to begin: `data-hops`, `data-shown` (passes), and `data-say`, a sentence to stand above the panel. Where
   scripts do not run, all is as it was. What the models do comes from `sleepeduLive` in model.js, what was measured
   beforehand from weights.js. */
document.querySelectorAll(".live-here").forEach((here, number) => {
  "use strict";
  if (!globalThis.sleepeduLive) return;
  const stored = globalThis.sleepeduLiveWeights;
  const { words, nodes, reach } = stored;
  const passes = Object.keys(stored.models).map(Number);
  const most = passes.at(-1);
  const hops = Array.from({ length: stored.hops }, (_, i) => i + 1);

  // ring: the nodes in the order of the arrows. told: the nodes in the order in which their arrows are told.
  // shown: the passes that are on show, in both lanes; all of them unless a sleep is being played or `data-shown` says fewer.
  const { ring, told, start, hops: asked, passes: N } = stored.example;
  const { hops: k = asked, shown = most } = here.dataset;
  const state = { N, hops: Number(k), start, ring: [...ring], told: [...told], picked: null, shown: Number(shown) };

  const after = (node, steps = 1) => state.ring[(state.ring.indexOf(node) + steps) % nodes];
  const edges = () => state.told.map((node) => [node, after(node)]);
  const walk = () => Array.from({ length: state.hops + 1 }, (_, step) => after(state.start, step));
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

  function percent(share) {
    if (share === 1) return "100%";
    if (share > 0.9995) return ">\u00a099.9%"; // no break after the sign
    if (share > 0 && share < 0.005) return "<\u00a01%";
    return share > 0.95 ? `${(100 * share).toFixed(1)}%` : `${Math.round(100 * share)}%`;
  }

  const { shading } = sleepeduLive; // in the map and under the fast weights

  // ---- The elements, once.

  const id = (name) => `live-${name}${number ? `-${number + 1}` : ""}`; // no id stands twice in a page
  const heading = here.closest("section section") ? "h3" : "h2";
  const slider = (name, label, values, value) => `
    <div class="live-control">
      <label for="${id(name)}">${label}: <output for="${id(name)}">${value}</output></label>
      <input type="range" id="${id(name)}" min="${values[0]}" max="${values.at(-1)}" step="1" value="${value}">
      <div class="live-ticks" aria-hidden="true">${values.map((tick) => `<span>${tick}</span>`).join("")}</div>
    </div>`;
  const lane = () => `
    <section class="live-lane">
      <${heading}><span class="live-name"></span> <small></small></${heading}>
      <div class="live-passes">${passes.map((pass) => `<div class="live-pass" role="img">
        <span class="live-pass-name">pass ${pass}</span><canvas></canvas>
        <span class="live-read-out">${hops.map((k) => `<i>${k}</i>`).join("")}</span></div>`).join("")}</div>
      <ol class="live-answers" aria-label="Answers"></ol>
    </section>`;
  const live = document.createElement("div");
  live.className = "live";
  live.setAttribute("role", "group");
  live.setAttribute("aria-label", "Two models that sleep, running in this page");
  live.innerHTML = `
    <div class="live-controls">
      ${slider("hops", "Hops k", hops, state.hops)}
      ${slider("passes", "Passes N", passes.slice(1), state.N)}
      <div class="live-control live-choice"><label for="${id("start")}">Start at</label>
        <select id="${id("start")}">${words.slice(0, nodes).map((word, node) => `<option value="${node}">${word}</option>`).join("")}</select></div>
      <button type="button" class="live-sleep" id="${id("sleep")}">Sleep</button>
    </div>
    <p class="live-verdict" role="status"></p>
    <div class="live-body">
      <div class="live-lanes">${lane()}${lane()}
        <p class="live-key">Squares: the fast weights S after each pass, ${stored.config.heads} heads, from
          <span class="live-bar" role="img" aria-label="blue to red"></span> −${reach.toFixed(0)} to ${reach.toFixed(0)}.
          Below, by hops, what a linear probe reads from S:
          <i class="most">k</i> right in over 90% of cases, <i class="half">k</i> in over half, <i class="few">k</i> in fewer.</p>
      </div>
      <div class="live-window">
        <div class="live-ring">
          <svg viewBox="0 0 320 320" aria-hidden="true"></svg>
          ${state.ring.map((_, place) => `<button type="button" class="live-node" data-place="${place}"></button>`).join("")}
        </div>
        <p class="live-ends" aria-hidden="true"><span class="start">start</span><span class="true">true end</span><span class="wrong">wrong answer</span></p>
        <p class="live-hint" role="status"></p>
        <p class="live-buttons"><button type="button" id="${id("shuffle")}">New ring</button>
          <button type="button" id="${id("retell")}">Same ring, retold</button></p>
        <p class="live-small">The window, as both models read it:</p>
        <p class="live-tokens"></p>
      </div>
      <table class="live-map"><caption>Right answers over ${stored.models[1].examples.toLocaleString("en")} fresh rings: choose a cell</caption>
        <thead><tr><th scope="col">hops k</th>${hops.map((k) => `<th scope="col">${k}</th>`).join("")}</tr></thead>
        <tbody>${passes.map((n) => `<tr><th scope="row">N = ${n}</th>${hops.map((k) => {
          const share = stored.models[n].accuracy[k];
          return `<td><button type="button" class="${shading(share)}" data-passes="${n}" data-hops="${k}"
            aria-label="N = ${n}, ${plural(k, "hop")}: ${percent(share)}">${percent(share)}</button></td>`;
        }).join("")}</tr>`).join("")}</tbody></table>
      <p class="live-small live-run"></p>
    </div>`;
  const find = (selector) => live.querySelector(selector);
  const findAll = (selector) => [...live.querySelectorAll(selector)];
  const say = (selector, text) => find(selector).textContent !== text && (find(selector).textContent = text); // each change is read aloud

  // ---- The ring, and the window that tells it.

  function drawRing(answers) {
    const steps = walk();
    const turn = 360 / nodes;
    const place = (node, radius) => {
      const angle = (2 * Math.PI * state.ring.indexOf(node)) / nodes;
      return [160 + radius * Math.sin(angle), 160 - radius * Math.cos(angle)];
    };
    // Every arrow is the one from the top node to the next, turned about the centre.
    const middle = 160 - 116 * Math.cos(Math.PI / nodes);
    const arrows = state.ring.map((node, i) => {
      const walked = steps.slice(0, -1).includes(node) ? " class='walked'" : "";
      return `<g${walked} transform="rotate(${turn * (i + 0.5)} 160 160)">
        <path class="line" d="M142 ${middle}H168"/><path class="head" d="M179 ${middle}l-13 -7v14z"/></g>`;
    });
    const numbers = steps.slice(1).map((node, i) => {
      const [x, y] = place(node, 82);
      return `<text x="${x}" y="${y}">${i + 1}</text>`;
    });
    const wrong = new Set(answers.filter((node) => node < nodes && node !== steps.at(-1)));
    const lost = [...wrong].filter((node) => node !== state.start).map((node) => {
      const [[x1, y1], [x2, y2]] = [place(state.start, 92), place(node, 92)];
      return `<path class="lost" d="M${x1} ${y1}L${x2} ${y2}"/>`;
    });
    find(".live-ring svg").innerHTML = [...lost, ...arrows, ...numbers].join("");
    findAll(".live-node").forEach((button, i) => {
      const node = state.ring[i];
      button.textContent = words[node];
      button.style.left = `${place(node, 116)[0] / 3.2}%`;
      button.style.top = `${place(node, 116)[1] / 3.2}%`;
      button.setAttribute("aria-pressed", state.picked === i);
      button.setAttribute("aria-label", `${words[node]}, with an arrow to ${words[after(node)]}`);
      button.classList.toggle("start", node === state.start);
      button.classList.toggle("true", node === steps.at(-1));
      button.classList.toggle("wrong", wrong.has(node));
    });
    find(".live-tokens").innerHTML = edges()
      .map(([from, to]) => `<span>${words[from]} ${words[to]}</span>`)
      .join(" ");
  }

  function hint(done = "") {
    const picked = state.picked === null ? null : words[state.ring[state.picked]];
    say(
      ".live-hint",
      picked
        ? `${picked} is picked. Select the node it should change places with, or ${picked} again to let go.`
        : `${done || "Redraw the arrows."} Select two nodes to swap them.`,
    );
  }

  // ---- The fast weights after every pass, on one diverging scale for all models, and what can be read from them.

  const colour = (name) => {
    const hex = getComputedStyle(live).getPropertyValue(name).trim();
    return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };

  /** The colour of a number from -1 to 1, mixed from the theme's colours for -1, 0 and 1. */
  function diverging() {
    const [minus, zero, plus] = ["--live-minus", "--live-zero", "--live-plus"].map(colour);
    return (value) => {
      const end = value < 0 ? minus : plus;
      const share = Math.min(1, Math.abs(value));
      return zero.map((channel, i) => Math.round(channel + share * (end[i] - channel)));
    };
  }

  /** The heads of one S, two by two. */
  function drawHeads(canvas, matrices, shade) {
    const size = matrices[0].length;
    canvas.width = canvas.height = 2 * size + 1;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height); // transparent, and so is the gap
    matrices.forEach((matrix, head) => {
      const [top, left] = [Math.floor(head / 2) * (size + 1), (head % 2) * (size + 1)];
      matrix.forEach((row, y) =>
        row.forEach((value, x) => image.data.set([...shade(value / reach), 255], 4 * ((top + y) * canvas.width + left + x))),
      );
    });
    context.putImageData(image, 0, 0);
  }

  const readOut = (n, pass) => hops.map((k) => `${plural(k, "hop")} ${percent(stored.models[n].probes[pass - 1][k - 1])}`).join(", ");

  function drawPasses() {
    const shade = diverging();
    lanes.forEach(({ element, n, trace }) => {
      element.querySelectorAll(".live-pass").forEach((item, i) => {
        const isDrawn = i < Math.min(n, state.shown);
        item.classList.toggle("unused", i >= n);
        item.classList.toggle("waiting", i < n && !isDrawn);
        if (isDrawn) drawHeads(item.querySelector("canvas"), trace[i][0], shade);
        item.querySelectorAll("i").forEach((cell, k) => (cell.className = isDrawn ? shading(stored.models[n].probes[i][k]) : ""));
        const words = isDrawn ? `The fast weights S after pass ${i + 1}. A linear probe reads from them: ${readOut(n, i + 1)}` : i < n ? `Pass ${i + 1} is still to come` : `No pass ${i + 1}`;
        item.setAttribute("aria-label", words);
        item.title = isDrawn ? `Read from S after pass ${i + 1}: ${readOut(n, i + 1)}` : "";
      });
    });
  }

  // ---- The answers.

  function drawAnswers({ element, n, probabilities, ranked }) {
    const last = walk().at(-1);
    const shown = ranked.filter((word) => word < nodes || word === ranked[0]).slice(0, 3);
    if (!shown.includes(last)) shown[2] = last;
    const awake = state.shown >= n;
    element.querySelector(".live-answers").innerHTML = shown
      .map((word) => {
        const [kind, mark] = word === last ? ["true", "✓"] : word === ranked[0] ? ["wrong", "✗"] : ["", ""];
        return awake
          ? `<li class="${kind}" style="--share: ${100 * probabilities[word]}%"><b>${words[word]}</b> ${percent(probabilities[word])} <span aria-hidden="true">${mark}</span></li>`
          : "<li>asleep</li>";
      })
      .slice(0, awake ? 3 : 1)
      .join("");
  }

  function tell() {
    const path = walk().map((node) => words[node]);
    const said = lanes.map(({ n, ranked }) => {
      const right = words[ranked[0]] === path.at(-1);
      return `N = ${n} says ${words[ranked[0]]}: ${right ? "right" : "wrong"}.`;
    });
    const question = `${plural(state.hops, "hop")} after ${path[0]}: the arrows go ${path.join(" → ")}.`;
    say(
      ".live-verdict",
      state.shown >= state.N
        ? `${question} ${said.join(" ")}`
        : state.shown === 0
          ? "Read once, and gone to sleep."
          : `Pass ${state.shown} of ${state.N}. What can be read from S of N = ${state.N} by now: ${readOut(state.N, state.shown)}.`,
    );
  }

  // ---- A change anywhere: sleep if the window or N is another, then wake and draw.

  const lanes = [{ n: 1 }, { n: state.N }];

  function update() {
    lanes[1].n = state.N;
    for (const lane of lanes) {
      const key = JSON.stringify([lane.n, edges()]);
      if (key !== lane.key) { // a question does not wake it up: S is there before it is asked
        sleepeduLive.load(lane.n);
        const began = performance.now();
        Object.assign(lane, { key, trace: sleepeduLive.sleep(lane.n, edges()) });
        lane.asleep = performance.now() - began;
      }
      lane.awake = Infinity;
      for (let times = 0; times < 5; times++) { // the shortest of five: the first is compiled on the way
        const began = performance.now();
        lane.probabilities = sleepeduLive.softmax(sleepeduLive.wake(lane.n, lane.trace.at(-1), state.hops, state.start));
        lane.awake = Math.min(lane.awake, performance.now() - began);
      }
      lane.ranked = lane.probabilities.map((_, word) => word).sort((a, b) => lane.probabilities[b] - lane.probabilities[a]);
      const share = stored.models[lane.n].accuracy[state.hops];
      lane.element.querySelector(".live-name").textContent = `N = ${lane.n}`;
      lane.element.querySelector("small").textContent =
        `${plural(state.hops, "hop")}: ${percent(share)} right over ${stored.models[lane.n].examples.toLocaleString("en")} rings`;
    }
    for (const [name, value] of [["passes", state.N], ["hops", state.hops]]) {
      find(`output[for=${id(name)}]`).textContent = find(`#${id(name)}`).value = value;
    }
    find(`#${id("start")}`).value = state.start;
    findAll(".live-map button").forEach((cell) => {
      const { passes: n, hops: k } = cell.dataset;
      const isOnShow = lanes.some((lane) => lane.n === Number(n)) && Number(k) === state.hops;
      cell.setAttribute("aria-pressed", isOnShow);
    });
    find(".live-run").textContent =
      `Runs ${lanes.map(({ n }) => stored.models[n].run).join(" and ")}, weights rounded. In this browser N = ${state.N} slept ` +
      `${lanes[1].asleep.toFixed(0)} ms and answered in ${lanes[1].awake.toFixed(1)} ms, N = 1 in ${lanes[0].awake.toFixed(1)} ms.`;
    draw();
  }

  function draw() {
    drawPasses();
    lanes.forEach(drawAnswers);
    drawRing(lanes.filter(({ n }) => state.shown >= n).map(({ ranked }) => ranked[0]));
    tell();
  }

  // ---- The sleep as it goes: a pass at a time, or a press at a time for those who want no motion.

  let timer = 0;

  function show(count) {
    clearTimeout(timer);
    state.shown = count;
    draw();
  }

  function play() {
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
      show(state.shown >= state.N ? 1 : state.shown + 1);
      return;
    }
    show(0);
    const next = () => {
      show(state.shown + 1);
      if (state.shown < state.N) timer = setTimeout(next, 1600);
    };
    timer = setTimeout(next, 600);
  }

  function change(changed) {
    clearTimeout(timer);
    Object.assign(state, { shown: most }, changed);
    update();
  }

  function select(place) {
    const other = state.picked;
    state.picked = other === null ? place : null;
    if (other === null || other === place) {
      findAll(".live-node").forEach((button, i) => button.setAttribute("aria-pressed", state.picked === i));
      hint();
      return;
    }
    [state.ring[place], state.ring[other]] = [state.ring[other], state.ring[place]];
    change({});
    hint(`${words[state.ring[place]]} and ${words[state.ring[other]]} have changed places.`);
  }

  function shuffle(list) {
    sleepeduLive.shuffle(list);
    change({ picked: null });
    hint();
  }

  here.prepend(live);
  if (here.dataset.say) live.insertAdjacentHTML("beforebegin", `<p>${here.dataset.say}</p>`);
  findAll(".live-lane").forEach((element, i) => (lanes[i].element = element));
  for (const [name, what, event] of [["passes", "N", "input"], ["hops", "hops", "input"], ["start", "start", "change"]]) {
    find(`#${id(name)}`).addEventListener(event, ({ target }) => change({ [what]: Number(target.value) }));
  }
  findAll(".live-map button").forEach((cell) => {
    const { passes: n, hops: k } = cell.dataset;
    // N = 1 has a lane of its own: its cells change the question alone.
    cell.addEventListener("click", () => change({ hops: Number(k), N: Number(n) === 1 ? state.N : Number(n) }));
  });
  findAll(".live-node").forEach((button, place) => button.addEventListener("click", () => select(place)));
  find(`#${id("sleep")}`).addEventListener("click", play);
  find(`#${id("shuffle")}`).addEventListener("click", () => shuffle(state.ring));
  find(`#${id("retell")}`).addEventListener("click", () => shuffle(state.told));
  new MutationObserver(drawPasses).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  update();
  hint();
});
