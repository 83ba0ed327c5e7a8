// Causal attention in bf16 through PyTorch's brgemm, forward and backward, without a (T, T) matrix in memory. Same algorithm and
// arguments as attention.cpp, other units of work: large blocks, so that one call is one product of a size that AMX likes.
//
// Scores are computed transposed, a row per key and a lane per query. So the maximum, sum and log-sum-exp of queries are plain
// vectors, and two rows of probabilities, interleaved, are what a product takes as its second factor. That makes y and dQ
// transposed too; they are turned when they are stored.
//
//     product (M, N, K)                           first factor, rows of       second factor, in pairs of rows
//     S^T  = K Q^T    (keys, queries, features)   keys: K                     Q packed by features
//     y^T  = V^T P    (features, queries, keys)   features: V transposed      P^T, interleaved
//     dP^T = V dY^T   (keys, queries, features)   keys: V                     dY packed by features
//     dV   = P^T dY   (keys, features, queries)   keys: P^T                   dY packed by rows
//     dK   = dS^T Q   (keys, features, queries)   keys: dS^T                  Q packed by rows
//     dQ^T = K^T dS   (features, queries, keys)   features: K transposed      dS^T, interleaved
//
// The unit of masking is a square of 64 keys and 64 queries: those that no query sees are left out of the products, as far as
// these stay rectangles, and count as zero elsewhere.
//
// Every product has a size that depends on the shapes only, and sums are added in one order: the bits are the same for any number
// of threads.

#include "bf16.h"
#include "packing.h"
#include "attention_common.h"
#include "brgemm.h"

namespace {

constexpr int64_t FORWARD_KEYS = 512;                            // keys per forward product, with 64 queries
constexpr int64_t BACKWARD_KEYS = 128, BACKWARD_QUERIES = 256;  // per backward product
constexpr int SQUARE = BLOCK / LANES;                            // vectors in a row of a square

// y[r][d] = x[d][r] * factor[r] for r < rows <= 64: fp32 to bf16.
void store_transposed(const float* x, int64_t pitch, const float* factor, int64_t rows, int64_t D, bf16* y, int64_t stride) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t d = 0; d < D; d += LANES) {
            __m512i v[LANES];
            const __m512 by = _mm512_loadu_ps(factor + r);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                v[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(x + (d + i) * pitch + r), by));
            transpose(v);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (r + i < rows) store(y + (r + i) * stride + d, _mm512_castsi512_ps(v[i]));
        }
}

// What a square's queries see of its keys.
enum class Seen { NOTHING, PART, ALL };

