// The gated delta rule and its gradient, token after token, for one core.
//
// A row of S never meets another one: row i reads and writes with the same q, k and gates as all rows, and with v_i
// alone. So a few rows are taken at a time, as many as the registers hold, and stay there for the whole window. The
// symbols are those of fast_weights.py.
//
// Vectors are the compiler's own (GCC's and Clang's): 16 floats, in as many registers as the processor needs for that.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __clang__
#define UNROLL _Pragma("unroll")
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define UNROLL _Pragma("GCC unroll 16")
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, (int __attribute__((vector_size(16)))){__VA_ARGS__})
#endif
#define EACH(i, n) UNROLL for (int i = 0; i < n; i++)

namespace {

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef float four __attribute__((vector_size(16), aligned(4)));

// The rows of one sequence and head: a row for every token, of its channels; or the rows of S.
struct Rows {
    float *data;
    int64_t next;  // floats from one row to the next
    float &operator[](int64_t row) const { return data[row * next]; }
    vec &sixteen(int64_t row, int group) const { return *(vec *)(data + row * next + 16 * group); }
    four &quad(int64_t row, int group) const { return *(four *)(data + row * next + 4 * group); }
    Rows channels(int64_t first) const { return {data + first, next}; }
    Rows rows(int64_t first) const { return {data + first * next, next}; }
};

// A tensor of such rows; its last axis is dense.
struct Tensor {
    float *data;
    int64_t batch, head, next;
    Rows of(int64_t b, int64_t h) const { return {data + b * batch + h * head, next}; }
};

struct Sizes {
    int64_t batch, heads, length, d_k, d_v, threads;
};

inline four quarters(const vec &x) {
    four part[4];
    memcpy(part, &x, sizeof x);
    return (part[0] + part[1]) + (part[2] + part[3]);
}

inline float sum(const four &x) { return (x[0] + x[1]) + (x[2] + x[3]); }

// The sums of four vectors, side by side.
inline four sums(const vec (&x)[4]) {
    four a = quarters(x[0]), b = quarters(x[1]), c = quarters(x[2]), d = quarters(x[3]);
    four ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
    four cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
    return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
}

// What the rule is given (T tokens) and what it finds; w is what every token finds wrong in S.
struct Given { Rows q, k, v, a, b, S; };
struct Found { Rows o, w, S_end; };

// 4 G rows of S, each of 16 C floats.
template <int C, int G>
inline void forward(int64_t T, const Given &x, const Found &y) {
    vec S[4 * G][C];
    EACH(r, 4 * G) EACH(c, C) S[r][c] = x.S.sixteen(r, c);
    for (int64_t t = 0; t < T; t++) {
        vec q[C], k[C];
        EACH(c, C) { q[c] = x.q.sixteen(t, c); k[c] = x.k.sixteen(t, c); }
        float a = x.a[t], b = x.b[t];
        EACH(g, G) {
            vec read[4] = {};
            EACH(r, 4) EACH(c, C) { S[4 * g + r][c] *= a; read[r] += S[4 * g + r][c] * k[c]; }
            four w = x.v.quad(t, g) - sums(read), u = b * w;
            EACH(r, 4) read[r] = vec{};
            EACH(r, 4) EACH(c, C) { S[4 * g + r][c] += u[r] * k[c]; read[r] += S[4 * g + r][c] * q[c]; }
            y.w.quad(t, g) = w;
            y.o.quad(t, g) = sums(read);
        }
    }
    EACH(r, 4 * G) EACH(c, C) y.S_end.sixteen(r, c) = S[r][c];
}

// The gradients of what was found, and of what was given. All rows have a share in those of q, k, log a and b, which are
// added to.
struct GivenGradients { Rows d_o, dS_end; };
struct FoundGradients { Rows dq, dk, dv, dlog_a, db, dS; };

// states is room for the rows at hand of S before the first token and after every one.
template <int C, int G>
inline void backward(int64_t T, const Given &x, const Rows &w_of, const GivenGradients &dy, const FoundGradients &dx,
                     vec *states) {
    vec dS[4 * G][C];  // first S itself, which is found again from w
    EACH(r, 4 * G) EACH(c, C) states[r * C + c] = dS[r][c] = x.S.sixteen(r, c);
    for (int64_t t = 0; t < T; t++) {
        float a = x.a[t], b = x.b[t];
        EACH(g, G) {
            four u = b * w_of.quad(t, g);
            EACH(r, 4) EACH(c, C) {
                vec &S = dS[4 * g + r][c];
                S = a * S + u[r] * x.k.sixteen(t, c);
                states[((t + 1) * 4 * G + 4 * g + r) * C + c] = S;
            }
        }
    }
    EACH(r, 4 * G) EACH(c, C) dS[r][c] = dy.dS_end.sixteen(r, c);
    for (int64_t t = T - 1; t >= 0; t--) {
        vec q[C], k[C], dq[C], dk[C], kept = {};
        EACH(c, C) { q[c] = x.q.sixteen(t, c); k[c] = x.k.sixteen(t, c); }
        EACH(c, C) { dq[c] = dx.dq.sixteen(t, c); dk[c] = dx.dk.sixteen(t, c); }
        float a = x.a[t], b = x.b[t];
        EACH(g, G) {
            const vec *before = states + (t * 4 * G + 4 * g) * C, *after = before + 4 * G * C;
            four d_o = dy.d_o.quad(t, g), w = w_of.quad(t, g), u = b * w;
            vec read[4] = {};
            EACH(r, 4) EACH(c, C) {
                dq[c] += d_o[r] * after[r * C + c];
                dS[4 * g + r][c] += d_o[r] * q[c];
                read[r] += dS[4 * g + r][c] * k[c];
            }
            four du = sums(read), dw = b * du, adw = a * dw;
            dx.dv.quad(t, g) = dw;
            dx.db[t] += sum(du * w);
            EACH(r, 4) EACH(c, C) {
                dk[c] += u[r] * dS[4 * g + r][c] - adw[r] * before[r * C + c];
                dS[4 * g + r][c] = a * (dS[4 * g + r][c] - dw[r] * k[c]);
                kept += dS[4 * g + r][c] * before[r * C + c];
            }
        }
        dx.dlog_a[t] += sum(quarters(kept));  // a <S, dS>: what goes to 0 with a, as a difference of sums would not
        EACH(c, C) { dx.dq.sixteen(t, c) = dq[c]; dx.dk.sixteen(t, c) = dk[c]; }
    }
    EACH(r, 4 * G) EACH(c, C) dx.dS.sixteen(r, c) = dS[r][c];
}

// How many rows are taken at a time is what d_v has to be a multiple of.
template <int C, int G>
void forward_head(const Sizes &n, Given x, Found y) {
    for (int64_t r = 0; r < n.d_v; r += 4 * G)
        forward<C, G>(n.length, {x.q, x.k, x.v.channels(r), x.a, x.b, x.S.rows(r)},
                      {y.o.channels(r), y.w.channels(r), y.S_end.rows(r)});
}

template <int C, int G>
void backward_head(const Sizes &n, Given x, Rows w, GivenGradients dy, FoundGradients dx, vec *states) {
    for (int64_t t = 0; t < n.length; t++) {
        memset(&dx.dq[t], 0, n.d_k * sizeof(float));
        memset(&dx.dk[t], 0, n.d_k * sizeof(float));
        dx.dlog_a[t] = dx.db[t] = 0;
    }
    for (int64_t r = 0; r < n.d_v; r += 4 * G)
        backward<C, G>(n.length, {x.q, x.k, x.v.channels(r), x.a, x.b, x.S.rows(r)}, w.channels(r),
                       {dy.d_o.channels(r), dy.dS_end.rows(r)},
                       {dx.dq, dx.dk, dx.dv.channels(r), dx.dlog_a, dx.db, dx.dS.rows(r)}, states);
}

}  // namespace

