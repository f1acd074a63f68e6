/* CPU kernels that stream weights at memory speed, straight from the layout the checkpoint stores.
 *
 * Weights are row-major [out, in] in bf16, fp16 or fp32 (experts: see expert_weights.h for more); activations and sums are fp32. Every output
 * is accumulated in the same order however many rows are computed together, so a row's result does
 * not depend on its batch. One source serves all instruction sets: 16-lane GNU vectors are lowered
 * by the compiler, and `target_clones` picks the clone at load time.
 *
 * Loaded with ctypes (which releases the GIL); the Python module itself is empty.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float f4v __attribute__((vector_size(16)));
typedef float f8v __attribute__((vector_size(32)));
typedef float f16v __attribute__((vector_size(64)));
typedef uint32_t u16v __attribute__((vector_size(64)));
typedef float f16v_u __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16v_u __attribute__((vector_size(32), aligned(2)));

#ifndef PREFETCH_BYTES
#define PREFETCH_BYTES 1024
#endif
#ifndef PREFETCH
#define PREFETCH(address) __builtin_prefetch(address)
#endif

enum { F32 = 0, BF16 = 1, F16 = 2, FP8 = 3, MXFP4 = 4 };
enum { SILU = 0, GELU = 1, GELU_TANH = 2, CLAMPED_SWIGLU = 3 };

INLINE float bf16_to_float(uint16_t h) {
    union { uint32_t u; float f; } v = {.u = (uint32_t)h << 16};
    return v.f;
}

INLINE uint16_t float_to_bf16(float f) {
    union { float f; uint32_t u; } v = {.f = f};
    if (f != f) return 0x7fc0;
    return (uint16_t)((v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16);
}

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    union { uint32_t u; float f; } v = {.u = rest}, scale = {.u = 0x77800000}; /* 2^112 */
    v.f *= scale.f;
    if (v.f >= 65536.0f) v.u |= 0x7f800000; /* inf and nan */
    v.u |= sign;
    return v.f;
}

INLINE f16v load16(const void *base, size_t i, const int dtype) {
    if (dtype == F32) return *(const f16v_u *)((const float *)base + i);
    u16v wide = __builtin_convertvector(*(const h16v_u *)((const uint16_t *)base + i), u16v);
    if (dtype == BF16) return (f16v)(wide << 16);
    u16v sign = (wide & 0x8000) << 16;
    f16v value = (f16v)((wide & 0x7fff) << 13) * 0x1p112f;
    u16v special = (u16v)(value >= 65536.0f) & 0x7f800000;
    return (f16v)((u16v)value | special | sign);
}

INLINE float load1(const void *base, size_t i, const int dtype) {
    if (dtype == F32) return ((const float *)base)[i];
    uint16_t h = ((const uint16_t *)base)[i];
    return dtype == BF16 ? bf16_to_float(h) : half_to_float(h);
}

INLINE f4v fold4(f16v v) {
    f8v a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
}