Seen seen(const Mask& mask, Range queries, Range keys) {
    const Range range = mask.keys_of(queries, keys);
    return range.from >= range.to ? Seen::NOTHING : mask.complete(queries, keys) ? Seen::ALL : Seen::PART;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// The square's part of the maximum of each query.
template <bool ALL>
inline void update_largest(const Mask& mask, int64_t query, int64_t key, const float* scores, __m512 (&largest)[SQUARE]) {
    for (int64_t r = 0; r < BLOCK; r++)
        for (int n = 0; n < SQUARE; n++) {
            const __m512 s = _mm512_loadu_ps(scores + r * BLOCK + n * LANES);
            largest[n] = ALL ? _mm512_max_ps(s, largest[n])
                             : _mm512_mask_max_ps(largest[n], mask.seen(query + n * LANES, key + r), s, largest[n]);
        }
}

// The square's probabilities up to the division by their sum, interleaved, and their part of that sum.
template <bool ALL>
inline void exponentials(const Mask& mask, int64_t query, int64_t key, const float* scores, __m512 scale,
                         const __m512 (&largest)[SQUARE], pair* probabilities, __m512 (&total)[SQUARE]) {
    for (int64_t r = 0; r < BLOCK; r += 2)
        for (int n = 0; n < SQUARE; n++) {
            __m512 e[2];
            for (int i = 0; i < 2; i++) {
                const __m512 s = _mm512_loadu_ps(scores + (r + i) * BLOCK + n * LANES);
                e[i] = exp2_of(_mm512_mul_ps(_mm512_sub_ps(s, largest[n]), scale));
                if (!ALL) e[i] = _mm512_maskz_mov_ps(mask.seen(query + n * LANES, key + r + i), e[i]);
                total[n] = _mm512_add_ps(total[n], e[i]);
            }
            store_interleaved(probabilities + r / 2 * BLOCK + n * LANES, e[0], e[1]);
        }
}

// y and lse of a range of query blocks, for all query heads that share a key head.
void forward_blocks(const Problem& p, int64_t b, int64_t kv_head, Range query_blocks, const bf16* q, const bf16* k, const bf16* v,
                    bf16* y, float* lse) {
    const Mask mask(p);
    const int64_t D = p.D, group = p.H / p.H_kv;
    const Range key_blocks = mask.key_blocks(query_blocks);
    const int64_t keys_from = key_blocks.from * BLOCK, n_keys = (key_blocks.to - key_blocks.from) * BLOCK;
    const int64_t k_pitch = padded(D), v_pitch = padded(n_keys);
    const float scale = 1 / std::sqrt((float)D);
    const __m512 to_powers = _mm512_set1_ps(scale * LOG2_E);
    scratch.reserve(n_keys * k_pitch * 2 + D * v_pitch * 2 + D * BLOCK * 6 + FORWARD_KEYS * BLOCK * 6 + BLOCK * 4);
    bf16* keys = scratch.take<bf16>(n_keys * k_pitch);
    bf16* values = scratch.take<bf16>(D * v_pitch);  // transposed
    pair* queries = scratch.take<pair>(D / 2 * BLOCK);
    float* out = scratch.take<float>(D * BLOCK);  // y transposed
    float* scores = scratch.take<float>(FORWARD_KEYS * BLOCK);
    pair* probabilities = scratch.take<pair>(FORWARD_KEYS / 2 * BLOCK);
    float* one_over = scratch.take<float>(BLOCK);

    for (int64_t j = key_blocks.from; j < key_blocks.to; j++) {
        const int64_t token = j * BLOCK, at = token - keys_from, rows = p.T - token;
        copy_rows(k + b * p.k.batch + token * p.k.token + kv_head * p.k.head, p.k.token, rows, D, keys + at * k_pitch, k_pitch);
        pack_transposed(v + b * p.v.batch + token * p.v.token + kv_head * p.v.head, p.v.token, rows, D, values + at, v_pitch);
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t i = query_blocks.from; i < query_blocks.to; i++) {
            const Range these = block(i), blocks = mask.key_blocks({i, i + 1});
            const int64_t rows = std::min(BLOCK, p.T - these.from);
            pack_features(q + b * p.q.batch + these.from * p.q.token + head * p.q.head, p.q.token, rows, D, queries, BLOCK);
            __m512 largest[SQUARE], total[SQUARE];
            for (int n = 0; n < SQUARE; n++) largest[n] = _mm512_set1_ps(UNSEEN), total[n] = _mm512_setzero_ps();
            for (int64_t from = blocks.from * BLOCK; from < blocks.to * BLOCK; from += FORWARD_KEYS) {
                const int64_t count = std::min(FORWARD_KEYS, blocks.to * BLOCK - from);
                const bool first = from == blocks.from * BLOCK;
                product(count, BLOCK, D, keys + (from - keys_from) * k_pitch, k_pitch, queries, BLOCK, scores, BLOCK, false);
                __m512 before[SQUARE];
                for (int n = 0; n < SQUARE; n++) before[n] = largest[n];
                for (int64_t r = 0; r < count; r += BLOCK) {
                    const bool all = mask.complete(these, {from + r, from + r + BLOCK});
                    (all ? update_largest<true> : update_largest<false>)(mask, these.from, from + r, scores + r * BLOCK, largest);
                }
                for (int n = 0; !first && n < SQUARE; n++) {  // what came before was relative to a smaller maximum
                    const __m512 shrink = exp2_of(_mm512_mul_ps(_mm512_sub_ps(before[n], largest[n]), to_powers));
                    total[n] = _mm512_mul_ps(total[n], shrink);
                    for (int64_t d = 0; d < D; d++) {
                        float* at = out + d * BLOCK + n * LANES;
                        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), shrink));
                    }
                }
                for (int64_t r = 0; r < count; r += BLOCK) {
                    const bool all = mask.complete(these, {from + r, from + r + BLOCK});
                    (all ? exponentials<true> : exponentials<false>)(mask, these.from, from + r, scores + r * BLOCK, to_powers,
                                                                     largest, probabilities + r / 2 * BLOCK, total);
                }
                product(D, BLOCK, count, values + from - keys_from, v_pitch, probabilities, BLOCK, out, BLOCK, !first);
            }
            float sums[BLOCK], tops[BLOCK];
            for (int n = 0; n < SQUARE; n++) {
                _mm512_storeu_ps(sums + n * LANES, total[n]);
                _mm512_storeu_ps(tops + n * LANES, largest[n]);
                _mm512_storeu_ps(one_over + n * LANES, _mm512_div_ps(_mm512_set1_ps(1), total[n]));
            }
            for (int64_t r = 0; r < rows; r++)
                lse[(b * p.H + head) * p.T + these.from + r] = scale * tops[r] + std::log(sums[r]);
            store_transposed(out, BLOCK, one_over, rows, D, y + ((b * p.T + these.from) * p.H + head) * D, p.H * D);
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. With y = P V and delta = sum of dY * Y over the features: dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q.

