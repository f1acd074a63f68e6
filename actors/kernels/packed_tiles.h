/* Products of activation rows with packed weights, for one instruction set; included once for each of them.
 *
 * ISA(name) gives this inclusion's names; ISA(block_factor) and ISA(decode32) are defined before it.
 */

/* out[r][row + a * step] = dot(weight row `row + a * step`, x row r) for W weight rows and R activation rows; n and
 * block_cols are multiples of 32. */
#ifndef PACKED_TILE
#define PACKED_TILE(W, R)                                                                                     \
    INLINE void ISA(packed_##W##x##R)(const Packed *p, size_t row, size_t step, const float *const *x,        \
                                      float *const *out, const int format) {                                  \
        f16v acc[W][R], factor[W];                                                                            \
        const char *w[W];                                                                                     \
        size_t s[W];                                                                                          \
        _Pragma("GCC unroll 8") for (int a = 0; a < W; a++) {                                                 \
            w[a] = p->data + (row + a * step) * p->row_bytes;                                                 \
            s[a] = (row + a * step) / p->block_rows * p->scale_cols;                                          \
            _Pragma("GCC unroll 4") for (int b = 0; b < R; b++) acc[a][b] = (f16v){0};                        \
        }                                                                                                     \
        enum { SEGMENT = 64 };                                                                                \
        float scales[W][SEGMENT];                                                                             \
        size_t cols = format == MXFP4 ? 32 : p->block_cols;                                                   \
        for (size_t first = 0, i = 0; first < p->scale_cols; first += SEGMENT) {                              \
            size_t count = p->scale_cols - first < SEGMENT ? p->scale_cols - first : SEGMENT;                 \
            for (int a = 0; a < W; a++) widen_scales(p, s[a] + first, count, scales[a], format);              \
            for (size_t block = 0; block < count; block++) {                                                  \
                size_t stop = format == MXFP4 || i + cols < p->n ? i + cols : p->n;                           \
                _Pragma("GCC unroll 8") for (int a = 0; a < W; a++)                                           \
                    factor[a] = ISA(block_factor)(scales[a][block], format);                                  \
                if (i % 128 == 0)                                                                             \
                    _Pragma("GCC unroll 8") for (int a = 0; a < W; a++)                                       \
                        for (int line = 0; line < (format == MXFP4 ? 1 : 2); line++)                          \
                            PREFETCH(w[a] + (format == MXFP4 ? i / 2 : i) + PREFETCH_BYTES + 64 * line);      \
                for (; i < stop; i += 32)                                                                     \
                    _Pragma("GCC unroll 8") for (int a = 0; a < W; a++) {                                     \
                        f16v first16, second16;                                                               \
                        ISA(decode32)(w[a], i, factor[a], &first16, &second16, format);                       \
                        _Pragma("GCC unroll 4") for (int b = 0; b < R; b++) {                                 \
                            acc[a][b] += first16 * *(const f16v_u *)(x[b] + i);                               \
                            acc[a][b] += second16 * *(const f16v_u *)(x[b] + i + 16);                         \
                        }                                                                                     \
                    }                                                                                         \
            }                                                                                                 \
        }                                                                                                     \
        _Pragma("GCC unroll 4") for (int b = 0; b < R; b++)                                                   \
            _Pragma("GCC unroll 2") for (int a = 0; a < W; a += 4) {                                          \
                f4v sums = sum16x4(acc[a][b], acc[a + 1][b], acc[a + 2][b], acc[a + 3][b]);                   \
                _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) out[b][row + (a + j) * step] = sums[j];   \
            }                                                                                                 \
    }
#endif
PACKED_TILE(8, 1)
PACKED_TILE(4, 1)
PACKED_TILE(4, 2)
PACKED_TILE(4, 4)

/* One weight row, any n; added in the order of the tiles. */
INLINE float ISA(packed_dot)(const Packed *p, size_t row, const float *x, const int format) {
    const char *w = p->data + row * p->row_bytes;
    size_t s = row / p->block_rows * p->scale_cols, cols = format == MXFP4 ? 32 : p->block_cols, i = 0;
    f16v acc = {0};
    for (; i + 32 <= p->n; i += 32) {
        f16v first, second;
        ISA(decode32)(w, i, ISA(block_factor)(packed_scale(p, s + i / cols, format), format), &first, &second, format);
        acc += first * *(const f16v_u *)(x + i);
        acc += second * *(const f16v_u *)(x + i + 16);
    }
    float sum = sum16(acc);
    for (; i < p->n; i++) /* FP8 only: MXFP4 rows are whole blocks */
        sum += fp8_to_float(w[i]) * packed_scale(p, s + i / cols, format) * x[i];
    return sum;
}

/* rows x [R, n] times weight rows [from, to) -> out[r][row]; streams as matvec_range does. */
INLINE void ISA(packed_range)(const Packed *p, size_t from, size_t to, const float *const *x, int R, float *const *out,
                              const int format) {
    size_t done = 0;
    if (p->n % 32 == 0) {
        size_t streams = R == 1 ? 8 : 4, step = (to - from) / streams;
        for (size_t row = from; row < from + step; row++) {
            int r = 0;
            if (R == 1) ISA(packed_8x1)(p, row, step, x, out, format);
            else {
                for (; r + 4 <= R; r += 4) ISA(packed_4x4)(p, row, step, x + r, out + r, format);
                for (; r + 2 <= R; r += 2) ISA(packed_4x2)(p, row, step, x + r, out + r, format);
                if (r < R) ISA(packed_4x1)(p, row, step, x + r, out + r, format);
            }
        }
        done = streams * step;
    }
    for (size_t row = from + done; row < to; row++)
        for (int r = 0; r < R; r++) out[r][row] = ISA(packed_dot)(p, row, x[r], format);
}

static void ISA(matvec_packed)(int format, const Packed *p, size_t from, size_t to, const float *const *x, int R,
                               float *const *out) {
    if (format == FP8) ISA(packed_range)(p, from, to, x, R, out, FP8);
    else ISA(packed_range)(p, from, to, x, R, out, MXFP4);
}
