/* Draws one token from each row of logits, exactly, without sorting the row.
 *
 * A token's weight is exp((logit - largest) / temperature) in double; its rank goes by weight, equal weights by id. What
 * a full sort would find - the k-th token, the last one of the nucleus, the one under which the uniform number falls - is
 * found by descent through buckets of weights, largest first: only the bucket that holds it is looked into, and only a
 * last few tokens are sorted. A bucket holds a range of the bits of a positive double, whose order is that of the
 * numbers; its mass is summed in the order of ids, so that the result is a function of the row alone.
 */

typedef double d8v __attribute__((vector_size(64)));
typedef int64_t i8v __attribute__((vector_size(64)));
typedef int32_t i8v32 __attribute__((vector_size(32)));
typedef float f8v_u __attribute__((vector_size(32), aligned(4)));
typedef double d8v_u __attribute__((vector_size(64), aligned(8)));

enum { BUCKETS = 2048, KEY_SHIFT = 46, BLOCK = 1024, WAYS = 2, FEW = 48 };
#define TOP_KEY (0x3FF0000000000000 >> KEY_SHIFT) /* the first bits of 1.0, the largest weight */

/* What a row asks for; mirrors Draw of sampling.py. top_k 0, top_p 1 and min_p 0 ask for nothing. */
typedef struct {
    double temperature, top_p, min_p, uniform;
    int64_t top_k;
} Draw;

typedef struct {
    double weight;
    int64_t id;
} Item;

typedef struct {
    double mass;
    int64_t count;
} Bucket;

/* Whether any of eight lies in [low, high): by signs of differences, which the compiler keeps in vectors. */
INLINE int any8(d8v v, double low, double high) {
    typedef int64_t i4v __attribute__((vector_size(32)));
    typedef int64_t i2v __attribute__((vector_size(16)));
    i8v in = ~(i8v)(v - low) & (i8v)(v - high);
    i4v a = __builtin_shufflevector(in, in, 0, 1, 2, 3) | __builtin_shufflevector(in, in, 4, 5, 6, 7);
    i2v b = __builtin_shufflevector(a, a, 0, 1) | __builtin_shufflevector(a, a, 2, 3);
    return (b[0] | b[1]) < 0;
}

INLINE uint64_t weight_bits(double w) {
    union { double d; uint64_t u; } v = {.d = w};
    return v.u;
}

INLINE int bucket_of(double w) {
    int i = TOP_KEY - (int)(weight_bits(w) >> KEY_SHIFT);
    return i < BUCKETS - 1 ? i : BUCKETS - 1; /* the last holds all below 2^-32 */
}

/* exp of x <= 0 within 1 ulp or two; 0 below -708, NaN of NaN. */
INLINE d8v exp8(d8v x) {
    const double magic = 0x1.8p52;
    d8v n = (x * 1.4426950408889634 + magic) - magic;
    d8v r = x - n * 0x1.62e42fefa0000p-1 - n * 0x1.cf79abc9e3b3ap-40;
    d8v p = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    i8v e = (i8v)(n + (magic + 1023)) << 52; /* the low bits of n + magic are those of n */
    d8v y = p * (d8v)e;
    return (d8v)((i8v)y & ~(i8v)(x < -708.0));
}