struct Rectangle {  // of scores and what is made of them; from a row to the next: `pitch`
    float *S, *dP;
    bf16 *P, *dS;
    pair* dS_interleaved;
    static constexpr int64_t pitch = padded(BACKWARD_QUERIES);
};

// P, dS and dS interleaved of the square that begins at row `row` and column `column`. exponent: the queries' log-sum-exp, base 2.
template <bool WANT_KV, bool WANT_Q, bool ALL>
inline void square_gradient(const Mask& mask, int64_t query, int64_t key, const Rectangle& x, int64_t row, int64_t column,
                            const float* exponent, const float* delta, __m512 scale) {
    for (int n = 0; n < SQUARE; n++) {
        const __m512 subtract = _mm512_loadu_ps(exponent + n * LANES), mean = _mm512_loadu_ps(delta + n * LANES);
        for (int64_t r = 0; r < BLOCK; r += 2) {
            __m512 d[2];
            for (int i = 0; i < 2; i++) {
                const int64_t at = (row + r + i) * Rectangle::pitch + column + n * LANES;
                __m512 e = _mm512_fmsub_ps(_mm512_loadu_ps(x.S + at), scale, subtract);
                e = exp2_of(_mm512_min_ps(_mm512_setzero_ps(), e));  // > 0 by rounding; a NaN stays
                d[i] = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x.dP + at), mean), e);
                if (!ALL) {
                    const __mmask16 lanes = mask.seen(query + n * LANES, key + r + i);
                    e = _mm512_maskz_mov_ps(lanes, e), d[i] = _mm512_maskz_mov_ps(lanes, d[i]);
                }
                if (WANT_KV) store(x.P + at, e), store(x.dS + at, d[i]);
            }
            if (WANT_Q) store_interleaved(x.dS_interleaved + (row + r) / 2 * Rectangle::pitch + column + n * LANES, d[0], d[1]);
        }
    }
}

template <bool WANT_KV, bool WANT_Q>
inline void square_of_zeros(const Rectangle& x, int64_t row, int64_t column) {
    for (int64_t r = 0; r < BLOCK; r++) {
        const int64_t at = (row + r) * Rectangle::pitch + column;
        if (WANT_KV) memset(x.P + at, 0, BLOCK * sizeof(bf16)), memset(x.dS + at, 0, BLOCK * sizeof(bf16));
        if (WANT_Q && r % 2 == 0)
            memset(x.dS_interleaved + (row + r) / 2 * Rectangle::pitch + column, 0, BLOCK * sizeof(pair));
    }
}