INLINE float sum16(f16v v) {
    f4v s = fold4(v);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* Sums of four accumulators at once, each added in the order of sum16. */
INLINE f4v sum16x4(f16v a, f16v b, f16v c, f16v d) {
    f4v fa = fold4(a), fb = fold4(b), fc = fold4(c), fd = fold4(d);
    f4v ab = __builtin_shufflevector(fa, fb, 0, 4, 1, 5) + __builtin_shufflevector(fa, fb, 2, 6, 3, 7);
    f4v cd = __builtin_shufflevector(fc, fd, 0, 4, 1, 5) + __builtin_shufflevector(fc, fd, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

/* out[r][col + a * step] = dot(weight row a, x row r) for W weight rows `row_stride` bytes apart and R
 * activation rows; n is a multiple of 16. The order of additions of one output depends on n alone. */
#define TILE(W, R)                                                                                  \
    INLINE void tile_##W##x##R(const char *w, size_t row_stride, const float *const *x, size_t n,   \
                               float *const *out, size_t col, size_t step, const int dtype) {       \
        f16v acc[W][R];                                                                             \
        _Pragma("GCC unroll 8") for (int a = 0; a < W; a++)                                         \
            _Pragma("GCC unroll 4") for (int b = 0; b < R; b++) acc[a][b] = (f16v){0};              \
        for (size_t i = 0; i < n; i += 16) {                                                        \
            _Pragma("GCC unroll 8") for (int a = 0; a < W; a++) {                                   \
                PREFETCH(w + a * row_stride + i * (dtype == F32 ? 4 : 2) + PREFETCH_BYTES);         \
                f16v wv = load16(w + a * row_stride, i, dtype);                                     \
                _Pragma("GCC unroll 4") for (int b = 0; b < R; b++)                                 \
                    acc[a][b] += wv * *(const f16v_u *)(x[b] + i);                                  \
            }                                                                                       \
        }                                                                                           \
        _Pragma("GCC unroll 4") for (int b = 0; b < R; b++)                                         \
            _Pragma("GCC unroll 2") for (int a = 0; a < W; a += 4) {                                \
                f4v sums = sum16x4(acc[a][b], acc[a + 1][b], acc[a + 2][b], acc[a + 3][b]);         \
                _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) out[b][col + (a + j) * step] = sums[j]; \
            }                                                                                       \
    }
TILE(8, 1)
TILE(8, 2)
TILE(4, 1)
TILE(4, 2)
TILE(4, 3)
TILE(4, 4)

INLINE float dot1(const char *w, const float *x, size_t n, const int dtype) {
    f16v acc = {0};
    size_t i = 0;
    for (; i + 16 <= n; i += 16) acc += load16(w, i, dtype) * *(const f16v_u *)(x + i);
    float s = sum16(acc);
    for (; i < n; i++) s += load1(w, i, dtype) * x[i];
    return s;
}

/* Read `bytes` of memory once, as eight streams; the bound that weight streaming is measured against. */
CLONES float moesaic_read_memory(const char *base, int64_t bytes) {
    enum { STREAMS = 8 };
    int64_t span = bytes / STREAMS / 64 * 64;
    f16v sums[STREAMS] = {{0}};
    for (int64_t at = 0; at < span; at += 64)
        _Pragma("GCC unroll 8") for (int s = 0; s < STREAMS; s++) sums[s] += *(const f16v_u *)(base + s * span + at);
    float total = 0;
    for (int s = 0; s < STREAMS; s++) total += sums[s][0];
    return total;
}

/* rows x [R, n] times weight rows [from, to) -> out[r][col]; x and out are arrays of row pointers.
 *
 * A tile takes its rows from STREAMS distant places and walks them together: one core reads memory a
 * third faster from several streams than from one (measured: 12.7 against 9.2 GB/s). */
INLINE void matvec_range(const void *weights, const int dtype, size_t n, size_t from, size_t to,
                         const float *const *x, int R, float *const *out) {
    size_t row_bytes = n * (dtype == F32 ? 4 : 2);
    const char *w = (const char *)weights + from * row_bytes;
    size_t done = 0;
    if (n % 16 == 0) {
        if (R <= 2) {
            size_t step = (to - from) / 8;
            for (size_t j = 0; j < step; j++)
                if (R == 1) tile_8x1(w + j * row_bytes, step * row_bytes, x, n, out, from + j, step, dtype);
                else tile_8x2(w + j * row_bytes, step * row_bytes, x, n, out, from + j, step, dtype);
            done = 8 * step;
        } else {
            size_t step = (to - from) / 4;
            for (size_t j = 0; j < step; j++) {
                const char *wp = w + j * row_bytes;
                size_t stride = step * row_bytes, col = from + j;
                int r = 0;
                for (; r + 4 <= R; r += 4) tile_4x4(wp, stride, x + r, n, out + r, col, step, dtype);
                if (R - r == 3) tile_4x3(wp, stride, x + r, n, out + r, col, step, dtype);
                else if (R - r == 2) tile_4x2(wp, stride, x + r, n, out + r, col, step, dtype);
                else if (R - r == 1) tile_4x1(wp, stride, x + r, n, out + r, col, step, dtype);
            }
            done = 4 * step;
        }
    }
    for (size_t col = from + done; col < to; col++)
        for (int r = 0; r < R; r++) out[r][col] = dot1((const char *)weights + col * row_bytes, x[r], n, dtype);
}

CLONES static void matvec_f32(const void *w, size_t n, size_t from, size_t to, const float *const *x, int R,
                              float *const *out) {
    matvec_range(w, F32, n, from, to, x, R, out);
}
CLONES static void matvec_bf16(const void *w, size_t n, size_t from, size_t to, const float *const *x, int R,
                               float *const *out) {
    matvec_range(w, BF16, n, from, to, x, R, out);
}
CLONES static void matvec_f16(const void *w, size_t n, size_t from, size_t to, const float *const *x, int R,
                              float *const *out) {
    matvec_range(w, F16, n, from, to, x, R, out);
}

static void matvec(int dtype, const void *w, size_t n, size_t from, size_t to, const float *const *x, int R,
                   float *const *out) {
    if (dtype == F32) matvec_f32(w, n, from, to, x, R, out);
    else if (dtype == BF16) matvec_bf16(w, n, from, to, x, R, out);
    else matvec_f16(w, n, from, to, x, R, out);
}

#include "expert_weights.h"

/* exp by range reduction and a degree-6 polynomial, |relative error| < 2e-7; vectorises. */
INLINE float fast_exp(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float t = x * 1.44269504088896341f;
    float r = __builtin_rintf(t);
    float f = x - r * 0.693359375f + r * 2.12194440e-4f;
    float p = 1.0f / 720.0f;
    p = p * f + 1.0f / 120.0f;
    p = p * f + 1.0f / 24.0f;
    p = p * f + 1.0f / 6.0f;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    union { int32_t i; float f; } scale = {.i = ((int32_t)r + 127) << 23};
    return p * scale.f;
}

/* What the experts of a model have in common. Mirrors KernelForm of native.py. */
typedef struct {
    int32_t format, transposed, joined, activation, scale_dtype, bias_dtype, block_rows, block_cols;
    int32_t isa_limit;  /* 0: the best of this machine; 1: portable; 3: AVX2 at most. For packed formats */
    float alpha, limit; /* of CLAMPED_SWIGLU */
} Form;

/* One expert; NULL what its form does not have. Mirrors ExpertPointers of native.py.
 * gate, up [I, D] and down [D, I]; joined: `gate` is [2I, D] with gate and up in turn; transposed: gate and up are
 * columns of one [D, 2I], down is [I, D]. */
typedef struct {
    const void *gate, *up, *down, *gate_scales, *up_scales, *down_scales, *gate_bias, *up_bias, *down_bias;
} Expert;

CLONES static void activate(float *restrict gate, const float *restrict up, size_t n, const Form *form) {
    int act = form->activation;
    if (act == SILU) {
        for (size_t i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
    } else if (act == GELU) {
        for (size_t i = 0; i < n; i++) gate[i] = 0.5f * gate[i] * (1.0f + erff(gate[i] * 0.70710678f)) * up[i];
    } else if (act == CLAMPED_SWIGLU) {
        float alpha = form->alpha, limit = form->limit;
        for (size_t i = 0; i < n; i++) {
            float g = gate[i] > limit ? limit : gate[i];
            float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
            gate[i] = g / (1.0f + fast_exp(-alpha * g)) * (u + 1.0f);
        }
    } else {
        for (size_t i = 0; i < n; i++) {
            float g = gate[i], t = 0.79788456f * (g + 0.044715f * g * g * g);
            gate[i] = 0.5f * g * (1.0f + tanhf(t)) * up[i];
        }
    }
}

CLONES static void widen_rows(const void *src, int dtype, float *dst, size_t n) {
    size_t i = 0;
    if (dtype == BF16) for (; i + 16 <= n; i += 16) *(f16v_u *)(dst + i) = load16(src, i, BF16);
    else if (dtype == F16) for (; i + 16 <= n; i += 16) *(f16v_u *)(dst + i) = load16(src, i, F16);
    else { memcpy(dst, src, n * 4); return; }
    for (; i < n; i++) dst[i] = load1(src, i, dtype);
}

INLINE void store_row(void *dst, int dtype, size_t offset, const float *src, size_t n) {
    if (dtype == F32) memcpy((float *)dst + offset, src, n * 4);
    else for (size_t i = 0; i < n; i++) ((uint16_t *)dst)[offset + i] = float_to_bf16(src[i]);
}

/* Columns [from, to) of rows x [R, n] times one of the expert's matrices, plus its bias -> out[r][col].
 * stride: elements from one stored row to the next, where the matrix is transposed. */
static void project(const Form *form, const void *w, const void *scales, const void *bias, size_t n, size_t stride,
                    size_t from, size_t to, const float *const *x, int R, float *const *out) {
    if (form->transposed) matvec_transposed(form->format, w, n, stride, from, to, x, R, out);
    else if (form->format == FP8) {
        size_t cols = form->block_cols;
        Packed packed = {w, scales, n, n, form->block_rows, cols, (n + cols - 1) / cols, form->scale_dtype};
        matvec_packed(FP8, form->isa_limit, &packed, from, to, x, R, out);
    } else if (form->format == MXFP4) {
        Packed packed = {w, scales, n, n / 2, 1, 32, n / 32, 0};
        matvec_packed(MXFP4, form->isa_limit, &packed, from, to, x, R, out);
    } else matvec(form->format, w, n, from, to, x, R, out);
    if (bias)
        for (int r = 0; r < R; r++)
            for (size_t i = from; i < to; i++) out[r][i] += load1(bias, i, form->bias_dtype);
}

/* Hidden neurons [from, to) of R rows -> g[r]. u: as much again; gu: room for [R, 2I] where gate and up are joined. */
static void hidden_range(const Form *form, const Expert *e, size_t D, size_t I, size_t from, size_t to,
                         const float *const *x, int R, float *const *g, float *const *u, float *const *gu) {
    if (form->joined) {
        project(form, e->gate, e->gate_scales, e->gate_bias, D, 2 * I, 2 * from, 2 * to, x, R, gu);
        for (int r = 0; r < R; r++)
            for (size_t i = from; i < to; i++) {
                g[r][i] = gu[r][2 * i];
                u[r][i] = gu[r][2 * i + 1];
            }
    } else {
        project(form, e->gate, e->gate_scales, e->gate_bias, D, 2 * I, from, to, x, R, g);
        project(form, e->up, e->up_scales, e->up_bias, D, 2 * I, from, to, x, R, u);
    }
    for (int r = 0; r < R; r++) {
        activate(g[r] + from, u[r] + from, to - from, form);
        if (form->format == MXFP4) split_blocks(g[r] + from, to - from);
    }
}

/* Gated FFN of the active experts of one layer.
 *
 * x [T, D] in `xdtype`, copied into `xf` [T, D] in fp32 unless it can be read as it is. Expert e computes the pairs
 * pairs[offsets[e] .. offsets[e+1]), where pair p = t * K + k means row t, gate rank k. y [T * K, D] fp32 receives each
 * pair's unweighted output. h is scratch of 2 * max_rows * I floats, twice that where gate and up are joined.
 */
void moesaic_experts_ffn(const Form *form, const void *input, int xdtype, int64_t T, float *xf, int64_t D, int64_t I,
                         int64_t K, int64_t num_experts, const Expert *const *experts, const int64_t *offsets,
                         const int64_t *pairs, float *y, float *h, int64_t max_rows, int threads) {
    enum { CHUNK = 64 };
    (void)threads;
    const float *x = xdtype == F32 && form->format != MXFP4 ? input : xf;
    if (x == xf) widen_rows(input, xdtype, xf, T * D);
    if (form->format == MXFP4) split_blocks(xf, T * D);
    for (int64_t e = 0; e < num_experts; e++) {
        const Expert *expert = experts[e];
        for (int64_t begin = offsets[e]; begin < offsets[e + 1]; begin += CHUNK) {
            int R = (int)(offsets[e + 1] - begin < CHUNK ? offsets[e + 1] - begin : CHUNK);
            const float *xin[CHUNK];
            float *g[CHUNK], *u[CHUNK], *gu[CHUNK], *out[CHUNK];
            for (int r = 0; r < R; r++) {
                int64_t pair = pairs[begin + r];
                xin[r] = x + (pair / K) * D;
                g[r] = h + (size_t)r * I;
                u[r] = h + (size_t)(max_rows + r) * I;
                gu[r] = h + (size_t)(2 * max_rows + 2 * r) * I;
                out[r] = y + pair * D;
            }
#ifdef _OPENMP
            if (threads > 1) {
#pragma omp parallel num_threads(threads)
                {
                    int64_t n = omp_get_num_threads(), me = omp_get_thread_num();
                    int64_t grain = form->format == MXFP4 ? 32 : 4;
                    int64_t from = I * me / n / grain * grain, to = me == n - 1 ? I : I * (me + 1) / n / grain * grain;
                    hidden_range(form, expert, D, I, from, to, xin, R, g, u, gu);
#pragma omp barrier
                    from = (D * me / n) & ~3;
                    to = me == n - 1 ? D : (D * (me + 1) / n) & ~3;
                    project(form, expert->down, expert->down_scales, expert->down_bias, I, D, from, to,
                            (const float *const *)g, R, out);
                }
                continue;
            }
#endif
            hidden_range(form, expert, D, I, 0, I, xin, R, g, u, gu);
            project(form, expert->down, expert->down_scales, expert->down_bias, I, D, 0, D, (const float *const *)g, R,
                    out);
        }
    }
}

/* out[t] = sum over k, in gate order, of weights[t, k] * y[t * K + k]; fp32 sums, out in `dtype`. */
CLONES void moesaic_combine(const float *y, const float *weights, int64_t T, int64_t K, int64_t D, void *out, int dtype) {
    float acc[16];
    for (int64_t t = 0; t < T; t++) {
        const float *row = y + t * K * D;
        for (int64_t d = 0; d < D; d += 16) {
            int64_t n = D - d < 16 ? D - d : 16;
            for (int64_t i = 0; i < n; i++) acc[i] = 0;
            for (int64_t k = 0; k < K; k++) {
                float wk = weights[t * K + k];
                for (int64_t i = 0; i < n; i++) acc[i] += wk * row[k * D + d + i];
            }
            store_row(out, dtype, t * D + d, acc, n);
        }
    }
}

/* Sort the P gate choices by expert, stably: order[P], and for each of the returned n experts that were
 * chosen its number in wanted[n] and its span order[offsets[i] .. offsets[i + 1]). */
int64_t moesaic_group(const int64_t *ids, int64_t P, int64_t E, int64_t *order, int64_t *wanted, int64_t *offsets,
                      int64_t *next) {
    for (int64_t e = 0; e < E; e++) next[e] = 0;
    for (int64_t p = 0; p < P; p++) next[ids[p]]++;
    int64_t n = 0, at = 0;
    for (int64_t e = 0; e < E; e++) {
        int64_t count = next[e];
        if (count) {
            wanted[n] = e;
            offsets[n++] = at;
        }
        next[e] = at;
        at += count;
    }
    offsets[n] = at;
    for (int64_t p = 0; p < P; p++) order[next[ids[p]]++] = p;
    return n;
}

/* Count what the first T rows of a step's layers chose: n of the L layers, `layers` says which, each with choices ids[i]
 * and routing weights weights[i], [T, K]. The first `num_decode` rows decode (phase 1), the others are prefill (phase 0).
 * totals [L, 2, E] has the choices; values [C, 2, L, E, 2] has the choices and the sums of their weights, by the rows'
 * clusters: -1, and all rows where there are none, is the last of C. */
void moesaic_count_choices(const int64_t *layers, const int64_t *const *ids, const void *const *weights, int dtype, int64_t n,
                           const int32_t *clusters, int64_t T, int64_t K, int64_t num_decode, int64_t C, int64_t L,
                           int64_t E, int64_t *totals, double *values) {
    for (int64_t t = 0; t < T; t++) {
        int64_t phase = t < num_decode, cluster = clusters && clusters[t] >= 0 ? clusters[t] : C - 1;
        for (int64_t i = 0; i < n; i++) {
            int64_t *total = totals + (layers[i] * 2 + phase) * E;
            double *of_cluster = values + ((cluster * 2 + phase) * L + layers[i]) * E * 2;
            for (int64_t p = t * K; p < (t + 1) * K; p++) {
                int64_t expert = ids[i][p];
                total[expert]++;
                of_cluster[2 * expert] += 1.0;
                of_cluster[2 * expert + 1] += load1(weights[i], p, dtype);
            }
        }
    }
}

/* Write T rows of keys [Gk, T, Ck] and values [Gv, T, Cv], given by their strides in elements, into their slots. */
void moesaic_append_kv(const char *key, int64_t k_head, int64_t k_row, int64_t Gk, int64_t Ck, const char *value,
                       int64_t v_head, int64_t v_row, int64_t Gv, int64_t Cv, const int64_t *slots, int64_t T,
                       char *k_cache, char *v_cache, int bytes) {
    for (int64_t t = 0; t < T; t++) {
        for (int64_t g = 0; g < Gk; g++)
            memcpy(k_cache + (slots[t] * Gk + g) * Ck * bytes, key + (g * k_head + t * k_row) * bytes, Ck * bytes);
        for (int64_t g = 0; g < Gv; g++)
            memcpy(v_cache + (slots[t] * Gv + g) * Cv * bytes, value + (g * v_head + t * v_row) * bytes, Cv * bytes);
    }
}

/* Rotary embedding of R rows of H heads, halves rotated: out = x * cos + rotate_half(x) * sin, rounded after
 * each operation as torch does. x is given by strides in elements, out is [H, R, C]. */
CLONES void moesaic_rope(const void *x, int64_t head_stride, int64_t row_stride, const void *cos, const void *sin,
                         int64_t H, int64_t R, int64_t C, void *out, int dtype) {
    int64_t half = C / 2;
    for (int64_t h = 0; h < H; h++)
        for (int64_t r = 0; r < R; r++)
            for (int64_t c = 0; c < C; c++) {
                int64_t at = h * head_stride + r * row_stride, pair = c < half ? c + half : c - half;
                float sign = c < half ? -1.0f : 1.0f;
                if (dtype == F32) {
                    const float *v = (const float *)x + at;
                    float a = v[c] * ((const float *)cos)[r * C + c], b = sign * v[pair] * ((const float *)sin)[r * C + c];
                    ((float *)out)[(h * R + r) * C + c] = a + b;
                } else {
                    const uint16_t *v = (const uint16_t *)x + at;
                    uint16_t a = float_to_bf16(bf16_to_float(v[c]) * bf16_to_float(((const uint16_t *)cos)[r * C + c]));
                    uint16_t b = float_to_bf16(sign * bf16_to_float(v[pair]) * bf16_to_float(((const uint16_t *)sin)[r * C + c]));
                    ((uint16_t *)out)[(h * R + r) * C + c] = float_to_bf16(bf16_to_float(a) + bf16_to_float(b));
                }
            }
}

/* out [T, N] = x [T, D] times weight [N, D] transposed, any T; x and out in `xdtype`. */
void moesaic_linear(const void *x, int xdtype, const void *w, int wdtype, int64_t T, int64_t D, int64_t N, void *out,
                    float *scratch) {
    enum { CHUNK = 32 };
    for (int64_t begin = 0; begin < T; begin += CHUNK) {
        int R = (int)(T - begin < CHUNK ? T - begin : CHUNK);
        const float *xin[CHUNK];
        float *rows[CHUNK];
        const char *xp = (const char *)x + begin * D * (xdtype == F32 ? 4 : 2);
        float *xf = scratch, *of = scratch + CHUNK * D;
        if (xdtype == F32) xf = (float *)xp;
        else widen_rows(xp, xdtype, xf, R * D);
        if (xdtype == F32) of = (float *)out + begin * N;
        for (int r = 0; r < R; r++) {
            xin[r] = xf + r * D;
            rows[r] = of + r * N;
        }
        matvec(wdtype, w, D, 0, N, xin, R, rows);
        if (xdtype != F32)
            for (int r = 0; r < R; r++) store_row(out, BF16, (begin + r) * N, rows[r], N);
    }
}

/* Root-mean-square norm of T rows: out = round(x / rms) * weight, in `dtype`, as the model code rounds. */
CLONES void moesaic_rms_norm(const void *x, const void *weight, int64_t T, int64_t D, float eps, void *out, int dtype) {
    for (int64_t t = 0; t < T; t++) {
        f16v lanes = {0};
        int64_t i = 0;
        for (; i + 16 <= D; i += 16) {
            f16v v = dtype == F32 ? load16((const float *)x + t * D, i, F32) : load16((const uint16_t *)x + t * D, i, BF16);
            lanes += v * v;
        }
        float sum = sum16(lanes);
        for (; i < D; i++) {
            float v = dtype == F32 ? ((const float *)x)[t * D + i] : bf16_to_float(((const uint16_t *)x)[t * D + i]);
            sum += v * v;
        }
        float scale = 1.0f / sqrtf(sum / D + eps);
        if (dtype == F32) {
            const float *xr = (const float *)x + t * D, *w = weight;
            float *o = (float *)out + t * D;
            for (i = 0; i < D; i++) o[i] = w[i] * (xr[i] * scale);
        } else {
            const uint16_t *xr = (const uint16_t *)x + t * D, *w = weight;
            uint16_t *o = (uint16_t *)out + t * D;
            for (i = 0; i < D; i++)
                o[i] = float_to_bf16(bf16_to_float(w[i]) * bf16_to_float(float_to_bf16(bf16_to_float(xr[i]) * scale)));
        }
    }
}

/* Softmax of n scores, the largest of which is `top`, in place. A sink is one more score, whose share goes nowhere. */
INLINE void softmax_row(float *scores, int64_t n, float top, const float *sink) {
    if (sink && *sink > top) top = *sink;
    float total = sink ? fast_exp(*sink - top) : 0;
    for (int64_t j = 0; j < n; j++) {
        scores[j] = fast_exp(scores[j] - top);
        total += scores[j];
    }
    for (int64_t j = 0; j < n; j++) scores[j] /= total;
}

/* acc [D] = sum over the slots of p[j] * row j of `values`. */
INLINE void weigh_rows(const void *values, const int64_t *slots, int64_t n, int64_t stride, int64_t offset, int64_t D,
                       const float *p, float *acc, const int dtype) {
    for (int64_t d = 0; d < D; d++) acc[d] = 0;
    for (int64_t j = 0; j < n; j++) {
        const char *v = (const char *)values + (slots[j] * stride + offset) * (dtype == F32 ? 4 : 2);
        int64_t d = 0;
        for (; d + 16 <= D; d += 16) *(f16v_u *)(acc + d) += load16(v, d, dtype) * p[j];
        for (; d < D; d++) acc[d] += load1(v, d, dtype) * p[j];
    }
}

INLINE void attend_row(const float *q, const void *keys, const void *values, const int64_t *slots, int64_t n, int64_t G,
                       int64_t g, int64_t Dk, int64_t Dv, float scale, const float *sink, float *scores, float *acc,
                       const int dtype) {
    int64_t stride = G * Dk, offset = g * Dk;
    float top = -INFINITY;
    for (int64_t j = 0; j < n; j++) {
        const char *k = (const char *)keys + (slots[j] * stride + offset) * (dtype == F32 ? 4 : 2);
        scores[j] = dot1(k, q, Dk, dtype) * scale;
        top = scores[j] > top ? scores[j] : top;
    }
    softmax_row(scores, n, top, sink);
    weigh_rows(values, slots, n, G * Dv, g * Dv, Dv, scores, acc, dtype);
}

/* Paged attention of R rows, each over its own list of KV slots.
 *
 * q [R, Hq, Dk], k_cache [num_slots, Hkv, Dk], v_cache [num_slots, Hkv, Dv], all in `dtype`; row r attends to
 * slots[starts[r] .. ends[r]). sinks [Hq] fp32 or NULL. out [R, Hq, Dv]. scratch holds Dk + Dv + longest list floats.
 */
CLONES void moesaic_paged_attention(const void *q, const void *k_cache, const void *v_cache, const int64_t *slots,
                                    const int64_t *starts, const int64_t *ends, int64_t R, int64_t Hq, int64_t Hkv,
                                    int64_t Dk, int64_t Dv, float scale, const float *sinks, void *out, float *scratch,
                                    int dtype) {
    float *qf = scratch, *acc = scratch + Dk, *scores = acc + Dv;
    for (int64_t r = 0; r < R; r++)
        for (int64_t h = 0; h < Hq; h++) {
            size_t at = (size_t)(r * Hq + h);
            for (int64_t d = 0; d < Dk; d++) qf[d] = load1(q, at * Dk + d, dtype);
            const int64_t *row = slots + starts[r];
            const float *sink = sinks ? sinks + h : NULL;
            int64_t n = ends[r] - starts[r], g = h / (Hq / Hkv);
            if (dtype == F32) attend_row(qf, k_cache, v_cache, row, n, Hkv, g, Dk, Dv, scale, sink, scores, acc, F32);
            else attend_row(qf, k_cache, v_cache, row, n, Hkv, g, Dk, Dv, scale, sink, scores, acc, BF16);
            store_row(out, dtype, at * Dv, acc, Dv);
        }
}

INLINE void latent_row(const float *q, const void *latents, const void *ropes, const void *w, const int64_t *slots,
                       int64_t n, int64_t N, int64_t P, int64_t V, int64_t L, float scale, float *ql, float *acc,
                       float *o, float *scores, const int dtype) {
    size_t bytes = dtype == F32 ? 4 : 2;
    for (int64_t l = 0; l < L; l++) ql[l] = 0;
    for (int64_t c = 0; c < N; c++) {
        const char *row = (const char *)w + c * L * bytes;
        int64_t l = 0;
        for (; l + 16 <= L; l += 16) *(f16v_u *)(ql + l) += load16(row, l, dtype) * q[c];
        for (; l < L; l++) ql[l] += load1(row, l, dtype) * q[c];
    }
    float top = -INFINITY;
    for (int64_t j = 0; j < n; j++) {
        const char *latent = (const char *)latents + slots[j] * L * bytes, *rope = (const char *)ropes + slots[j] * P * bytes;
        scores[j] = (dot1(latent, ql, L, dtype) + dot1(rope, q + N, P, dtype)) * scale;
        top = scores[j] > top ? scores[j] : top;
    }
    softmax_row(scores, n, top, NULL);
    weigh_rows(latents, slots, n, L, 0, L, scores, acc, dtype);
    for (int64_t v = 0; v < V; v++) o[v] = dot1((const char *)w + (N + v) * L * bytes, acc, L, dtype);
}

/* Multi-head latent attention of R rows without expanding the latents: the key half of the up-projection is applied
 * to the query, the value half to the weighted latent (DeepSeek-V2, section 2.1.2, arXiv:2405.04434).
 *
 * q [R, H, N + P]; latents [num_slots, L], ropes [num_slots, P]; w [H, N + V, L]; all in `dtype`; slots, starts, ends
 * as above. out [R, H, V]. scratch holds N + P + 2 * L + V + longest list floats. A head's weights stay in the
 * processor's cache while its rows are computed.
 */
CLONES void moesaic_latent_attention(const void *q, const void *latents, const void *ropes, const void *w,
                                     const int64_t *slots, const int64_t *starts, const int64_t *ends, int64_t R,
                                     int64_t H, int64_t N, int64_t P, int64_t V, int64_t L, float scale, void *out,
                                     float *scratch, int dtype) {
    float *qf = scratch, *ql = qf + N + P, *acc = ql + L, *o = acc + L, *scores = o + V;
    for (int64_t h = 0; h < H; h++) {
        const char *wh = (const char *)w + h * (N + V) * L * (dtype == F32 ? 4 : 2);
        for (int64_t r = 0; r < R; r++) {
            size_t at = (size_t)(r * H + h);
            for (int64_t d = 0; d < N + P; d++) qf[d] = load1(q, at * (N + P) + d, dtype);
            const int64_t *row = slots + starts[r];
            int64_t n = ends[r] - starts[r];
            if (dtype == F32) latent_row(qf, latents, ropes, wh, row, n, N, P, V, L, scale, ql, acc, o, scores, F32);
            else latent_row(qf, latents, ropes, wh, row, n, N, P, V, L, scale, ql, acc, o, scores, BF16);
            store_row(out, dtype, at * V, o, V);
        }
    }
}

#include "search.h"
#include "sampling.h"

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "C kernels, called through ctypes.", -1, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