/* n weights, n a multiple of 8, and their sum. */
INLINE double weigh(const float *logits, int64_t n, double top, double inverse, double min_p, double *w) {
    d8v sum = {0}, least = (d8v){0} + min_p;
    for (int64_t i = 0; i < n; i += 8) {
        d8v y = exp8((__builtin_convertvector(*(const f8v_u *)(logits + i), d8v) - top) * inverse);
        y = (d8v)((i8v)y & ~(i8v)(y < least));
        sum += y;
        *(d8v_u *)(w + i) = y;
    }
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

INLINE float largest_of(const float *logits, int64_t V) {
    f8v largest = (f8v){0} - INFINITY;
    int64_t i = 0;
    for (; i + 8 <= V; i += 8) {
        f8v l = *(const f8v_u *)(logits + i);
        i8v32 more = l > largest;
        largest = (f8v)(((i8v32)l & more) | ((i8v32)largest & ~more));
    }
    float top = largest[0];
    for (int j = 1; j < 8; j++) top = largest[j] > top ? largest[j] : top;
    for (; i < V; i++) top = logits[i] > top ? logits[i] : top;
    return top;
}

/* Weights w [V] of a row and their sum, of each BLOCK its own in sums; those below min_p are 0, and eight after the last. */
INLINE double fill_weights(const float *logits, int64_t V, const Draw *draw, double *w, double *sums) {
    double top = largest_of(logits, V), inverse = 1.0 / draw->temperature, total = 0;
    if (inverse > 1e300) inverse = 1e300; /* 0 times infinity would not be 0; the next float is far enough away */
    for (int64_t begin = 0; begin < V; begin += BLOCK) {
        int64_t n = V - begin < BLOCK ? V - begin : BLOCK, whole = n & ~7;
        double sum = weigh(logits + begin, whole, top, inverse, draw->min_p, w + begin);
        if (n > whole) {
            float rest[8];
            for (int j = 0; j < 8; j++) rest[j] = whole + j < n ? logits[begin + whole + j] : -INFINITY;
            sum += weigh(rest, 8, top, inverse, draw->min_p, w + begin + whole);
        }
        sums[begin / BLOCK] = sum;
        total += sum;
    }
    for (int j = 0; j < 8; j++) w[V + j] = 0;
    return total;
}

/* The first id at which the mass in the order of ids exceeds `target`, else the last with any. */
INLINE int64_t seek_by_id(const double *w, int64_t V, const double *sums, double target) {
    double mass = 0;
    int64_t block = 0, last = -1, num = (V + BLOCK - 1) / BLOCK;
    while (block < num - 1 && mass + sums[block] <= target) mass += sums[block++];
    int64_t end = (block + 1) * BLOCK < V ? (block + 1) * BLOCK : V;
    for (int64_t i = block * BLOCK; i < end; i++) {
        if (w[i] > 0) last = i;
        mass += w[i];
        if (mass > target && w[i] > 0) return i;
    }
    for (int64_t i = last < 0 ? block * BLOCK - 1 : -1; i >= 0; i--)
        if (w[i] > 0) return i;
    return last;
}

/* Where in the order of ranks something was found, and the mass up to it, itself included. */
typedef struct {
    Item item;
    double mass;
} Found;

/* What is sought: the first whose mass reaches `mass` (exceeds it, if `beyond`), or whose rank is `rank`, if not 0. */
typedef struct {
    double mass;
    int64_t rank;
    int beyond;
} Goal;

INLINE int reaches(const Goal *goal, double mass, int64_t count) {
    if (goal->rank) return count >= goal->rank;
    return goal->beyond ? mass > goal->mass : mass >= goal->mass;
}

/* A few items, or many of one weight, in the order of ids: sorted, and gone through one by one. */
static Found seek_among_few(Item *items, int64_t n, double mass, int64_t count, const Goal *goal, int sorted) {
    if (!sorted)
        for (int64_t i = 1; i < n; i++) {
            Item item = items[i];
            int64_t j = i;
            for (; j > 0 && items[j - 1].weight < item.weight; j--) items[j] = items[j - 1];
            items[j] = item;
        }
    Found found = {items[n - 1], mass};
    for (int64_t i = 0; i < n; i++) {
        if (items[i].weight <= 0) break;
        mass += items[i].weight;
        count++;
        found = (Found){items[i], mass};
        if (reaches(goal, mass, count)) break;
    }
    return found;
}

/* What is sought among items in the order of ids, after `mass` and `count` of larger ones. Changes the items. */
static Found seek_item(Item *items, int64_t n, double mass, int64_t count, const Goal *goal) {
    for (;;) {
        uint64_t first = weight_bits(items[0].weight), differing = 0;
        for (int64_t i = 1; i < n; i++) differing |= weight_bits(items[i].weight) ^ first;
        if (!differing || n <= FEW) return seek_among_few(items, n, mass, count, goal, !differing);
        int top = 63 - __builtin_clzll(differing), shift = top > 7 ? top - 7 : 0;
        Bucket buckets[256];
        memset(buckets, 0, sizeof buckets);
        for (int64_t i = 0; i < n; i++) {
            Bucket *b = &buckets[255 & ~(weight_bits(items[i].weight) >> shift)];
            b->mass += items[i].weight;
            b->count++;
        }
        int at = 0, held = -1;
        for (; at < 256; at++) {
            if (!buckets[at].count) continue;
            if (held >= 0) { mass += buckets[held].mass; count += buckets[held].count; }
            held = at;
            if (reaches(goal, mass + buckets[at].mass, count + buckets[at].count)) break;
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++)
            if ((int)(255 & ~(weight_bits(items[i].weight) >> shift)) == held) items[kept++] = items[i];
        n = kept;
    }
}

/* What is sought among weights w [V], whose buckets were filled. items: room for V. */
INLINE Found seek_by_rank(const double *w, int64_t V, const Bucket *buckets, const Goal *goal, Item *items) {
    double mass = 0;
    int64_t count = 0, n = 0;
    int held = -1;
    for (int at = 0; at < BUCKETS; at++) {
        if (!buckets[at].count) continue;
        if (held >= 0) { mass += buckets[held].mass; count += buckets[held].count; }
        held = at;
        if (reaches(goal, mass + buckets[at].mass, count + buckets[at].count)) break;
    }
    union { uint64_t u; double d; } low = {.u = (uint64_t)(TOP_KEY - held) << KEY_SHIFT};
    union { uint64_t u; double d; } high = {.u = (uint64_t)(TOP_KEY - held + 1) << KEY_SHIFT};
    if (held == BUCKETS - 1) low.d = 0;
    for (int64_t i = 0; i < V; i += 8) {
        if (!any8(*(const d8v_u *)(w + i), low.d, high.d)) continue;
        for (int64_t j = i; j < i + 8; j++)
            if (w[j] >= low.d && w[j] < high.d && w[j] > 0) items[n++] = (Item){w[j], j};
    }
    return seek_item(items, n, mass, count, goal);
}

/* Weights of at least `least`, by bucket; in WAYS at first, so that equal neighbours need not wait for each other. */
INLINE void fill_buckets(const double *w, int64_t V, double least, Bucket *buckets) {
    memset(buckets, 0, WAYS * BUCKETS * sizeof(Bucket));
    for (int64_t i = 0; i < V; i++) {
        double weight = w[i];
        if (weight < least) continue;
        Bucket *b = &buckets[(i % WAYS) * BUCKETS + bucket_of(weight)];
        b->mass += weight;
        b->count++;
    }
    for (int way = 1; way < WAYS; way++)
        for (int i = 0; i < BUCKETS; i++) {
            buckets[i].mass += buckets[way * BUCKETS + i].mass;
            buckets[i].count += buckets[way * BUCKETS + i].count;
        }
}

/* The top_k items of w in the order of ids; how many. */
INLINE int64_t keep_largest(const double *w, int64_t V, int64_t top_k, Bucket *buckets, Item *items) {
    fill_buckets(w, V, 0, buckets);
    Goal kth = {.rank = top_k};
    Item last = seek_by_rank(w, V, buckets, &kth, items).item;
    int64_t n = 0;
    for (int64_t i = 0; i < V; i += 8) {
        if (!any8(*(const d8v_u *)(w + i), last.weight, INFINITY)) continue;
        for (int64_t j = i; j < i + 8; j++)
            if (w[j] > last.weight || (w[j] == last.weight && j <= last.id)) items[n++] = (Item){w[j], j};
    }
    return n;
}

INLINE int64_t draw_token(const float *logits, int64_t V, const Draw *draw, double *w, double *sums, Item *items, Item *spare) {
    double total = fill_weights(logits, V, draw, w, sums);
    if (!(total > 0 && total < INFINITY)) return -1;
    int ranks = draw->top_k > 0 || draw->top_p < 1;
    if (!ranks) return seek_by_id(w, V, sums, draw->uniform * total);
    Bucket buckets[WAYS * BUCKETS];
    Goal nucleus = {0}, drawn = {.beyond = 1};
    if (draw->top_k > 0 && draw->top_k < V) {
        int64_t n = keep_largest(w, V, draw->top_k, buckets, items);
        total = 0;
        for (int64_t i = 0; i < n; i++) total += items[i].weight;
        if (draw->top_p < 1) {
            nucleus.mass = draw->top_p * total;
            memcpy(spare, items, n * sizeof(Item));
            total = seek_item(spare, n, 0, 0, &nucleus).mass;
        }
        drawn.mass = draw->uniform * total;
        return seek_item(items, n, 0, 0, &drawn).item.id;
    }
    /* All that is lighter than this has, together, less than what the nucleus may leave out. */
    double least = draw->top_p < 1 ? (1 - draw->top_p) * (1 - 1e-6) * total / V : 0;
    fill_buckets(w, V, least, buckets);
    if (draw->top_p < 1) {
        nucleus.mass = draw->top_p * total;
        total = seek_by_rank(w, V, buckets, &nucleus, items).mass;
    }
    drawn.mass = draw->uniform * total;
    return seek_by_rank(w, V, buckets, &drawn, items).item.id;
}

/* tokens [R]: one drawn from each of R rows of V logits, `stride` floats apart, or -1 where the row has a NaN, an
 * infinite logit or none that is allowed. room: V / BLOCK + V + 10 doubles, and 2 V items of 16 bytes.
 */
CLONES void moesaic_draw_tokens(const float *logits, int64_t stride, int64_t R, int64_t V, const Draw *draws, double *room,
                                int64_t *tokens) {
    double *sums = room, *w = room + V / BLOCK + 2;
    Item *items = (Item *)(w + V + 8), *spare = items + V;
    for (int64_t r = 0; r < R; r++)
        tokens[r] = draw_token(logits + r * stride, V, &draws[r], w, sums, items, spare);
}

/* weights [V + 8] of one row, and their sum: for who checks the draw. */
CLONES double moesaic_weights(const float *logits, int64_t V, const Draw *draw, double *weights, double *sums) {
    return fill_weights(logits, V, draw, weights, sums);
}