// WANT_KV: dK and dV of a range of key units, of 128 keys; `query_units`, of 256 queries, must have all that see them. WANT_Q: dQ
// of the query units; `key_units` must have all that they see.
template <bool WANT_KV, bool WANT_Q>
void backward_units(const Problem& p, int64_t b, int64_t kv_head, Range key_units, Range query_units, const bf16* q, const bf16* k,
                    const bf16* v, const bf16* y, const float* lse, const bf16* dy, Gradients d) {
    constexpr int64_t KEYS = BACKWARD_KEYS, QUERIES = BACKWARD_QUERIES, PITCH = Rectangle::pitch;
    const Mask mask(p);
    const int64_t D = p.D, group = p.H / p.H_kv, pitch = padded(D);
    const int64_t units = query_units.to - query_units.from, first_query = query_units.from * QUERIES;
    const int64_t kept_keys = group > 1 ? (key_units.to - key_units.from) * KEYS : KEYS;  // the heads of a group add to them
    const float scale = 1 / std::sqrt((float)D);
    const __m512 to_powers = _mm512_set1_ps(scale * LOG2_E);
    const int64_t by_features = D / 2 * PITCH, by_rows = QUERIES / 2 * D;  // pairs in a packed unit of queries
    scratch.reserve(units * (by_features * 8 + by_rows * 8 + D * PITCH * 4 + QUERIES * 8) + kept_keys * D * 8 + KEYS * pitch * 4 +
                    D * padded(KEYS) * 2 + KEYS * PITCH * 14 + QUERIES * 4);
    pair* q_features = scratch.take<pair>(units * by_features);
    pair* dy_features = scratch.take<pair>(units * by_features);
    pair* q_rows = scratch.take<pair>(units * by_rows);
    pair* dy_rows = scratch.take<pair>(units * by_rows);
    float* dq = scratch.take<float>(units * D * PITCH);  // transposed
    float* exponent = scratch.take<float>(units * QUERIES);
    float* delta = scratch.take<float>(units * QUERIES);
    float* dk = scratch.take<float>(kept_keys * D);
    float* dv = scratch.take<float>(kept_keys * D);
    bf16* keys = scratch.take<bf16>(KEYS * pitch);
    bf16* values = scratch.take<bf16>(KEYS * pitch);
    bf16* keys_transposed = scratch.take<bf16>(D * padded(KEYS));
    const Rectangle x{scratch.take<float>(KEYS * PITCH), scratch.take<float>(KEYS * PITCH), scratch.take<bf16>(KEYS * PITCH),
                      scratch.take<bf16>(KEYS * PITCH), scratch.take<pair>(KEYS / 2 * PITCH)};
    float* factor = scratch.take<float>(BLOCK);
    std::fill_n(factor, BLOCK, scale);

    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t i = 0; i < units * QUERIES; i += BLOCK) {
            const int64_t token = first_query + i, rows = std::min(BLOCK, p.T - token), unit = i / QUERIES, column = i % QUERIES;
            if (rows <= 0) break;
            const bf16* q_block = q + b * p.q.batch + token * p.q.token + head * p.q.head;
            const bf16* dy_block = dy + b * p.dy.batch + token * p.dy.token + head * p.dy.head;
            pack_features(q_block, p.q.token, rows, D, q_features + unit * by_features + column, PITCH);
            pack_features(dy_block, p.dy.token, rows, D, dy_features + unit * by_features + column, PITCH);
            if (WANT_KV) {
                pack_rows(q_block, p.q.token, rows, D, q_rows + unit * by_rows + column / 2 * D, D);
                pack_rows(dy_block, p.dy.token, rows, D, dy_rows + unit * by_rows + column / 2 * D, D);
            }
            for (int64_t r = 0; r < BLOCK; r++) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t c = 0; r < rows && c < D; c += LANES)
                    sum = _mm512_fmadd_ps(load(y + ((b * p.T + token + r) * p.H + head) * D + c),
                                          load(dy_block + r * p.dy.token + c), sum);
                delta[i + r] = _mm512_reduce_add_ps(sum);
                exponent[i + r] = r < rows ? LOG2_E * lse[(b * p.H + head) * p.T + token + r] : 0;
            }
        }
        if (WANT_Q) std::fill_n(dq, units * D * PITCH, 0.0f);
        for (int64_t j = key_units.from; j < key_units.to; j++) {
            const int64_t first_key = j * KEYS, kept = group > 1 ? (j - key_units.from) * KEYS * D : 0;
            const Range key_blocks{first_key / BLOCK, std::min(mask.blocks(), (first_key + KEYS) / BLOCK)};
            const Range seeing = mask.query_blocks(key_blocks);
            for (int64_t r = 0; r < KEYS; r += BLOCK) {
                const int64_t token = first_key + r, rows = p.T - token;  // none left: zeros
                const bf16* k_block = k + b * p.k.batch + token * p.k.token + kv_head * p.k.head;
                copy_rows(k_block, p.k.token, rows, D, keys + r * pitch, pitch);
                copy_rows(v + b * p.v.batch + token * p.v.token + kv_head * p.v.head, p.v.token, rows, D, values + r * pitch, pitch);
                if (WANT_Q) pack_transposed(k_block, p.k.token, rows, D, keys_transposed + r, padded(KEYS));
            }
            bool add = head > kv_head * group;
            for (int64_t i = query_units.from; i < query_units.to; i++) {
                const int64_t from = std::max(seeing.from * BLOCK, i * QUERIES), to = std::min(seeing.to * BLOCK, (i + 1) * QUERIES);
                if (from >= to) continue;
                const int64_t n = to - from, column = from - i * QUERIES, unit = i - query_units.from;
                product(KEYS, n, D, keys, pitch, q_features + unit * by_features + column, PITCH, x.S, PITCH, false);
                product(KEYS, n, D, values, pitch, dy_features + unit * by_features + column, PITCH, x.dP, PITCH, false);
                for (int64_t r = 0; r < KEYS; r += BLOCK)
                    for (int64_t c = 0; c < n; c += BLOCK) {
                        const int64_t key = first_key + r, query = from + c, at = query - first_query;
                        switch (seen(mask, {query, query + BLOCK}, {key, key + BLOCK})) {
                            case Seen::NOTHING: square_of_zeros<WANT_KV, WANT_Q>(x, r, c); break;
                            case Seen::PART:
                                square_gradient<WANT_KV, WANT_Q, false>(mask, query, key, x, r, c, exponent + at, delta + at, to_powers);
                                break;
                            case Seen::ALL:
                                square_gradient<WANT_KV, WANT_Q, true>(mask, query, key, x, r, c, exponent + at, delta + at, to_powers);
                        }
                    }
                if (WANT_KV) {
                    product(KEYS, D, n, x.P, PITCH, dy_rows + unit * by_rows + column / 2 * D, D, dv + kept, D, add);
                    product(KEYS, D, n, x.dS, PITCH, q_rows + unit * by_rows + column / 2 * D, D, dk + kept, D, add);
                    add = true;
                }
                if (WANT_Q)
                    product(D, n, KEYS, keys_transposed, padded(KEYS), x.dS_interleaved, PITCH, dq + unit * D * PITCH + column, PITCH,
                            true);
            }
            if (WANT_KV && head == (kv_head + 1) * group - 1) {
                const int64_t rows = std::min(KEYS, p.T - first_key), at = ((b * p.T + first_key) * p.H_kv + kv_head) * D;
                store_rows(dk + kept, rows, D, scale, d.k + at, p.H_kv * D);
                store_rows(dv + kept, rows, D, 1, d.v + at, p.H_kv * D);
            }
        }
        for (int64_t i = 0; WANT_Q && i < units * QUERIES && first_query + i < p.T; i += BLOCK)
            store_transposed(dq + i / QUERIES * D * PITCH + i % QUERIES, PITCH, factor, std::min(BLOCK, p.T - first_query - i), D,
                             d.q + ((b * p.T + first_query + i) * p.H + head) * D, p.H * D);
    }
}

