// Gradient of a bf16 embedding table: for each row the sum over all positions of its token, in fp32, rounded once. Used by
// nanochat/kernels/embedding.py, which also has the reference implementation.
//
// Positions are sorted by token first. Then one thread sums each row in registers, in the order of the positions, and writes it
// once: the same bits for any number of threads.

#include <algorithm>
#include <vector>

#include "bf16.h"

namespace {

constexpr int BLOCK = 4;  // vectors of a row summed at a time: they fit into registers and hide the latency of the additions

// Sum columns [start, start + 16 * BLOCK) of a row, or up to its end.
void sum_columns(const bf16* grad, const int32_t* positions, int64_t count, int64_t columns, int64_t start, bf16* out) {
    __m512 sum[BLOCK];
    __mmask16 mask[BLOCK];
    for (int v = 0; v < BLOCK; v++) {
        const int64_t left = std::clamp<int64_t>(columns - start - v * LANES, 0, LANES);
        mask[v] = static_cast<__mmask16>((1u << left) - 1);
        sum[v] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < count; i++) {
        const bf16* row = grad + positions[i] * columns + start;
        for (int v = 0; v < BLOCK; v++) sum[v] = _mm512_add_ps(sum[v], load(row + v * LANES, mask[v]));
    }
    for (int v = 0; v < BLOCK; v++) store(out + start + v * LANES, sum[v], mask[v]);
}

}  // namespace

// grad (n, columns) and out (rows, columns): bf16, contiguous. idx (n,) in [0, rows). n < 2^31.
extern "C" void embedding_gradient(int64_t n, int64_t rows, int64_t columns, const bf16* grad, const int64_t* idx, bf16* out) {
    std::vector<int64_t> end(rows + 1, 0);
    std::vector<int32_t> positions(n);
    for (int64_t i = 0; i < n; i++) end[idx[i] + 1]++;
    for (int64_t r = 0; r < rows; r++) end[r + 1] += end[r];
    for (int64_t i = 0; i < n; i++) positions[end[idx[i]]++] = static_cast<int32_t>(i);  // end[r] is now the end of row r
#pragma omp parallel for schedule(dynamic, 64)
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = r ? end[r - 1] : 0;
        for (int64_t start = 0; start < columns; start += LANES * BLOCK)
            sum_columns(grad, positions.data() + first, end[r] - first, columns, start, out + r * columns);
    }
}
