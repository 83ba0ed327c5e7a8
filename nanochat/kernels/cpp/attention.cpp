// Causal attention in bf16 for CPUs with AVX512-BF16, forward and backward, without a (T, T) matrix in memory.
//
// The algorithm is FlashAttention-2 (arXiv 2307.08691): blocks of queries against blocks of keys, scores and sums in fp32. The
// forward pass keeps a running maximum and sum per query; the backward pass recomputes the probabilities from the log-sum-exp.
//
// All matrix products use one small kernel, sum[m][n] += a[m] * b[n] over pairs. One instruction multiplies two neighbouring bf16
// of `a`, the same for all lanes, with two of each of 16 columns of `b`, and adds both products to 16 fp32 sums. So `a` can be
// read wherever its pairs are contiguous, and `b` must be packed: for each pair of the summed index, all columns.
//
// Scores are computed transposed, one row per key and one lane per query. So the maximum, sum and log-sum-exp of queries are
// plain vectors, and no sum across lanes is needed.
//
//     product                 sums over   a                             b
//     scores  = K Q^T         features    K as it is                    Q packed [D/2][queries]
//     y       = P V           keys        P packed [keys/2][queries]    V packed [keys/2][D]
//     dP      = V dY^T        features    V as it is                    dY packed [D/2][queries]
//     dV      = P^T dY        queries     P^T, a row per key            dY packed [queries/2][D]
//     dK      = dS^T Q        queries     dS^T, a row per key           Q packed [queries/2][D]
//     dQ      = dS K          keys        dS packed [keys/2][queries]   K packed [keys/2][D]
//
// Masked scores are skipped: whole blocks, and within partly masked blocks whole tiles.
//
// The order of every sum depends only on the shapes, so the bits are the same for any number of threads.

#include "bf16.h"
#include "packing.h"
#include "attention_common.h"

namespace {

constexpr int M = 4;              // rows of a tile; with 4 vectors of columns its 16 sums hide the instruction's latency
constexpr float HIDDEN = -1e38f;  // score of a masked key; below UNSEEN, so that its exp is always 0

// sum[m][n] += a[m] b[n] over `steps` pairs: a's rows are `a_row` pairs apart and its steps `a_step`, b's steps `b_step`.
template <int N>
inline __attribute__((always_inline)) void multiply(__m512 (&sum)[M][N], const pair* a, int64_t a_row, int64_t a_step,
                                                    const pair* b, int64_t b_step, int64_t steps) {
    for (int64_t s = 0; s < steps; s++, a += a_step, b += b_step) {
        __m512bh column[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) column[n] = (__m512bh)_mm512_loadu_si512(b + n * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            __m512bh x = (__m512bh)_mm512_set1_epi32(a[m * a_row]);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], x, column[n]);
        }
    }
}

// c[m][..] = scale[m] * c[m][..] + a[m] b, for M rows of D columns of c. scale == nullptr: 1.
inline void add_product(float* c, int64_t D, const float* scale, const pair* a, int64_t a_row, int64_t a_step, const pair* b,
                        int64_t steps) {
    auto columns = [&]<int N>(int64_t d) {
        __m512 sum[M][N];
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) {
                sum[m][n] = _mm512_loadu_ps(c + m * D + d + n * LANES);
                if (scale) sum[m][n] = _mm512_mul_ps(sum[m][n], _mm512_set1_ps(scale[m]));
            }
        multiply<N>(sum, a, a_row, a_step, b + d, D, steps);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) _mm512_storeu_ps(c + m * D + d + n * LANES, sum[m][n]);
    };
    int64_t d = 0;
    for (; d + 64 <= D; d += 64) columns.template operator()<4>(d);
    if (d < D) columns.template operator()<2>(d);
}

// For each tile of M keys in a block, call f<count>(key, first query) for the vectors of queries that see any of these keys.
template <class F>
inline void for_tiles(const Mask& mask, Range keys, Range queries, F f) {
    for (int64_t key = keys.from; key < keys.to; key += M) {
        Range seeing = mask.queries_of({key, key + M}, queries);
        if (seeing.from >= seeing.to) continue;
        int64_t first = (seeing.from - queries.from) / LANES, end = (seeing.to - queries.from + LANES - 1) / LANES;
        int64_t query = queries.from + first * LANES;
        switch (end - first) {
            case 1: f.template operator()<1>(key, query); break;
            case 2: f.template operator()<2>(key, query); break;
            case 3: f.template operator()<3>(key, query); break;
            case 4: f.template operator()<4>(key, query); break;
        }
    }
}