// Units of `size` tokens that have blocks of a range.
Range units_of(Range blocks, int64_t size) { return {blocks.from * BLOCK / size, ceil_div(blocks.to * BLOCK, size)}; }

}  // namespace

extern "C" void attention_forward(const Problem* problem, const bf16* q, const bf16* k, const bf16* v, bf16* y, float* lse) {
    const Problem& p = *problem;
    const int64_t blocks = Mask(p).blocks(), each = heads_suffice(p, 1.1) ? blocks : 4;
    if (blocks == 0) return;
    for_all(p, ceil_div(blocks, each), [&](int64_t b, int64_t head, int64_t i) {
        forward_blocks(p, b, head, {i * each, std::min(blocks, (i + 1) * each)}, q, k, v, y, lse);
        at::native::cpublas::brgemm_release(true);
    });
}

extern "C" void attention_backward(const Problem* problem, const bf16* q, const bf16* k, const bf16* v, const bf16* y,
                                   const float* lse, const bf16* dy, bf16* dq, bf16* dk, bf16* dv) {
    const Problem& p = *problem;
    const Mask mask(p);
    const int64_t key_units = ceil_div(p.T, BACKWARD_KEYS), query_units = ceil_div(p.T, BACKWARD_QUERIES);
    const int64_t blocks_of_keys = BACKWARD_KEYS / BLOCK, blocks_of_queries = BACKWARD_QUERIES / BLOCK;
    const Gradients d{dq, dk, dv};
    if (heads_suffice(p, 1.4)) {
        for_all(p, 1, [&](int64_t b, int64_t head, int64_t) {
            backward_units<true, true>(p, b, head, {0, key_units}, {0, query_units}, q, k, v, y, lse, dy, d);
            at::native::cpublas::brgemm_release(true);
        });
        return;
    }
    // Few heads: parallel over units of keys, then over units of queries, with 7 products instead of 5. The same sums in the same
    // order, so the same bits.
    for_all(p, key_units, [&](int64_t b, int64_t head, int64_t j) {
        const Range blocks{j * blocks_of_keys, std::min(mask.blocks(), (j + 1) * blocks_of_keys)};
        backward_units<true, false>(p, b, head, {j, j + 1}, units_of(mask.query_blocks(blocks), BACKWARD_QUERIES), q, k, v, y, lse,
                                    dy, d);
        at::native::cpublas::brgemm_release(true);
    });
    for_all(p, query_units, [&](int64_t b, int64_t head, int64_t i) {
        const Range blocks{i * blocks_of_queries, std::min(mask.blocks(), (i + 1) * blocks_of_queries)};
        backward_units<false, true>(p, b, head, units_of(mask.key_blocks(blocks), BACKWARD_KEYS), {i, i + 1}, q, k, v, y, lse, dy,
                                    d);
        at::native::cpublas::brgemm_release(true);
    });
}
