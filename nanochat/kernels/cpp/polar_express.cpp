// Products of matrices that are known to be symmetric: out (m, m) = alpha x y^T + beta added, for x, y (m, k) and `added` (m, m), all
// bf16, through PyTorch's brgemm. Only the blocks on and below the diagonal are computed; the others are their transposes. Used by
// nanochat/kernels/polar_express.py.
//
// A task is a strip of SIDE columns of one matrix, from the diagonal down. Sums are fp32, in the order of k: the same bits for any
// number of threads.

#include "bf16.h"
#include "packing.h"
#include "brgemm.h"

namespace {

constexpr int64_t SIDE = BLOCK;  // columns of a strip
constexpr int64_t INNER = 512;   // of k, per product

struct Problem {
    int64_t m, k;
    const bf16 *x, *y, *added;
    float alpha, beta;
    bf16* out;
};

// 16 x 16 sums, from row and column of the strip, to `out` and to its transpose. `column` counts in the matrix, as `row` does.
void store_block(const Problem& p, const float* sums, int64_t row, int64_t column) {
    const __m512 alpha = _mm512_set1_ps(p.alpha), beta = _mm512_set1_ps(p.beta);
    __m512i v[LANES], mirrored[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(sums + i * SIDE), alpha);
        if (p.added) value = _mm512_fmadd_ps(load(p.added + (row + i) * p.m + column), beta, value);
        v[i] = mirrored[i] = _mm512_castps_si512(value);
    }
    transpose(mirrored);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        // On the diagonal both triangles were computed; above it the mirrored values count.
        const __mmask16 above = row == column ? 0xfffe << i : 0;
        store(p.out + (row + i) * p.m + column, _mm512_castsi512_ps(_mm512_mask_mov_epi32(v[i], above, mirrored[i])));
        if (row != column) store(p.out + (column + i) * p.m + row, _mm512_castsi512_ps(mirrored[i]));
    }
}

void compute_strip(const Problem& p, int64_t first) {
    const int64_t rows = p.m - first, width = std::min(SIDE, rows);
    scratch.reserve(INNER / 2 * SIDE * sizeof(pair) + rows * SIDE * sizeof(float));
    pair* packed = scratch.take<pair>(INNER / 2 * SIDE);
    float* sums = scratch.take<float>(rows * SIDE);
    for (int64_t from = 0; from < p.k; from += INNER) {
        const int64_t count = std::min(INNER, p.k - from);
        pack_features(p.y + first * p.k + from, p.k, width, count, packed, SIDE);
        product(rows, SIDE, count, p.x + first * p.k + from, p.k, packed, SIDE, sums, SIDE, from > 0);
    }
    for (int64_t row = 0; row < rows; row += LANES)
        for (int64_t column = 0; column < width && column <= row; column += LANES)
            store_block(p, sums + row * SIDE + column, first + row, first + column);
}

}  // namespace

// For each of `count` matrices, one after the other in memory. m must be a multiple of 16, k of 32; `added` may be null.
extern "C" void symmetric_product(int64_t count, int64_t m, int64_t k, const bf16* x, const bf16* y, const bf16* added, float alpha,
                                  float beta, bf16* out) {
    const int64_t strips = ceil_div(m, SIDE);
#pragma omp parallel
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * strips; task++) {
            const int64_t i = task % count, strip = task / count;  // the longest strips first
            compute_strip({m, k, x + i * m * k, y + i * m * k, added ? added + i * m * m : nullptr, alpha, beta, out + i * m * m},
                          strip * SIDE);
        }
        at::native::cpublas::brgemm_release(true);
    }
}
