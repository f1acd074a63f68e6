/* Products with weights that are not plain row-major floats: FP8 blocks, MXFP4 blocks, transposed matrices.
 *
 * Packed weights are decoded in registers while they are multiplied, so memory carries only the stored bytes. The
 * decoded weight is the stored value times its scale, rounded once to fp32: what a dequantised fp32 copy would hold.
 * As everywhere here, one output is summed in an order that depends on the row's length alone.
 *
 * Included by native.c after its vector types. The product itself is in packed_tiles.h. Formats:
 *   FP8    e4m3 [rows, n], one scale per block_rows x block_cols weights. The two NaN codes, which quantisers do not
 *          write, read as 480.
 *   MXFP4  OCP Microscaling: blocks of 32 e2m1 codes in 16 bytes (even columns in the low nibbles), one e8m0 exponent
 *          each. Activation rows must have been through `split_blocks`: 16 even columns, then 16 odd ones.
 */

typedef int8_t i8x16_u __attribute__((vector_size(16), aligned(1)));
typedef uint8_t u8x16_u __attribute__((vector_size(16), aligned(1)));
typedef int16_t s16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int32_t i16v __attribute__((vector_size(64)));

typedef struct {
    const char *data, *scales;
    size_t n, row_bytes, block_rows, block_cols, scale_cols;
    int scale_dtype;
} Packed;

INLINE f16v broadcast16(float v) {
    return v - (f16v){0};
}

INLINE f16v e2m1_values(void) {
    return (f16v){0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
}

/* 2^(exponent - 127) */
INLINE float e8m0_to_float(uint8_t exponent) {
    uint32_t bits = (uint32_t)exponent << 23;
    union { uint32_t u; float f; } v = {.u = bits > 0x00400000u ? bits : 0x00400000u}; /* 2^-127 is subnormal */
    return v.f;
}

INLINE float fp8_to_float(char code) {
    union { uint32_t u; float f; } v = {.u = (uint32_t)((int32_t)(int8_t)code << 20) & 0x87f00000u};
    return v.f * 0x1p120f; /* exponent bias 127 - 7 */
}

INLINE float packed_scale(const Packed *p, size_t at, const int format) {
    return format == FP8 ? load1(p->scales, at, p->scale_dtype) : e8m0_to_float(((const uint8_t *)p->scales)[at]);
}

/* Scales of `count` blocks as floats: taken out of the tile's loop, where they would cost as much as its products. */
INLINE void widen_scales(const Packed *p, size_t at, size_t count, float *scales, const int format) {
    for (size_t i = 0; i < count; i++) scales[i] = packed_scale(p, at + i, format);
}

/* decode32: weights of columns [i, i + 32), as i .. i + 15 and i + 16 .. i + 31; for MXFP4 the even and the odd ones.
 * factor: what block_factor made of the block's scale. Every instruction set decodes to the same bits. Decoding never
 * multiplies a subnormal number, which takes a hundred cycles on many processors. */
INLINE f16v block_factor_any(float scale, const int format) {
    (void)format;
    return broadcast16(scale);
}

INLINE f16v e2m1_to_float16(u16v code) {
    u16v magnitude = code & 7, small = (u16v)(magnitude < 2);
    u16v bits = (small & -magnitude & 0x3f000000) | (~small & ((magnitude << 22) + 0x3f000000));
    return (f16v)(bits | (code & 8) << 28);
}

INLINE f16v e4m3_to_float16(u16v code) {
    u16v magnitude = code & 0x7f, small = (u16v)(magnitude < 8);
    u16v bits = (magnitude << 20) + (small & 0x00800000) + 0x3c000000;
    f16v value = (f16v)bits - (f16v)(small & 0x3c800000); /* small: 2^-6 * (1 + m / 8) - 2^-6 */
    return (f16v)((u16v)value | (code & 0x80) << 24);
}

INLINE void decode32_any(const char *w, size_t i, f16v factor, f16v *first, f16v *second, const int format) {
    if (format == FP8) {
        for (int half = 0; half < 2; half++) {
            u16x16 code = __builtin_convertvector(*(const u8x16_u *)(w + i + 16 * half), u16x16);
            *(half ? second : first) = e4m3_to_float16(__builtin_convertvector(code, u16v)) * factor;
        }
    } else {
        u16v code = __builtin_convertvector(__builtin_convertvector(*(const u8x16_u *)(w + i / 2), u16x16), u16v);
        *first = e2m1_to_float16(code & 15) * factor;
        *second = e2m1_to_float16(code >> 4) * factor;
    }
}

#define ISA(name) name##_any
#include "packed_tiles.h"
#undef ISA

#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
INLINE f16v join8(__m256 a, __m256 b) {
    return __builtin_shufflevector((f8v)a, (f8v)b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/* e4m3 as half precision is 2^8 times too small, of which the factor takes care. */
INLINE f16v block_factor_v3(float scale, const int format) {
    __m256 factor = _mm256_set1_ps(format == FP8 ? scale * 256 : scale * 0.5f); /* GCC 12 makes sixteen steps of it */
    return join8(factor, factor);
}

INLINE f16v bytes_to_float16_v3(__m128i v) {
    return join8(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))));
}

