// The product of a few vectors with a matrix in bf16: y (rows, N) = x (rows, K) w^T, w (N, K). Used by
// nanochat/kernels/inference.py. Generation multiplies one token at a time, so the weights' way from memory is all the work: each
// is read once, for all vectors, and nothing is packed.

#include <algorithm>

#include "bf16.h"

namespace {

constexpr int64_t PER_VECTOR = 2 * LANES;  // bf16 numbers in a register
constexpr int64_t SMALL = 1 << 18;         // elements of w that one thread multiplies before another one is awake
constexpr int64_t TASK = 1 << 14;          // elements of w that a thread takes at once

inline __m512bh pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh pairs(const bf16* p, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, p); }

// y[r][n] of one row of w and ROWS vectors. Two sums each, as one would wait for its own last addition.
template <int ROWS>
void row_product(int64_t N, int64_t K, const bf16* x, const bf16* w, bf16* y) {
    __m512 sum[ROWS][2] = {};
    int64_t k = 0;
    for (; k + 2 * PER_VECTOR <= K; k += 2 * PER_VECTOR)
        for (int i = 0; i < 2; i++) {
            const __m512bh weights = pairs(w + k + i * PER_VECTOR);
            for (int r = 0; r < ROWS; r++) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], weights, pairs(x + r * K + k + i * PER_VECTOR));
        }
    for (; k < K; k += PER_VECTOR) {
        const __mmask32 mask = K - k >= PER_VECTOR ? ~0u : (1u << (K - k)) - 1;
        const __m512bh weights = pairs(w + k, mask);
        for (int r = 0; r < ROWS; r++) sum[r][0] = _mm512_dpbf16_ps(sum[r][0], weights, pairs(x + r * K + k, mask));
    }
    for (int r = 0; r < ROWS; r++)
        store(y + r * N, _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_add_ps(sum[r][0], sum[r][1]))), 1);
}

template <int ROWS>
void product(int64_t N, int64_t K, const bf16* x, const bf16* w, bf16* y) {
    const int64_t each = std::max<int64_t>(1, TASK / std::max<int64_t>(K, 1));
#pragma omp parallel for schedule(dynamic, 1) if (N * K > SMALL)
    for (int64_t task = 0; task < (N + each - 1) / each; task++)
        for (int64_t n = task * each; n < std::min(N, (task + 1) * each); n++) row_product<ROWS>(N, K, x, w + n * K, y + n);
}

}  // namespace

// rows from 1 to 4. All contiguous.
extern "C" void matvec(int64_t rows, int64_t N, int64_t K, const bf16* x, const bf16* w, bf16* y) {
    switch (rows) {
        case 1: return product<1>(N, K, x, w, y);
        case 2: return product<2>(N, K, x, w, y);
        case 3: return product<3>(N, K, x, w, y);
        case 4: return product<4>(N, K, x, w, y);
    }
}
