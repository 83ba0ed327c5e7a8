// Shared by the attention kernels: their arguments, the mask, and the distribution over threads. Blocks are of 64 queries or keys.
// Pasted in like packing.h, which comes before.

#include <omp.h>

#include <cmath>

namespace {

constexpr float UNSEEN = -1e30f;  // initial maximum; finite, so that no difference is NaN

struct Strides {
    int64_t batch, token, head;
};  // in elements; the features of a head are contiguous

}  // namespace

// Arguments of both functions, as 64-bit integers. y and the gradients are contiguous (B, T, heads, D).
struct Problem {
    int64_t B, T, H, H_kv, D, window;  // window: tokens that a query sees before itself; negative: all
    Strides q, k, v, dy;
};

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The mask. Ranges are [from, to), of tokens or of blocks.

struct Range {
    int64_t from, to;
};

struct Mask {
    int64_t T, before;  // a query sees the keys query - before .. query
    explicit Mask(const Problem& p) : T(p.T), before(p.window < 0 ? p.T : std::min(p.window, p.T)) {}
    int64_t blocks() const { return (T + BLOCK - 1) / BLOCK; }

    Range keys_of(Range queries, Range within) const {
        return {std::max(within.from, queries.from - before), std::min(within.to, queries.to)};
    }
    Range queries_of(Range keys, Range within) const {
        return {std::max(within.from, keys.from), std::min(within.to, keys.to + before)};
    }
    Range key_blocks(Range query_blocks) const {
        return {std::max<int64_t>(0, query_blocks.from * BLOCK - before) / BLOCK, query_blocks.to};
    }
    Range query_blocks(Range key_blocks) const {
        return {key_blocks.from, std::min(blocks(), (key_blocks.to * BLOCK - 1 + before) / BLOCK + 1)};
    }
    bool complete(Range queries, Range keys) const { return keys.to - 1 <= queries.from && queries.to - 1 - before <= keys.from; }
    // Mask of those of the 16 queries from `query` on that see `key`.
    __mmask16 seen(int64_t query, int64_t key) const {
        int64_t first = std::clamp<int64_t>(key - query, 0, LANES);
        int64_t end = std::clamp<int64_t>(key - query + before + 1, 0, LANES);
        return (__mmask16)(((1u << end) - 1) & ~((1u << first) - 1));
    }
};

inline Range block(int64_t i) { return {i * BLOCK, (i + 1) * BLOCK}; }

struct Gradients {
    bf16 *q, *k, *v;
};

// y = x * factor, rows of D: fp32 to bf16.
inline void store_rows(const float* x, int64_t rows, int64_t D, float factor, bf16* y, int64_t stride) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < D; d += LANES)
            store(y + r * stride + d, _mm512_mul_ps(_mm512_loadu_ps(x + r * D + d), _mm512_set1_ps(factor)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads

// Run f(b, kv_head, i) for all heads and 0 <= i < parts on all threads; later parts, which see more keys and take longer, first.
template <class F>
void for_all(const Problem& p, int64_t parts, F f) {
    const int64_t heads = p.B * p.H_kv;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < heads * parts; task++) f(task % heads / p.H_kv, task % p.H_kv, parts - 1 - task / heads);
}

// Whether one task per head keeps all threads busy: the rounds take at most `most` times as long as a perfect distribution.
bool heads_suffice(const Problem& p, double most) {
    const int64_t heads = p.B * p.H_kv, threads = omp_get_max_threads(), rounds = (heads + threads - 1) / threads;
    return rounds * threads <= most * heads;
}

}  // namespace
