/* The model of this book in plain JavaScript: Algorithm 1, run in the page.

   It is sleepedu/{layers,fast_weights,model,sleep_loop}.py once more, a token at a time and without a gradient, over the
   weights that `python book/live_model.py` wrote to weights.js. A test holds its logits to PyTorch's.

   Symbols: h hidden states, one row of `width` numbers for every token of the window; q, k, v queries, keys, values;
   a forget gate, b write strength; S fast weights, for every head a matrix of d_v rows and d_k columns; N passes. */
(() => {
  "use strict";
  const stored = globalThis.sleepeduLiveWeights;
  const { heads, layout, width, write_range: writeRange } = stored.config;

  // ---- The weights. A vector is 32-bit numbers. A matrix is rounded: every row has a scale, and every number one or
  // two printable characters, the digits of a number to base 91.

  function fromBase64(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  }

  function digit(character) {
    const code = character === 126 ? 92 : character; // "~" stands for a backslash
    return code - 35;
  }

  function unpack(packed) {
    if (Array.isArray(packed)) return packed.flatMap(unpack); // a matrix in several parts, one below the other
    if (packed.numbers) return fromBase64(packed.numbers);
    const { columns, characters, levels } = packed;
    const zero = Math.floor(91 ** characters / 2);
    return Array.from(fromBase64(packed.scales), (scale, row) =>
      Float32Array.from({ length: columns }, (_, column) => {
        let level = 0;
        const at = (row * columns + column) * characters;
        for (let i = at; i < at + characters; i++) level = 91 * level + digit(levels.charCodeAt(i));
        return scale * (level - zero);
      }),
    );
  }

  const models = {}; // how it was trained (its N) -> the model, unpacked when it is first needed

  function modelFor(name) {
    if (!models[name]) {
      const packed = stored.models[name].weights;
      const weight = (name) => unpack(packed[name]);
      models[name] = {
        embedding: weight("embedding.weight"),
        blocks: Array.from(layout, (kind, i) => readBlock(kind, (name) => packed[`layers.${i}.${name}`])),
        norm: weight("norm.weight"),
        head: weight("head.weight"),
      };
    }
    return models[name];
  }

  function readBlock(kind, find) {
    const weight = (name) => unpack(find(name));
    const block = {
      hasFastWeights: kind === "g",
      mixerNorm: weight("mixer_norm.weight"),
      mlpNorm: weight("mlp_norm.weight"),
      mlp: { project: weight("mlp.project.weight"), out: weight("mlp.out.weight") },
      mixer: { project: weight("mixer.project.weight"), out: weight("mixer.out.weight") },
    };
    if (block.hasFastWeights) {
      Object.assign(block.mixer, {
        taps: weight("mixer.taps"),
        gates: weight("mixer.gates.weight"),
        gateBias: weight("mixer.gates.bias"),
        decayRate: weight("mixer.decay_rate"),
        norm: weight("mixer.norm"),
      });
    }
    return block;
  }

  // ---- Small operations on vectors. All sums are in double precision.

  const sigmoid = (x) => 1 / (1 + Math.exp(-x));
  const silu = (x) => x * sigmoid(x);
  const softplus = (x) => (x > 20 ? x : Math.log1p(Math.exp(x)));
  const add = (x, y) => x.map((value, i) => value + y[i]);

  function dot(x, y) {
    let sum = 0;
    for (let i = 0; i < x.length; i++) sum += x[i] * y[i];
    return sum;
  }

  function matrixVector(W, x) {
    const y = new Float64Array(W.length);
    for (let i = 0; i < W.length; i++) y[i] = dot(W[i], x);
    return y;
  }

  function rmsNorm(x, weight) {
    const scale = 1 / Math.sqrt(dot(x, x) / x.length + 1e-6);
    return x.map((value, i) => value * scale * weight[i]);
  }

  function unitLength(x) {
    const length = Math.sqrt(dot(x, x) + 1e-12);
    return x.map((value) => value / length);
  }

  function softmax(x) {
    const largest = Math.max(...x); // without it, exp could overflow
    const powers = x.map((value) => Math.exp(value - largest));
    const sum = powers.reduce((total, value) => total + value, 0);
    return powers.map((value) => value / sum);
  }

  /** Cut a vector into `count` pieces of one size. */
  function split(x, count) {
    const size = x.length / count;
    return Array.from({ length: count }, (_, i) => x.subarray(i * size, (i + 1) * size));
  }

  function concatenate(pieces) {
    const joined = new Float64Array(pieces.length * pieces[0].length);
    pieces.forEach((piece, i) => joined.set(piece, i * piece.length));
    return joined;
  }

  // ---- Attention: exact, and blind to everything but the window.

  /** Rotary encoding: turn pairs of numbers by an angle that grows with the position in the window. */
  function rotate(x, position) {
    const half = x.length / 2;
    const turned = new Float64Array(x.length);
    for (let i = 0; i < half; i++) {
      const angle = position * 10000 ** (-i / half);
      const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
      turned[i] = x[i] * cos - x[half + i] * sin;
      turned[half + i] = x[half + i] * cos + x[i] * sin;
    }
    return turned;
  }

  function causalAttention(x, mixer) {
    const tokens = x.map((row, position) => {
      const [q, k, v] = split(matrixVector(mixer.project, row), 3).map((part) => split(part, heads));
      return { q: q.map((part) => rotate(part, position)), k: k.map((part) => rotate(part, position)), v };
    });
    return tokens.map(({ q }, t) => {
      const seen = tokens.slice(0, t + 1); // a token looks back, never ahead
      const read = q.map((query, head) => {
        const scores = seen.map(({ k }) => dot(query, k[head]) / Math.sqrt(query.length));
        const o = new Float64Array(query.length);
        softmax(scores).forEach((share, i) => seen[i].v[head].forEach((value, d) => (o[d] += share * value)));
        return o;
      });
      return matrixVector(mixer.out, concatenate(read));
    });
  }

  // ---- Fast weights: a matrix for every head that is written while the model reads, and outlives the window.

  /** Every channel sees its last few tokens; the last tap is the token itself. Nothing stands before the window. */
  function shortConvolution(x, taps) {
    return x.map((row, t) =>
      row.map((_, channel) => {
        let sum = 0;
        for (let j = 0; j < taps.length && j <= t; j++) sum += taps[taps.length - 1 - j][channel] * x[t - j][channel];
        return silu(sum);
      }),
    );
  }

  /** Forget, then correct what is left: S <- a S + b (v - a S k) k^T. Changes S. */
  function gatedDeltaRule(S, k, v, a, b) {
    S.forEach((row, i) => {
      const expected = a * dot(row, k); // what the memory, after forgetting, holds at this key
      const correction = b * (v[i] - expected);
      for (let j = 0; j < row.length; j++) row[j] = a * row[j] + correction * k[j];
    });
  }

  function fastWeightMixer(x, mixer, S) {
    const projected = x.map((row) => matrixVector(mixer.project, row));
    const valueSize = heads * mixer.norm.length;
    const mixed = shortConvolution(
      projected.map((row) => row.subarray(0, row.length - valueSize)),
      mixer.taps,
    );
    const keySize = (mixed[0].length - valueSize) / 2;
    const written = S.map((matrix) => matrix.map((row) => row.slice())); // the S before the pass stays as it was
    const output = x.map((row, t) => {
      const q = split(mixed[t].subarray(0, keySize), heads).map(unitLength);
      const k = split(mixed[t].subarray(keySize, 2 * keySize), heads).map(unitLength);
      const v = split(mixed[t].subarray(2 * keySize), heads);
      const [forget, write] = split(add(matrixVector(mixer.gates, row), mixer.gateBias), 2);
      const read = written.map((matrix, head) => {
        const a = Math.exp(-Math.exp(mixer.decayRate[head]) * softplus(forget[head]));
        const b = writeRange * sigmoid(write[head]);
        gatedDeltaRule(matrix, k[head], v[head], a, b);
        return rmsNorm(matrixVector(matrix, q[head]), mixer.norm); // o = S q
      });
      const gate = projected[t].subarray(-valueSize);
      const o = concatenate(read).map((value, i) => value * silu(gate[i]));
      return matrixVector(mixer.out, o);
    });
    return { output, written };
  }

  // ---- The model: embed -> blocks -> out.

  function swiglu(x, mlp) {
    const [gate, up] = split(matrixVector(mlp.project, x), 2);
    return matrixVector(mlp.out, gate.map((value, i) => silu(value) * up[i]));
  }

  const embed = (model, tokens) => tokens.map((token) => Float64Array.from(model.embedding[token]));

  function emptyFastWeights() {
    const size = width / heads; // weights.js is written for S with as many rows and columns as this
    const zeros = () => Array.from({ length: size }, () => new Float64Array(size));
    return Array.from({ length: heads }, zeros);
  }

  /** One pass of all blocks over a window: h, S <- Blocks(h, S). S has one entry for every fast-weight block. */
  function blocks(model, h, S) {
    const left = [...S];
    const after = [];
    for (const block of model.blocks) {
      const x = h.map((row) => rmsNorm(row, block.mixerNorm));
      let mixed;
      if (block.hasFastWeights) {
        const { output, written } = fastWeightMixer(x, block.mixer, left.shift());
        mixed = output;
        after.push(written);
      } else {
        mixed = causalAttention(x, block.mixer);
      }
      h = h.map((row, t) => add(row, mixed[t]));
      h = h.map((row) => add(row, swiglu(rmsNorm(row, block.mlpNorm), block.mlp)));
    }
    return { h, S: after };
  }

  // ---- Algorithm 1.

  /** One pass of a sleep. h goes round and S is refined: the next pass starts from both. */
  const sleepPass = (model, h, S) => blocks(model, h, S);

  /** Sleep on a full window. Returns S after each of the N passes; h is dropped here, and with it the window. */
  function sleep(model, tokens, N) {
    const trace = [];
    let h = embed(model, tokens);
    let S = model.blocks.filter((block) => block.hasFastWeights).map(emptyFastWeights);
    for (let pass = 1; pass <= N; pass++) {
      ({ h, S } = sleepPass(model, h, S));
      trace.push(S);
    }
    return trace;
  }

  /** Answer in one ordinary pass over the question, given S alone. Returns the logits at its last token. */
  function wake(model, prompt, S) {
    const { h } = blocks(model, embed(model, prompt), S);
    return matrixVector(model.head, rmsNorm(h[h.length - 1], model.norm));
  }

  // ---- What the page and the tests call. Nodes are numbers from 0; an edge is a pair [from, to].

  const question = (hops, start) => [stored.nodes + hops - 1, start]; // "+1", "+2", ... come after the nodes' names

  globalThis.sleepeduLive = {
    /** Unpack the weights of the model trained with N, before they are needed. */
    load: (N) => void modelFor(N),
    /** S after each pass over the edges, N of them unless told otherwise: [pass][fast-weight block][head][row][column]. */
    sleep: (N, edges, passes = N) => sleep(modelFor(N), edges.flat(), passes),
    /** The logits of "which node stands `hops` after `start`?", one for every word, given S from `sleep`. */
    wake: (N, S, hops, start) => Array.from(wake(modelFor(N), question(hops, start), S)),
    /** Both: sleep on the edges, wake, answer. */
    answer: (N, edges, hops, start) =>
      globalThis.sleepeduLive.wake(N, globalThis.sleepeduLive.sleep(N, edges).at(-1), hops, start),
    softmax,
    /** How a share of right answers is shaded, in both panels; their keys say the same in words or numbers. */
    shading: (share) => (share >= 0.9 ? "most" : share >= 0.5 ? "half" : "few"),
    /** Put a list into a random order, in place. */
    shuffle: (list) => {
      for (let i = list.length - 1; i > 0; i--) {
        const j = Math.floor(Math.random() * (i + 1));
        [list[i], list[j]] = [list[j], list[i]];
      }
    },
  };
})();
