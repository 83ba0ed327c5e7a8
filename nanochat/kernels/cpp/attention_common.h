// Shared by the attention kernels: their arguments, packing, the mask, and the distribution over threads. Pasted in like bf16.h,
// which comes before it.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace {

typedef uint32_t __attribute__((may_alias, aligned(2))) pair;  // two neighbouring bf16

constexpr int64_t BLOCK = 64;     // queries and keys per block
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

// y[2i], y[2i + 1] = first[i], second[i]
inline void store_interleaved(void* y, __m512 first, __m512 second) {
    const __m512i order = _mm512_add_epi16(
        _mm512_set1_epi32(16 << 16), _mm512_set_epi32(0xf000f, 0xe000e, 0xd000d, 0xc000c, 0xb000b, 0xa000a, 0x90009, 0x80008,
                                                      0x70007, 0x60006, 0x50005, 0x40004, 0x30003, 0x20002, 0x10001, 0));
    _mm512_storeu_si512(y, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing a block of rows, of which those from `rows` on are zero. `pitch`: from a row of y to the next, in elements of y.

// Transpose 16 x 16 numbers of 32 bits.
inline __attribute__((always_inline)) void transpose(__m512i (&v)[LANES]) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int s = 1; s < LANES; s *= 2) {  // exchange the off-diagonal halves of every 2s x 2s square
        const __mmask16 upper = s == 1 ? 0xaaaa : s == 2 ? 0xcccc : s == 4 ? 0xf0f0 : 0xff00;
        const __m512i other = _mm512_xor_si512(lane, _mm512_set1_epi32(s));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & s)) {
                __m512i a = v[i], b = v[i + s];
                v[i] = _mm512_mask_permutexvar_epi32(a, upper, other, b);
                v[i + s] = _mm512_mask_permutexvar_epi32(b, (__mmask16)~upper, other, a);
            }
    }
}

// Pairs of rows: y[r / 2][d] = (x[r][d], x[r + 1][d])
void pack_rows(const bf16* x, int64_t stride, int64_t rows, int64_t D, pair* y, int64_t pitch) {
    const __m512i half = _mm512_cvtepu16_epi32(_mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i low = _mm512_or_si512(half, _mm512_slli_epi32(_mm512_add_epi32(half, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t r = 0; r < BLOCK; r += 2)
        for (int64_t d = 0; d < D; d += 32) {
            __m512i zero = _mm512_setzero_si512();
            __m512i first = r < rows ? _mm512_loadu_si512(x + r * stride + d) : zero;
            __m512i second = r + 1 < rows ? _mm512_loadu_si512(x + (r + 1) * stride + d) : zero;
            pair* to = y + r / 2 * pitch + d;
            _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, low, second));
            _mm512_storeu_si512(to + LANES, _mm512_permutex2var_epi16(first, high, second));
        }
}

// Pairs of features: y[d / 2][r] = (x[r][d], x[r][d + 1]), a transposition of pairs, 16 x 16 of them at a time.
void pack_features(const bf16* x, int64_t stride, int64_t rows, int64_t D, pair* y, int64_t pitch) {
    for (int64_t r = 0; r < BLOCK; r += LANES)
        for (int64_t d = 0; d < D; d += 2 * LANES) {
            __m512i v[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                v[i] = r + i < rows ? _mm512_loadu_si512(x + (r + i) * stride + d) : _mm512_setzero_si512();
            transpose(v);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) _mm512_storeu_si512(y + (d / 2 + i) * pitch + r, v[i]);
        }
}

void copy_rows(const bf16* x, int64_t stride, int64_t rows, int64_t D, bf16* y, int64_t pitch) {
    for (int64_t r = 0; r < BLOCK; r++)
        if (r < rows)
            memcpy(y + r * pitch, x + r * stride, D * sizeof(bf16));
        else
            memset(y + r * pitch, 0, D * sizeof(bf16));
}

// Scratch memory of a thread, kept for its next call, which saves page faults. Allocations are multiples of 64 bytes and aligned
// to 64 bytes.
struct Scratch {
    std::unique_ptr<char[]> memory;
    size_t size = 0, used = 0;
    void reserve(size_t bytes) {
        if (bytes + 64 > size) {
            memory.reset();
            memory.reset(new char[size = bytes + 64]);
        }
        used = -(size_t)memory.get() % 64;
    }
    template <class T> T* take(int64_t n) {
        T* here = (T*)(memory.get() + used);
        used += n * sizeof(T);
        return here;
    }
};
thread_local Scratch scratch;

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
