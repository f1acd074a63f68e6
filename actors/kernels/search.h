/* What the searching thread computes beside the engine: arrays of a few kilobytes, for which numpy's set-up of a call
 * takes longer than the numbers, and holds the interpreter lock that the engine's thread waits for.
 *
 * All floats are fp32 and arrays row-major. Shapes: T packed rows, S sequences of a step, L MoE layers, E experts of a
 * layer, K experts per token, D model dim, A moving averages, R layers that a gate speaks of.
 */

INLINE float sigmoid1(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

/* sum [E] += the probabilities of a gate's logits, in place: softmax, or sigmoid scores over their sum. */
INLINE void add_probabilities(float *logits, int64_t E, int is_sigmoid, float share, float *sum) {
    float top = logits[0], total = 0;
    for (int64_t e = 1; e < E; e++) top = logits[e] > top ? logits[e] : top;
    for (int64_t e = 0; e < E; e++) {
        logits[e] = is_sigmoid ? sigmoid1(logits[e]) : fast_exp(logits[e] - top);
        total += logits[e];
    }
    for (int64_t e = 0; e < E; e++) sum[e] += share / total * logits[e];
}

/* A gate and the one of the next layer: its matrix [D, E], or NULL for none, and bias [E] or NULL. */
typedef struct {
    int64_t E, K, D;
    int32_t is_sigmoid, next_is_sigmoid;
    const float *matrix, *bias;
} GateForm;

/* What a gate said of each sequence's rows, which begin at starts [S]: the mean of its probabilities, how many rows
 * chose each expert, and the mean of what the next layer's gate gives to the same rows. out [3, S, E] and E more to
 * compute in: probabilities, counts, ahead.
 */
CLONES void moesaic_read_gate(const GateForm *gate, const void *logits, int logits_dtype, const void *hidden,
                              int hidden_dtype, const int64_t *ids, int64_t T, const int64_t *starts, int64_t S,
                              float *out) {
    int64_t E = gate->E, K = gate->K, D = gate->D;
    const float *matrix = gate->matrix, *bias = gate->bias;
    float *scratch = out + 3 * S * E;
    memset(out, 0, 3 * S * E * sizeof(float));
    for (int64_t s = 0; s < S; s++) {
        int64_t stop = s + 1 < S ? starts[s + 1] : T;
        float *probs = out + s * E, *counts = probs + S * E, *ahead = counts + S * E, share = 1.0f / (stop - starts[s]);
        for (int64_t t = starts[s]; t < stop; t++) {
            for (int64_t e = 0; e < E; e++) scratch[e] = load1(logits, t * E + e, logits_dtype);
            add_probabilities(scratch, E, gate->is_sigmoid, share, probs);
            for (int64_t k = 0; k < K; k++) counts[ids[t * K + k]] += 1;
            if (!matrix) continue;
            for (int64_t e = 0; e < E; e++) scratch[e] = bias ? bias[e] : 0;
            for (int64_t d = 0; d < D; d++) {
                float x = load1(hidden, t * D + d, hidden_dtype);
                for (int64_t e = 0; e < E; e++) scratch[e] += x * matrix[d * E + e];
            }
            add_probabilities(scratch, E, gate->next_is_sigmoid, share, ahead);
        }
    }
}

/* weights [F, N] += features [F] / (1 + |features|^2) times errors [N], summed over S examples and times the rate: a
 * step of normalised least mean squares. Strides are in floats; the last axes are contiguous. scratch [S, F].
 */
INLINE void learn_product(float *weights, int64_t weights_f, int64_t F, int64_t N, const float *features,
                          int64_t features_s, const float *errors, int64_t errors_s, int64_t S, float rate,
                          float *scratch) {
    for (int64_t s = 0; s < S; s++) {
        const float *f = features + s * features_s;
        float energy = 1;
        for (int64_t i = 0; i < F; i++) energy += f[i] * f[i];
        for (int64_t i = 0; i < F; i++) scratch[s * F + i] = rate / energy * f[i];
    }
    for (int64_t i = 0; i < F; i++) {
        float *w = weights + i * weights_f;
        int64_t n = 0;
        for (; n + 16 <= N; n += 16) {
            f16v sum = *(const f16v_u *)(w + n);
            for (int64_t s = 0; s < S; s++) sum += scratch[s * F + i] * *(const f16v_u *)(errors + s * errors_s + n);
            *(f16v_u *)(w + n) = sum;
        }
        for (; n < N; n++)
            for (int64_t s = 0; s < S; s++) w[n] += scratch[s * F + i] * errors[s * errors_s + n];
    }
}

/* A step that NextUse follows; the fields are those of StepArrays, see next_use/kernels.py. */
typedef struct {
    int64_t S, L, A, E, R;
    float discount;
    const float *num_rows;           /* [S] */
    const float *shares, *kept;      /* [S, A], [S, L, A, E] */
    float *gates, *logs;             /* [S, L, 2 + A, E] */
    uint8_t *used;                   /* [S, L, E] */
    const float *past;               /* [S, L, E] */
    float *worth_votes;              /* [S, L, 3, E] */
    float *ahead_votes;              /* [S, L, R, 5, E] */
    float *worth, *hazards;          /* [L, E] */
    const float *nearness;           /* [L, L] of the second layer seen from the first */
    float *values;                   /* [L, E] worth times nearness */
    float *of_own;                   /* [L, (1 + A) E, E] */
    float *worth_blend;              /* [L, 3] */
    float *matrices;                 /* [L, 2 E, R E] */
    float *ahead_blend;              /* [L, R, 5] */
} StepUnderWay;

INLINE float hazard_of(float worth, float discount) { return worth * (1 - discount) / (1 - discount * worth); }
INLINE float worth_of(float hazard, float discount) { return hazard / (1 - discount * (1 - hazard)); }

/* Log odds of expert e from V votes [V, E]. */
INLINE float blended(const float *weights, const float *votes, int64_t V, int64_t E, int64_t e) {
    float logit = 0;
    for (int64_t v = 0; v < V; v++) logit += weights[v] * votes[v * E + e];
    return logit;
}

INLINE void multiply_row(const float *x, const float *matrix, int64_t F, int64_t N, float *out) {
    for (int64_t i = 0; i < F; i++)
        for (int64_t n = 0; n < N; n++) out[n] += x[i] * matrix[i * N + n];
}

/* A gate has spoken: probs, counts and ahead (or NULL) [S, E]. */
INLINE void hear(const StepUnderWay *f, int64_t row, const float *probs, const float *counts, const float *ahead) {
    int64_t E = f->E;
    for (int64_t s = 0; s < f->S; s++) {
        float *gates = f->gates + (s * f->L + row) * (2 + f->A) * E;
        uint8_t *used = f->used + (s * f->L + row) * E;
        for (int64_t e = 0; e < E; e++) {
            if (ahead) gates[e] += ahead[s * E + e] * E;
            gates[E + e] += probs[s * E + e] * E;
            used[e] = counts[s * E + e] > 0;
        }
    }
}

/* The next use of a layer's experts is now in the next step. absent [E]. */
INLINE void pass_layer(const StepUnderWay *f, int64_t row, float *absent) {
    int64_t E = f->E, A = f->A, G = 2 + A;
    for (int64_t e = 0; e < E; e++) absent[e] = 1;
    for (int64_t s = 0; s < f->S; s++) {
        int64_t at = s * f->L + row;
        float *gates = f->gates + at * G * E, *logs = f->logs + at * G * E, *votes = f->worth_votes + at * 3 * E;
        const float *kept = f->kept + at * A * E, *blend = f->worth_blend + row * 3;
        for (int64_t a = 0; a < A; a++)
            for (int64_t e = 0; e < E; e++)
                gates[(2 + a) * E + e] = f->shares[s * A + a] * gates[E + e] + kept[a * E + e];
        for (int64_t i = 0; i < G * E; i++) logs[i] = logf(gates[i]);
        multiply_row(logs + E, f->of_own + row * (1 + A) * E * E, (1 + A) * E, E, votes + E);
        for (int64_t e = 0; e < E; e++) {
            float worth = sigmoid1(blended(blend, votes, 3, E, e));
            f->worth[row * E + e] = worth; /* of one sequence */
            absent[e] *= 1 - hazard_of(worth, f->discount);
        }
    }
    for (int64_t e = 0; e < E; e++) {
        float *worth = f->worth + row * E + e;
        if (f->S > 1) *worth = worth_of(1 - absent[e], f->discount);
        f->hazards[row * E + e] = hazard_of(*worth, f->discount);
    }
}

/* Fills in the votes of what a layer's gate says of a sequence in the next ones. */
INLINE void gates_say(const StepUnderWay *f, int64_t s, int64_t row) {
    int64_t E = f->E, R = f->R;
    if (!R) return; /* a model of one layer: none follows */
    const float *logs = f->logs + (s * f->L + row) * (2 + f->A) * E;
    float *votes = f->ahead_votes + (s * f->L + row) * R * 5 * E;
    memcpy(votes + 3 * E, logs, E * sizeof(float)); /* the next gate's word speaks for the next layer only */
    for (int64_t r = 0; r < R; r++) memset(votes + (r * 5 + 4) * E, 0, E * sizeof(float));
    for (int64_t i = 0; i < 2 * E; i++) {
        const float *matrix = f->matrices + (row * 2 * E + i) * R * E;
        for (int64_t r = 0; r < R; r++)
            for (int64_t e = 0; e < E; e++) votes[(r * 5 + 4) * E + e] += logs[i] * matrix[r * E + e];
    }
}

/* What a layer's gate says of the next ones in the step. scratch [2, E]. */
INLINE void look_ahead(const StepUnderWay *f, int64_t row, float *scratch) {
    int64_t E = f->E, R = f->R;
    float *unused_by_all = scratch, *absent = scratch + E;
    for (int64_t s = 0; s < f->S; s++) gates_say(f, s, row);
    for (int64_t r = 0; r < R && row + 1 + r < f->L; r++) {
        int64_t target = row + 1 + r;
        const float *blend = f->ahead_blend + (row * R + r) * 5;
        for (int64_t e = 0; e < E; e++) unused_by_all[e] = absent[e] = 1;
        for (int64_t s = 0; s < f->S; s++) {
            const float *votes = f->ahead_votes + ((s * f->L + row) * R + r) * 5 * E;
            const float *past = f->past + (s * f->L + target) * E;
            for (int64_t e = 0; e < E; e++) {
                float unused = sigmoid1(-blended(blend, votes, 5, E, e));
                if (f->num_rows[s] != 1) unused = powf(unused, f->num_rows[s]);
                float worth = 1 - unused * (1 - f->discount * past[e]);
                unused_by_all[e] *= unused;
                absent[e] *= 1 - hazard_of(worth, f->discount);
                f->worth[target * E + e] = worth; /* of one sequence */
            }
        }
        for (int64_t e = 0; e < E; e++) {
            f->hazards[target * E + e] = 1 - unused_by_all[e];
            if (f->S > 1) f->worth[target * E + e] = worth_of(1 - absent[e], f->discount);
        }
    }
}

/* Take in what the gate of a row said. Args: is_last: of those heard by now; then the next layers are looked at and all
 * experts valued, seen from there. scratch [2, E]. */
CLONES void moesaic_follow(const StepUnderWay *f, int64_t passed, const float *probs, const float *counts,
                           const float *ahead, int is_last, float *scratch) {
    hear(f, passed, probs, counts, ahead);
    pass_layer(f, passed, scratch);
    if (!is_last) return;
    if (passed + 1 < f->L) look_ahead(f, passed, scratch);
    for (int64_t row = 0; row < f->L; row++)
        for (int64_t e = 0; e < f->E; e++)
            f->values[row * f->E + e] = f->worth[row * f->E + e] * f->nearness[passed * f->L + row];
}

/* What is learned of a step that is over; the fields are those of LessonRates and LessonArrays. X: embedding features.
 * Layers first, first + turns, ... learn; blends learn of all.
 */
typedef struct {
    int64_t X, first, turns, num_examples;
    float bias_rate, common_rate, own_rate, blend_rate, ahead_rate, ahead_blend_rate;
    const int64_t *examples;                            /* [num_examples] of S */
    const float *embedded_before, *embedded_after;      /* [S, X] */
    const float *gates_before;                          /* [S, L, (1 + A) E] */
    const float *soon_votes, *past_votes;               /* [S, L, 3, E] */
    const float *soon;                                  /* [S, L, E] */
    float *soon_bias, *soon_of_common, *soon_of_own;    /* [L, E], [X, L, E], [L, (1 + A) E, E] */
    float *worth_bias, *worth_of_common;
    float *soon_blend;                                  /* [L, 3] */
} Lesson;

/* Correct what a head said, of the examples' errors [num_examples, L, E]. scratch [num_examples, X or (1 + A) E]. */
INLINE void learn_head(const StepUnderWay *f, const Lesson *l, float *bias, float *of_common, float *of_own,
                       const float *embedded, const float *errors, float *features, float *scratch) {
    int64_t L = f->L, E = f->E, G = (1 + f->A) * E, n = l->num_examples;
    for (int64_t i = 0; i < n; i++) memcpy(features + i * l->X, embedded + l->examples[i] * l->X, l->X * sizeof(float));
    if (l->turns == 1) {
        learn_product(of_common, L * E, l->X, L * E, features, l->X, errors, L * E, n, l->common_rate, scratch);
    } else {
        for (int64_t row = l->first; row < L; row += l->turns)
            learn_product(of_common + row * E, L * E, l->X, E, features, l->X, errors + row * E, L * E, n,
                          l->common_rate, scratch);
    }
    for (int64_t row = l->first; row < L; row += l->turns) {
        for (int64_t i = 0; i < n; i++) {
            memcpy(features + i * G, l->gates_before + (l->examples[i] * L + row) * G, G * sizeof(float));
            for (int64_t e = 0; e < E; e++) bias[row * E + e] += l->bias_rate * errors[(i * L + row) * E + e];
        }
        learn_product(of_own + row * G * E, E, G, E, features, G, errors + row * E, L * E, n, l->own_rate, scratch);
    }
}

/* sums [V] += what one example's votes [V, E] and error [E] teach a blend. */
INLINE void blend_lesson(const float *votes, int64_t V, int64_t E, const float *error, float rate, float *sums) {
    for (int64_t e = 0; e < E; e++) {
        float energy = 0;
        for (int64_t v = 0; v < V; v++) energy += votes[v * E + e] * votes[v * E + e];
        float scaled = rate * error[e] / energy;
        for (int64_t v = 0; v < V; v++) sums[v] += votes[v * E + e] * scaled;
    }
}

INLINE void learn_blend(const StepUnderWay *f, const Lesson *l, float *weights, const float *votes,
                        const float *errors) {
    for (int64_t row = 0; row < f->L; row++) {
        float sums[3] = {0};
        for (int64_t i = 0; i < l->num_examples; i++)
            blend_lesson(votes + (l->examples[i] * f->L + row) * 3 * f->E, 3, f->E, errors + (i * f->L + row) * f->E,
                         l->blend_rate, sums);
        for (int p = 0; p < 3; p++) weights[row * 3 + p] += sums[p];
    }
}

/* What layers' gates said of the next ones. features, scratch [num_examples, 2 E]; errors [num_examples, R, E]. */
INLINE void learn_trajectory(const StepUnderWay *f, const Lesson *l, float *features, float *errors, float *scratch) {
    int64_t L = f->L, E = f->E, R = f->R, G = 2 + f->A, n = l->num_examples;
    for (int64_t row = l->first; row < L; row += l->turns) {
        float *matrix = f->matrices + row * 2 * E * R * E;
        for (int64_t i = 0; i < n; i++) {
            int64_t s = l->examples[i];
            memcpy(features + i * 2 * E, f->logs + (s * L + row) * G * E, 2 * E * sizeof(float));
            gates_say(f, s, row);
            for (int64_t r = 0; r < R; r++) {
                int64_t target = row + 1 + r;
                const float *blend = f->ahead_blend + (row * R + r) * 5;
                const float *votes = f->ahead_votes + ((s * L + row) * R + r) * 5 * E;
                const uint8_t *used = f->used + (s * L + target) * E;
                for (int64_t e = 0; e < E; e++) {
                    float *error = errors + (i * R + r) * E + e;
                    *error = target < L ? used[e] - sigmoid1(blended(blend, votes, 5, E, e)) : 0;
                }
            }
        }
        for (int64_t r = 0; r < R && row + 1 + r < L; r++) {
            float sums[5] = {0};
            for (int64_t i = 0; i < n; i++)
                blend_lesson(f->ahead_votes + ((l->examples[i] * L + row) * R + r) * 5 * E, 5, E,
                             errors + (i * R + r) * E, l->ahead_blend_rate, sums);
            for (int p = 0; p < 5; p++) f->ahead_blend[(row * R + r) * 5 + p] += sums[p];
        }
        learn_product(matrix, R * E, 2 * E, R * E, features, 2 * E, errors, R * E, n, l->ahead_rate, scratch);
    }
}

/* Errors of heads and blends, [num_examples, L, E]: of what `votes` say by the model alone, or, blended, of `said`.
 * following: the target where an expert was not used, or NULL for 0. */
INLINE void find_errors(const StepUnderWay *f, const Lesson *l, const float *votes, const float *said,
                        const float *following, float *errors) {
    int64_t L = f->L, E = f->E;
    for (int64_t i = 0; i < l->num_examples; i++)
        for (int64_t row = 0; row < L; row++) {
            int64_t from = (l->examples[i] * L + row) * E, to = (i * L + row) * E;
            for (int64_t e = 0; e < E; e++) {
                float target = f->used[from + e] ? 1 : following ? following[to + e] : 0;
                errors[to + e] = target - (said ? said[from + e] : sigmoid1(votes[from * 3 + E + e]));
            }
        }
}

/* Learn from a step that is over. scratch: num_examples times (L + max(L, R)) E + 2 max(X, (1 + A) E, 2 E). */
CLONES void moesaic_learn(const StepUnderWay *f, const Lesson *l, float *scratch) {
    int64_t L = f->L, E = f->E, n = l->num_examples, width = l->X;
    if ((1 + f->A) * E > width) width = (1 + f->A) * E;
    if (2 * E > width) width = 2 * E;
    float *following = scratch, *errors = following + n * L * E, *features = errors + n * (L > f->R ? L : f->R) * E;
    float *rest = features + n * width;
    for (int64_t i = 0; i < n; i++)
        for (int64_t row = 0; row < L; row++) {
            const float *votes = f->worth_votes + (l->examples[i] * L + row) * 3 * E;
            for (int64_t e = 0; e < E; e++)
                following[(i * L + row) * E + e] =
                    f->discount * sigmoid1(blended(f->worth_blend + row * 3, votes, 3, E, e));
        }
    find_errors(f, l, l->past_votes, NULL, following, errors);
    learn_head(f, l, l->worth_bias, l->worth_of_common, f->of_own, l->embedded_before, errors, features, rest);
    find_errors(f, l, l->past_votes, f->past, following, errors);
    learn_blend(f, l, f->worth_blend, l->past_votes, errors);
    find_errors(f, l, l->soon_votes, NULL, NULL, errors);
    learn_head(f, l, l->soon_bias, l->soon_of_common, l->soon_of_own, l->embedded_after, errors, features, rest);
    find_errors(f, l, l->soon_votes, l->soon, NULL, errors);
    learn_blend(f, l, l->soon_blend, l->soon_votes, errors);
    learn_trajectory(f, l, features, errors, rest);
}