INLINE f16v e4m3_to_half16_v3(const char *w) {
    __m256i code = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
    __m256i half = _mm256_and_si256(_mm256_slli_epi16(code, 7), _mm256_set1_epi16((short)0xbf80));
    return join8(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)));
}

INLINE void decode32_v3(const char *w, size_t i, f16v factor, f16v *first, f16v *second, const int format) {
    if (format == FP8) {
        *first = e4m3_to_half16_v3(w + i) * factor;
        *second = e4m3_to_half16_v3(w + i + 16) * factor;
    } else {
        const __m128i twice = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
        __m128i codes = _mm_loadu_si128((const __m128i *)(w + i / 2)), low = _mm_set1_epi8(15);
        *first = bytes_to_float16_v3(_mm_shuffle_epi8(twice, _mm_and_si128(codes, low))) * factor;
        *second = bytes_to_float16_v3(_mm_shuffle_epi8(twice, _mm_and_si128(_mm_srli_epi16(codes, 4), low))) * factor;
    }
}

#define ISA(name) name##_v3
#include "packed_tiles.h"
#undef ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
/* MXFP4: the sixteen values times the scale, looked up by code. */
INLINE f16v block_factor_v4(float scale, const int format) {
    if (format == FP8) return (f16v)_mm512_set1_ps(scale * 256);
    return e2m1_values() * (f16v)_mm512_set1_ps(scale);
}

INLINE void decode32_v4(const char *w, size_t i, f16v factor, f16v *first, f16v *second, const int format) {
    if (format == FP8) {
        __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(w + i)));
        __m512i half = _mm512_and_si512(_mm512_slli_epi16(code, 7), _mm512_set1_epi16((short)0xbf80));
        *first = (f16v)_mm512_cvtph_ps(_mm512_castsi512_si256(half)) * factor;
        *second = (f16v)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)) * factor;
    } else { /* the permutation looks at four bits of an index */
        __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(w + i / 2)));
        *first = (f16v)_mm512_permutexvar_ps(codes, (__m512)factor);
        *second = (f16v)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), (__m512)factor);
    }
}

#define ISA(name) name##_v4
#include "packed_tiles.h"
#undef ISA
#pragma GCC pop_options

static int isa_level(void) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 4;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") ? 3 : 0;
}
#else
#define matvec_packed_v3 matvec_packed_any
#define matvec_packed_v4 matvec_packed_any
static int isa_level(void) { return 0; }
#endif

static void matvec_packed(int format, int isa_limit, const Packed *p, size_t from, size_t to, const float *const *x, int R,
                          float *const *out) {
    int level = isa_level();
    if (isa_limit && level > isa_limit) level = isa_limit;
    if (level == 4) matvec_packed_v4(format, p, from, to, x, R, out);
    else if (level == 3) matvec_packed_v3(format, p, from, to, x, R, out);
    else matvec_packed_any(format, p, from, to, x, R, out);
}

