/* The live figure of the first page: controls, the ring, the fast weights after every pass, the answer.

   It takes the place of the still picture in the figure it finds. Where scripts do not run, the picture stays.
   What is drawn here comes from `sleepeduLive` in model.js; this file knows nothing of the model but its nodes. */
(() => {
  "use strict";
  const figure = document.getElementById("fig-live");
  if (!figure || !globalThis.sleepeduLive) return;
  const stored = globalThis.sleepeduLiveWeights;
  const { words, nodes } = stored;
  const passes = Object.keys(stored.models).map(Number);
  const hops = Array.from({ length: stored.hops }, (_, i) => i + 1);

  // ring: the nodes in the order of the arrows. told: the nodes in the order in which their arrows are told.
  const { ring, told, start, hops: asked, passes: N } = stored.example;
  const state = { N, hops: asked, start, ring: [...ring], told: [...told], picked: null };

  const after = (node, steps = 1) => state.ring[(state.ring.indexOf(node) + steps) % nodes];
  const edges = () => state.told.map((node) => [node, after(node)]);
  const walk = () => Array.from({ length: state.hops + 1 }, (_, step) => after(state.start, step));
  const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

  const thousands = (count) => count.toLocaleString("en");

  function percent(share) {
    if (share > 0.9995) return ">\u00a099.9%"; // no break after the sign
    if (share > 0 && share < 0.005) return "<\u00a01%";
    return share > 0.95 ? `${(100 * share).toFixed(1)}%` : `${Math.round(100 * share)}%`;
  }

  // ---- The elements, once.

  const slider = (id, label, values, value) => `
    <div class="live-control">
      <label for="live-${id}">${label}: <output for="live-${id}">${value}</output></label>
      <input type="range" id="live-${id}" min="${values[0]}" max="${values.at(-1)}" step="1" value="${value}">
      <div class="live-ticks" aria-hidden="true">${values.map((tick) => `<span>${tick}</span>`).join("")}</div>
    </div>`;
  const live = document.createElement("div");
  live.className = "live";
  live.setAttribute("role", "group");
  live.setAttribute("aria-label", "A model that sleeps, running in this page");
  live.innerHTML = `
    <div class="live-controls">
      ${slider("passes", "Passes N", passes, state.N)}
      ${slider("hops", "Hops k", hops, state.hops)}
      <div class="live-control live-choice"><label for="live-start">Start at</label>
        <select id="live-start">${words.slice(0, nodes).map((word, node) => `<option value="${node}">${word}</option>`).join("")}</select></div>
    </div>
    <div class="live-stages">
      <section class="live-read">
        <h3>1 · Read</h3>
        <div class="live-ring">
          <svg viewBox="0 0 320 320" aria-hidden="true"></svg>
          ${state.ring.map((_, place) => `<button type="button" class="live-node" data-place="${place}"></button>`).join("")}
        </div>
        <p class="live-key" aria-hidden="true"><span class="start">start</span><span class="true">true end</span><span class="wrong">wrong answer</span></p>
        <p class="live-hint" role="status"></p>
        <p class="live-buttons"><button type="button" id="live-shuffle">New ring</button>
          <button type="button" id="live-retell">Same ring, retold</button></p>
        <p class="live-small">The window, as the model reads it:</p>
        <p class="live-tokens"></p>
      </section>
      <section class="live-sleep">
        <h3>2 · Sleep</h3>
        <p class="live-small live-slept"></p>
        <div class="live-passes">
          <div class="live-pass live-heads" aria-hidden="true">${Array.from({ length: stored.config.heads }, (_, head) => `<span>head ${head + 1}</span>`).join("")}</div>
          ${passes.map(() => `<div class="live-pass"><span class="live-pass-name"></span><canvas role="img"></canvas></div>`).join("")}
        </div>
        <p class="live-scale"><span class="low"></span><span class="live-bar" aria-hidden="true"></span><span class="high"></span></p>
      </section>
      <section class="live-wake">
        <h3>3 · Wake and answer</h3>
        <p class="live-small">The window is gone. One pass over <span class="live-question"></span>, reading S:</p>
        <ol class="live-answers"></ol>
      </section>
    </div>
    <p class="live-verdict" role="status"></p>
    <table class="live-table"><caption></caption>
      <thead><tr><th scope="col">hops k</th>${hops.map((k) => `<th scope="col">${k}</th>`).join("")}</tr></thead>
      <tbody><tr class="live-here"><th scope="row">this ring, every start</th>${hops.map(() => "<td></td>").join("")}</tr>
        <tr class="live-there"><th scope="row"></th>${hops.map(() => "<td></td>").join("")}</tr></tbody></table>
    <p class="live-small live-run"></p>`;
  const find = (selector) => live.querySelector(selector);
  const findAll = (selector) => [...live.querySelectorAll(selector)];

  // ---- 1 · The ring, and the window that tells it.

  function drawRing(answer) {
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
    let lost = "";
    if (answer !== steps.at(-1) && answer < nodes && answer !== state.start) {
      const [[x1, y1], [x2, y2]] = [place(state.start, 92), place(answer, 92)];
      lost = `<path class="lost" d="M${x1} ${y1}L${x2} ${y2}"/>`;
    }
    find(".live-ring svg").innerHTML = lost + arrows.join("") + numbers.join("");
    findAll(".live-node").forEach((button, i) => {
      const node = state.ring[i];
      button.textContent = words[node];
      button.style.left = `${place(node, 116)[0] / 3.2}%`;
      button.style.top = `${place(node, 116)[1] / 3.2}%`;
      button.setAttribute("aria-pressed", state.picked === i);
      button.setAttribute("aria-label", `${words[node]}, with an arrow to ${words[after(node)]}`);
      button.classList.toggle("start", node === state.start);
      button.classList.toggle("true", node === steps.at(-1));
      button.classList.toggle("wrong", node === answer && answer !== steps.at(-1));
    });
    find(".live-tokens").innerHTML = edges()
      .map(([from, to]) => `<span>${words[from]} ${words[to]}</span>`)
      .join(" ");
  }

  function hint(done = "") {
    const picked = state.picked === null ? null : words[state.ring[state.picked]];
    const text = picked
      ? `${picked} is picked. Select the node it should change places with, or ${picked} again to let go.`
      : `${done || "Redraw the arrows."} Select two nodes to swap them.`;
    if (find(".live-hint").textContent !== text) find(".live-hint").textContent = text; // each change is read aloud
  }

  // ---- 2 · The fast weights after every pass, on one diverging scale.

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

  /** The size that all but one number in 200 stay below: a few large ones must not leave the others pale. */
  function reachOf(trace) {
    const sizes = Float64Array.from(trace.flat(3).flatMap((row) => Array.from(row)), Math.abs).sort();
    return sizes[Math.floor(0.995 * (sizes.length - 1))];
  }

  /** How much a pass changed S, |S_n - S_(n-1)| / |S_n|. */
  function change(S, before) {
    const numbers = (T) => T.flat(2).flatMap((row) => Array.from(row));
    const [now, then] = [numbers(S), numbers(before)];
    return Math.hypot(...now.map((value, i) => value - then[i])) / Math.hypot(...now);
  }

  function drawHeads(canvas, matrices, reach, shade) {
    const size = matrices[0].length;
    const gap = 1;
    canvas.width = matrices.length * (size + gap) - gap;
    canvas.height = size;
    const context = canvas.getContext("2d");
    const image = context.createImageData(canvas.width, canvas.height); // transparent, and so are the gaps
    matrices.forEach((matrix, head) =>
      matrix.forEach((row, y) =>
        row.forEach((value, x) => {
          image.data.set([...shade(value / reach), 255], 4 * (y * canvas.width + head * (size + gap) + x));
        }),
      ),
    );
    context.putImageData(image, 0, 0);
  }

  function drawSleep(trace) {
    const reach = reachOf(trace);
    const shade = diverging();
    findAll(".live-pass:not(.live-heads)").forEach((row, i) => {
      const canvas = row.querySelector("canvas");
      const S = trace[i];
      row.classList.toggle("live-unused", !S);
      const changed = S && i > 0 ? `changed ${percent(change(S, trace[i - 1]))}` : S ? "written" : "";
      row.querySelector(".live-pass-name").innerHTML = `pass ${i + 1}<small>${changed}</small>`;
      if (S) drawHeads(canvas, S[0], reach, shade);
      else canvas.width = canvas.width; // clears it
      canvas.setAttribute("aria-label", S ? `The fast weights S after pass ${i + 1}, four heads: ${changed}` : `No pass ${i + 1}`);
    });
    find(".live-slept").textContent =
      state.N === 1
        ? "Reading is the first pass, and the only one. S after it:"
        : `Reading is the first pass; ${state.N === 2 ? "one more" : `${state.N - 1} more`} over the same window. S after each:`;
    find(".live-scale .low").textContent = `−${reach.toFixed(1)}`;
    find(".live-scale .high").textContent = `+${reach.toFixed(1)}`;
  }

  // ---- 3 · The answer.

  function drawAnswer(probabilities) {
    const [first, last] = [words[state.start], walk().at(-1)];
    const ranked = probabilities.map((_, word) => word).sort((a, b) => probabilities[b] - probabilities[a]);
    const shown = ranked.filter((word) => word < nodes || word === ranked[0]).slice(0, 4);
    if (!shown.includes(last)) shown[3] = last;
    find(".live-question").innerHTML = `<span class="live-token">+${state.hops} ${first}</span>`;
    find(".live-answers").innerHTML = shown
      .map((word) => {
        const mark = word === last ? "✓" : word === ranked[0] ? "✗" : "";
        const kind = word === last ? "true" : word === ranked[0] ? "wrong" : "";
        return `<li class="${kind}"><b>${words[word]}</b>
          <span class="live-track"><span style="width:${100 * probabilities[word]}%"></span></span>
          <span class="live-share">${percent(probabilities[word])}</span><span class="live-mark" aria-hidden="true">${mark}</span></li>`;
      })
      .join("");
    const answer = ranked[0];
    const right = answer === last;
    const path = walk().map((node) => words[node]);
    const verdict = right
      ? `The model says ${words[answer]} (${percent(probabilities[answer])}): right.`
      : `The model says ${words[answer]} (${percent(probabilities[answer])}): wrong. ${words[last]} gets ${percent(probabilities[last])}.`;
    find(".live-verdict").textContent = `N = ${state.N}, ${plural(state.hops, "hop")} after ${first}: the arrows go ${path.join(" → ")}. ${verdict}`;
    find(".live-verdict").classList.toggle("wrong", !right);
    return answer;
  }

  // ---- How far it gets, from every start.

  function drawTable(S) {
    const { accuracy, examples } = stored.models[state.N];
    find(".live-table caption").textContent = `Right answers of the model trained with N = ${state.N}`;
    find(".live-there th").textContent = `${thousands(examples)} fresh rings`;
    const [here, there] = [findAll(".live-here td"), findAll(".live-there td")];
    hops.forEach((k, i) => {
      const right = state.ring.filter((node) => {
        const logits = sleepeduLive.wake(state.N, S, k, node);
        return logits.indexOf(Math.max(...logits)) === after(node, k);
      });
      here[i].textContent = `${right.length} of ${nodes}`;
      there[i].textContent = accuracy[k] === 1 ? "100%" : `${(100 * accuracy[k]).toFixed(accuracy[k] > 0.999 ? 2 : 1)}%`;
    });
  }

  // ---- A change anywhere: sleep if the window or N is another, then wake and draw.

  let asleep = { key: "", trace: [], milliseconds: 0 };

  function update() {
    const key = JSON.stringify([state.N, edges()]);
    const isNew = key !== asleep.key; // a question does not wake it up: S is there before it is asked
    if (isNew) {
      sleepeduLive.load(state.N);
      const began = performance.now();
      const trace = sleepeduLive.sleep(state.N, edges());
      asleep = { key, trace, milliseconds: performance.now() - began };
      drawSleep(trace);
    }
    const S = asleep.trace.at(-1);
    const began = performance.now();
    const logits = sleepeduLive.wake(state.N, S, state.hops, state.start);
    const milliseconds = performance.now() - began;
    drawRing(drawAnswer(sleepeduLive.softmax(logits)));
    for (const [id, value] of [["passes", state.N], ["hops", state.hops]]) {
      find(`output[for=live-${id}]`).textContent = value;
    }
    find("#live-start").value = state.start;
    findAll(".live-table tr").forEach((row) =>
      [...row.children].forEach((cell, column) => cell.classList.toggle("now", column === state.hops)),
    );
    const { run, examples } = stored.models[state.N];
    find(".live-run").textContent =
      `Run ${run}, with rounded weights (the ${thousands(examples)} rings: before rounding). In this browser: ` +
      `${asleep.milliseconds.toFixed(0)} ms asleep, ${milliseconds.toFixed(1)} ms to answer.`;
    // The table asks every question there is: after the page has been drawn.
    if (isNew) setTimeout(() => key === asleep.key && drawTable(S));
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
    update();
    hint(`${words[state.ring[place]]} and ${words[state.ring[other]]} have changed places.`);
  }

  function shuffle(list) {
    for (let i = list.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [list[i], list[j]] = [list[j], list[i]];
    }
    state.picked = null;
    update();
    hint();
  }

  figure.prepend(live);
  figure.classList.add("is-live");
  for (const [id, name, event] of [["passes", "N", "input"], ["hops", "hops", "input"], ["start", "start", "change"]]) {
    find(`#live-${id}`).addEventListener(event, ({ target }) => {
      state[name] = Number(target.value);
      update();
    });
  }
  findAll(".live-node").forEach((button, place) => button.addEventListener("click", () => select(place)));
  find("#live-shuffle").addEventListener("click", () => shuffle(state.ring));
  find("#live-retell").addEventListener("click", () => shuffle(state.told));
  new MutationObserver(() => drawSleep(asleep.trace)).observe(document.documentElement, {
    attributeFilter: ["data-theme"],
  });
  update();
  hint();
})();