// c = scale * c + a b for a block of `rows`. The product of each tile of rows goes over the pairs that contain `visible(tile)`.
// All of these pairs were written by for_tiles, as tiles start at multiples of M and vectors at multiples of 16.
template <class F>
inline void add_products(float* c, int64_t D, const float* scale, const pair* a, int64_t a_row, int64_t a_step, const pair* b,
                         Range rows, Range summed, F visible) {
    for (int64_t r = 0; r < BLOCK; r += M) {
        const Range range = visible(Range{rows.from + r, rows.from + r + M});
        const int64_t first = (range.from - summed.from) / 2, end = (range.to - summed.from + 1) / 2;
        add_product(c + r * D, D, scale ? scale + r : nullptr, a + r * a_row + first * a_step, a_row, a_step, b + first * D,
                    end - first);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// y and lse of a range of query blocks, for all query heads that share a key head.
void forward_blocks(const Problem& p, int64_t b, int64_t kv_head, Range query_blocks, const bf16* q, const bf16* k, const bf16* v,
                    bf16* y, float* lse) {
    const Mask mask(p);
    const int64_t D = p.D, group = p.H / p.H_kv;
    const Range key_blocks = mask.key_blocks(query_blocks);
    const int64_t keys_from = key_blocks.from * BLOCK, n_keys = (key_blocks.to - key_blocks.from) * BLOCK;
    const float scale = 1 / std::sqrt((float)D);
    const __m512 to_powers = _mm512_set1_ps(scale * LOG2_E);
    scratch.reserve(n_keys * D * 4 + BLOCK * D * 6 + BLOCK * BLOCK * 6 + BLOCK * 12);
    bf16* keys = scratch.take<bf16>(n_keys * D);
    pair* values = scratch.take<pair>(n_keys / 2 * D);
    pair* queries = scratch.take<pair>(D / 2 * BLOCK);
    float* out = scratch.take<float>(BLOCK * D);
    float* scores = scratch.take<float>(BLOCK * BLOCK);
    pair* probabilities = scratch.take<pair>(BLOCK / 2 * BLOCK);
    float* largest = scratch.take<float>(BLOCK);
    float* total = scratch.take<float>(BLOCK);
    float* shrink = scratch.take<float>(BLOCK);

    for (int64_t j = key_blocks.from; j < key_blocks.to; j++) {
        int64_t at = (j * BLOCK - keys_from) * D, rows = p.T - j * BLOCK;
        copy_rows(k + b * p.k.batch + j * BLOCK * p.k.token + kv_head * p.k.head, p.k.token, rows, D, keys + at, D);
        pack_rows(v + b * p.v.batch + j * BLOCK * p.v.token + kv_head * p.v.head, p.v.token, rows, D, values + at / 2, D);
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t i = query_blocks.from; i < query_blocks.to; i++) {
            const Range these = block(i), seen = mask.key_blocks({i, i + 1});
            const int64_t rows = std::min(BLOCK, p.T - these.from);
            pack_features(q + b * p.q.batch + these.from * p.q.token + head * p.q.head, p.q.token, rows, D, queries, BLOCK);
            std::fill_n(out, BLOCK * D, 0.0f);
            std::fill_n(largest, BLOCK, UNSEEN);
            std::fill_n(total, BLOCK, 0.0f);
            for (int64_t j = seen.from; j < seen.to; j++) {
                const Range those = block(j);
                const bool complete = mask.complete(these, those);
                memcpy(shrink, largest, BLOCK * sizeof(float));
                for_tiles(mask, those, these, [&]<int N>(int64_t key, int64_t query) {
                    __m512 s[M][N] = {};
                    const int64_t column = query - these.from;
                    multiply<N>(s, (const pair*)(keys + (key - keys_from) * D), D / 2, 1, queries + column, BLOCK, D / 2);
                    for (int n = 0; n < N; n++) {
                        __m512 top = _mm512_loadu_ps(largest + column + n * LANES);
                        for (int m = 0; m < M; m++) {
                            if (!complete)
                                s[m][n] =
                                    _mm512_mask_mov_ps(_mm512_set1_ps(HIDDEN), mask.seen(query + n * LANES, key + m), s[m][n]);
                            top = _mm512_max_ps(top, s[m][n]);
                            _mm512_storeu_ps(scores + (key - those.from + m) * BLOCK + column + n * LANES, s[m][n]);
                        }
                        _mm512_storeu_ps(largest + column + n * LANES, top);
                    }
                });
                for (int64_t c = 0; c < BLOCK; c += LANES) {
                    __m512 now = _mm512_loadu_ps(largest + c), before = _mm512_loadu_ps(shrink + c);
                    __m512 factor = exp2_of(_mm512_mul_ps(_mm512_sub_ps(before, now), to_powers));
                    _mm512_storeu_ps(shrink + c, factor);
                    _mm512_storeu_ps(total + c, _mm512_mul_ps(_mm512_loadu_ps(total + c), factor));
                }
                for_tiles(mask, those, these, [&]<int N>(int64_t key, int64_t query) {
                    const int64_t column = query - these.from, row = key - those.from;
                    for (int n = 0; n < N; n++) {
                        const int64_t c = column + n * LANES;
                        const __m512 top = _mm512_loadu_ps(largest + c);
                        __m512 sum = _mm512_loadu_ps(total + c), e[M];
                        for (int m = 0; m < M; m++) {
                            const __m512 s = _mm512_loadu_ps(scores + (row + m) * BLOCK + c);
                            e[m] = exp2_of(_mm512_mul_ps(_mm512_sub_ps(s, top), to_powers));
                            sum = _mm512_add_ps(sum, e[m]);
                        }
                        for (int m = 0; m < M; m += 2)
                            store_interleaved(probabilities + (row + m) / 2 * BLOCK + c, e[m], e[m + 1]);
                        _mm512_storeu_ps(total + c, sum);
                    }
                });
                add_products(out, D, shrink, probabilities, 1, BLOCK, values + (those.from - keys_from) / 2 * D, these, those,
                             [&](Range tile) { return mask.keys_of(tile, those); });
            }
            for (int64_t r = 0; r < rows; r++) {
                const int64_t token = b * p.T + these.from + r;
                const __m512 one_over = _mm512_set1_ps(1 / total[r]);
                for (int64_t d = 0; d < D; d += LANES)
                    store(y + (token * p.H + head) * D + d, _mm512_mul_ps(_mm512_loadu_ps(out + r * D + d), one_over));
                lse[(b * p.H + head) * p.T + these.from + r] = scale * largest[r] + std::log(total[r]);
            }
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. With y = P V and delta = sum of dY * Y over the features: dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q.

// WANT_KV: dK and dV of the key blocks; `query_blocks` must be all that see them. WANT_Q: dQ of the query blocks; `key_blocks`
// must be all that they see.
template <bool WANT_KV, bool WANT_Q>
void backward_blocks(const Problem& p, int64_t b, int64_t kv_head, Range key_blocks, Range query_blocks, const bf16* q,
                     const bf16* k, const bf16* v, const bf16* y, const float* lse, const bf16* dy, Gradients d) {
    const Mask mask(p);
    const int64_t D = p.D, group = p.H / p.H_kv;
    const int64_t keys_from = key_blocks.from * BLOCK, n_keys = (key_blocks.to - key_blocks.from) * BLOCK;
    const int64_t from = query_blocks.from * BLOCK, n_queries = (query_blocks.to - query_blocks.from) * BLOCK;
    const float scale = 1 / std::sqrt((float)D);
    scratch.reserve(n_queries * (D * 12 + 8) + n_keys * D * 8 + BLOCK * D * 6 + BLOCK * BLOCK * 6);
    pair* q_features = scratch.take<pair>(n_queries * D / 2);
    pair* dy_features = scratch.take<pair>(n_queries * D / 2);
    pair* q_rows = scratch.take<pair>(n_queries * D / 2);
    pair* dy_rows = scratch.take<pair>(n_queries * D / 2);
    float* dq = scratch.take<float>(n_queries * D);
    float* exponent = scratch.take<float>(n_queries);  // the log-sum-exp in base 2
    float* delta = scratch.take<float>(n_queries);
    float* dk = scratch.take<float>(n_keys * D);
    float* dv = scratch.take<float>(n_keys * D);
    bf16* keys = scratch.take<bf16>(BLOCK * D);
    bf16* values = scratch.take<bf16>(BLOCK * D);
    pair* key_rows = scratch.take<pair>(BLOCK / 2 * D);
    bf16* P = scratch.take<bf16>(BLOCK * BLOCK);
    bf16* dS = scratch.take<bf16>(BLOCK * BLOCK);
    pair* dS_pairs = scratch.take<pair>(BLOCK / 2 * BLOCK);

    if (WANT_KV) {
        std::fill_n(dk, n_keys * D, 0.0f);
        std::fill_n(dv, n_keys * D, 0.0f);
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t i = query_blocks.from; i < query_blocks.to; i++) {
            const int64_t token = i * BLOCK, rows = std::min(BLOCK, p.T - token), at = (token - from) * D / 2;
            const bf16* q_block = q + b * p.q.batch + token * p.q.token + head * p.q.head;
            const bf16* dy_block = dy + b * p.dy.batch + token * p.dy.token + head * p.dy.head;
            pack_features(q_block, p.q.token, rows, D, q_features + at, BLOCK);
            pack_features(dy_block, p.dy.token, rows, D, dy_features + at, BLOCK);
            if (WANT_KV) {
                pack_rows(q_block, p.q.token, rows, D, q_rows + at, D);
                pack_rows(dy_block, p.dy.token, rows, D, dy_rows + at, D);
            }
            for (int64_t r = 0; r < BLOCK; r++) {
                __m512 sum = _mm512_setzero_ps();
                for (int64_t c = 0; r < rows && c < D; c += LANES)
                    sum = _mm512_fmadd_ps(load(y + ((b * p.T + token + r) * p.H + head) * D + c),
                                          load(dy_block + r * p.dy.token + c), sum);
                delta[token - from + r] = _mm512_reduce_add_ps(sum);
                exponent[token - from + r] = r < rows ? LOG2_E * lse[(b * p.H + head) * p.T + token + r] : 0;
            }
        }
        if (WANT_Q) std::fill_n(dq, n_queries * D, 0.0f);
        for (int64_t j = key_blocks.from; j < key_blocks.to; j++) {
            const Range those = block(j), seeing = mask.query_blocks({j, j + 1});
            const int64_t rows = std::min(BLOCK, p.T - those.from);
            const bf16* k_block = k + b * p.k.batch + those.from * p.k.token + kv_head * p.k.head;
            copy_rows(k_block, p.k.token, rows, D, keys, D);
            copy_rows(v + b * p.v.batch + those.from * p.v.token + kv_head * p.v.head, p.v.token, rows, D, values, D);
            if (WANT_Q) pack_rows(k_block, p.k.token, rows, D, key_rows, D);
            for (int64_t i = std::max(seeing.from, query_blocks.from); i < std::min(seeing.to, query_blocks.to); i++) {
                const Range these = block(i);
                const bool complete = mask.complete(these, those);
                const int64_t at = (these.from - from) * D / 2;
                for_tiles(mask, those, these, [&]<int N>(int64_t key, int64_t query) {
                    const int64_t column = query - these.from, row = key - those.from;
                    float kept[M][N][LANES];  // the probabilities, while the registers add up dP
                    {
                        __m512 s[M][N] = {};
                        multiply<N>(s, (const pair*)(keys + row * D), D / 2, 1, q_features + at + column, BLOCK, D / 2);
                        for (int n = 0; n < N; n++) {
                            const __m512 e = _mm512_loadu_ps(exponent + query - from + n * LANES);
                            for (int m = 0; m < M; m++) {
                                __m512 x = _mm512_fmsub_ps(s[m][n], _mm512_set1_ps(scale * LOG2_E), e);
                                x = exp2_of(_mm512_min_ps(_mm512_setzero_ps(), x));  // > 0 by rounding; a NaN stays
                                if (!complete) x = _mm512_maskz_mov_ps(mask.seen(query + n * LANES, key + m), x);
                                _mm512_storeu_ps(kept[m][n], x);
                                if (WANT_KV) store(P + (row + m) * BLOCK + column + n * LANES, x);
                            }
                        }
                    }
                    __m512 s[M][N] = {};
                    multiply<N>(s, (const pair*)(values + row * D), D / 2, 1, dy_features + at + column, BLOCK, D / 2);
                    for (int n = 0; n < N; n++) {
                        const __m512 subtract = _mm512_loadu_ps(delta + query - from + n * LANES);
                        for (int m = 0; m < M; m++) {
                            s[m][n] = _mm512_mul_ps(_mm512_sub_ps(s[m][n], subtract), _mm512_loadu_ps(kept[m][n]));
                            if (WANT_KV) store(dS + (row + m) * BLOCK + column + n * LANES, s[m][n]);
                        }
                        for (int m = 0; WANT_Q && m < M; m += 2)
                            store_interleaved(dS_pairs + (row + m) / 2 * BLOCK + column + n * LANES, s[m][n], s[m + 1][n]);
                    }
                });
                if (WANT_KV) {
                    auto visible = [&](Range tile) { return mask.queries_of(tile, these); };
                    const int64_t to = (those.from - keys_from) * D;
                    add_products(dv + to, D, nullptr, (const pair*)P, BLOCK / 2, 1, dy_rows + at, those, these, visible);
                    add_products(dk + to, D, nullptr, (const pair*)dS, BLOCK / 2, 1, q_rows + at, those, these, visible);
                }
                if (WANT_Q)
                    add_products(dq + (these.from - from) * D, D, nullptr, dS_pairs, 1, BLOCK, key_rows, these, those,
                                 [&](Range tile) { return mask.keys_of(tile, those); });
            }
        }
        if (WANT_Q) store_rows(dq, std::min(n_queries, p.T - from), D, scale, d.q + ((b * p.T + from) * p.H + head) * D, p.H * D);
    }
    if (WANT_KV) {
        const int64_t rows = std::min(n_keys, p.T - keys_from), to = ((b * p.T + keys_from) * p.H_kv + kv_head) * D;
        store_rows(dk, rows, D, scale, d.k + to, p.H_kv * D);
        store_rows(dv, rows, D, 1, d.v + to, p.H_kv * D);
    }
}

}  // namespace

extern "C" void attention_forward(const Problem* problem, const bf16* q, const bf16* k, const bf16* v, bf16* y, float* lse) {
    const Problem& p = *problem;
    const int64_t blocks = Mask(p).blocks(), parts = heads_suffice(p, 1.1) ? 1 : blocks;
    if (parts == 0) return;
    const int64_t each = blocks / parts;
    for_all(p, parts,
            [&](int64_t b, int64_t head, int64_t i) { forward_blocks(p, b, head, {i * each, (i + 1) * each}, q, k, v, y, lse); });
}

extern "C" void attention_backward(const Problem* problem, const bf16* q, const bf16* k, const bf16* v, const bf16* y,
                                   const float* lse, const bf16* dy, bf16* dq, bf16* dk, bf16* dv) {
    const Problem& p = *problem;
    const Mask mask(p);
    const int64_t blocks = mask.blocks();
    const Gradients d{dq, dk, dv};
    if (heads_suffice(p, 1.4)) {
        for_all(p, 1, [&](int64_t b, int64_t head, int64_t) {
            backward_blocks<true, true>(p, b, head, {0, blocks}, {0, blocks}, q, k, v, y, lse, dy, d);
        });
        return;
    }
    // Few heads: parallel over blocks of keys, then over blocks of queries, with 7 products instead of 5. The same sums in the
    // same order, so the same bits.
    for_all(p, blocks, [&](int64_t b, int64_t head, int64_t i) {
        backward_blocks<true, false>(p, b, head, {i, i + 1}, mask.query_blocks({i, i + 1}), q, k, v, y, lse, dy, d);
    });
    for_all(p, blocks, [&](int64_t b, int64_t head, int64_t i) {
        backward_blocks<false, true>(p, b, head, mask.key_blocks({i, i + 1}), {i, i + 1}, q, k, v, y, lse, dy, d);
    });
}