// d_k is one of 16, 32, 64 and 128, d_v a multiple of 16, 8, 4 and 4.
#define BY_SIZE(function, ...)                        \
    switch (n->d_k) {                                 \
        case 16: function<1, 4>(__VA_ARGS__); break;  \
        case 32: function<2, 2>(__VA_ARGS__); break;  \
        case 64: function<4, 1>(__VA_ARGS__); break;  \
        case 128: function<8, 1>(__VA_ARGS__); break; \
    }

extern "C" {

void gated_delta_forward(const Sizes *n, const Tensor *q, const Tensor *k, const Tensor *v, const Tensor *a,
                         const Tensor *b, const Tensor *S, const Tensor *o, const Tensor *w, const Tensor *S_end) {
#pragma omp parallel for num_threads(n->threads)
    for (int64_t i = 0; i < n->batch * n->heads; i++) {
        auto head = [=](const Tensor *x) { return x->of(i / n->heads, i % n->heads); };
        Given x = {head(q), head(k), head(v), head(a), head(b), head(S)};
        Found y = {head(o), head(w), head(S_end)};
        BY_SIZE(forward_head, *n, x, y)
    }
}

// Returns 0, or 1 when there was no memory.
int gated_delta_backward(const Sizes *n, const Tensor *q, const Tensor *k, const Tensor *v, const Tensor *a,
                         const Tensor *b, const Tensor *S, const Tensor *w, const Tensor *d_o, const Tensor *dS_end,
                         const Tensor *dq, const Tensor *dk, const Tensor *dv, const Tensor *dlog_a, const Tensor *db,
                         const Tensor *dS) {
    const int64_t at_once = n->d_k < 128 ? 256 : 512;  // floats in the rows at hand
    int failed = 0;
#pragma omp parallel num_threads(n->threads)
    {
        vec *states = (vec *)malloc(at_once * (n->length + 1) * sizeof(float));
        if (!states) failed = 1;
#pragma omp for
        for (int64_t i = 0; i < n->batch * n->heads; i++) {
            if (!states) continue;
            auto head = [=](const Tensor *x) { return x->of(i / n->heads, i % n->heads); };
            Given x = {head(q), head(k), head(v), head(a), head(b), head(S)};
            GivenGradients dy = {head(d_o), head(dS_end)};
            FoundGradients dx = {head(dq), head(dk), head(dv), head(dlog_a), head(db), head(dS)};
            BY_SIZE(backward_head, *n, x, head(w), dy, dx, states)
        }
        free(states);
    }
    return failed;
}
}
