// Shared by the kernels that multiply bf16 matrices: packing of their factors, and memory for that. Pasted in like bf16.h, which
// comes before.

#include <algorithm>
#include <cstring>
#include <memory>

namespace {

typedef uint32_t __attribute__((may_alias, aligned(2))) pair;  // two neighbouring bf16

constexpr int64_t BLOCK = 64;  // rows that are packed at once

// A row's length in memory: no multiple of 128 bytes times a power of two, whose rows would compete for the same places in a cache.
constexpr int64_t padded(int64_t n) { return n + 32; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// y (D, 64 or more rows) = x transposed: x's rows `stride` apart, those from `rows` on zero.
void pack_transposed(const bf16* x, int64_t stride, int64_t rows, int64_t D, bf16* y, int64_t pitch) {
    for (int64_t r = 0; r < BLOCK; r += 2 * LANES)
        for (int64_t d = 0; d < D; d += LANES) {
            __m512i v[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                const bf16* at = x + (r + 2 * i) * stride + d;
                const __m256i zero = _mm256_setzero_si256();
                const __m256i first = r + 2 * i < rows ? _mm256_loadu_si256((const __m256i*)at) : zero;
                const __m256i second = r + 2 * i + 1 < rows ? _mm256_loadu_si256((const __m256i*)(at + stride)) : zero;
                v[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
            }
            transpose(v);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) _mm512_storeu_si512(y + (d + i) * pitch + r, v[i]);
        }
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

}  // namespace