/* Each 32 columns become 16 even ones, then 16 odd ones: the order in which MXFP4 codes are decoded. */
CLONES static void split_blocks(float *row, size_t n) {
    for (size_t i = 0; i < n; i += 32) {
        f16v a = *(const f16v_u *)(row + i), b = *(const f16v_u *)(row + i + 16);
        *(f16v_u *)(row + i) = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        *(f16v_u *)(row + i + 16) = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
}

/* Columns [from, from + n) of out[r] += x[r][d] * w[d][col] for K weight rows of `stride` elements and R rows. */
#define ADD_ROWS(K, R)                                                                                          \
    INLINE void add_rows_##K##x##R(const char *w, size_t stride, const float *const *x, size_t d, size_t from,  \
                                   size_t to, float *const *out, const int dtype) {                             \
        size_t bytes = dtype == F32 ? 4 : 2, c = from;                                                          \
        for (; c + 16 <= to; c += 16) {                                                                         \
            f16v acc[R];                                                                                        \
            _Pragma("GCC unroll 4") for (int b = 0; b < R; b++) acc[b] = *(const f16v_u *)(out[b] + c);         \
            _Pragma("GCC unroll 8") for (int k = 0; k < K; k++) {                                               \
                f16v wv = load16(w + (d + k) * stride * bytes, c, dtype);                                       \
                _Pragma("GCC unroll 4") for (int b = 0; b < R; b++) acc[b] += wv * x[b][d + k];                 \
            }                                                                                                   \
            _Pragma("GCC unroll 4") for (int b = 0; b < R; b++) *(f16v_u *)(out[b] + c) = acc[b];               \
        }                                                                                                       \
        for (; c < to; c++)                                                                                     \
            for (int k = 0; k < K; k++)                                                                         \
                for (int b = 0; b < R; b++) out[b][c] += load1(w + (d + k) * stride * bytes, c, dtype) * x[b][d + k]; \
    }
ADD_ROWS(8, 1)
ADD_ROWS(8, 4)
ADD_ROWS(1, 1)

/* rows x [R, n] times columns [from, to) of a matrix [n, stride] -> out[r][col]: weight rows are streamed, eight
 * together, in strips whose outputs stay in the first-level cache. */
INLINE void transposed_range(const char *w, const int dtype, size_t n, size_t stride, size_t from, size_t to,
                             const float *const *x, int R, float *const *out) {
    enum { STRIP = 1024 };
    for (size_t begin = from; begin < to; begin += STRIP) {
        size_t end = begin + STRIP < to ? begin + STRIP : to, d = 0;
        for (int r = 0; r < R; r++) memset(out[r] + begin, 0, (end - begin) * sizeof(float));
        for (; d + 8 <= n; d += 8) {
            int r = 0;
            for (; r + 4 <= R; r += 4) add_rows_8x4(w, stride, x + r, d, begin, end, out + r, dtype);
            for (; r < R; r++) add_rows_8x1(w, stride, x + r, d, begin, end, out + r, dtype);
        }
        for (; d < n; d++)
            for (int r = 0; r < R; r++) add_rows_1x1(w, stride, x + r, d, begin, end, out + r, dtype);
    }
}

CLONES static void transposed_f32(const void *w, size_t n, size_t stride, size_t from, size_t to, const float *const *x,
                                  int R, float *const *out) {
    transposed_range(w, F32, n, stride, from, to, x, R, out);
}
CLONES static void transposed_bf16(const void *w, size_t n, size_t stride, size_t from, size_t to, const float *const *x,
                                   int R, float *const *out) {
    transposed_range(w, BF16, n, stride, from, to, x, R, out);
}
CLONES static void transposed_f16(const void *w, size_t n, size_t stride, size_t from, size_t to, const float *const *x,
                                  int R, float *const *out) {
    transposed_range(w, F16, n, stride, from, to, x, R, out);
}

static void matvec_transposed(int dtype, const void *w, size_t n, size_t stride, size_t from, size_t to,
                              const float *const *x, int R, float *const *out) {
    if (dtype == F32) transposed_f32(w, n, stride, from, to, x, R, out);
    else if (dtype == BF16) transposed_bf16(w, n, stride, from, to, x, R, out);
    else transposed_f16(w, n, stride, from, to, x, R, out);
}
