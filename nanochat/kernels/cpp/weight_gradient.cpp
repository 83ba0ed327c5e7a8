// Gradient of a linear layer's weight, dW (rows, columns) fp32 = g^T x, for the gradient g (tokens, rows) of the layer's output and
// its input x (tokens, columns), both bf16, through PyTorch's brgemm. Used by nanochat/kernels/weight_gradient.py.
//
// A task is a tile of dW. It packs what it needs of g and x, some tokens at a time, into its thread's L2 cache, and adds their
// product to the tile in fp32, in the order of the tokens: the same bits for any number of threads and any size of the tiles.

#include <omp.h>

#include "bf16.h"
#include "packing.h"
#include "brgemm.h"

namespace {

constexpr int64_t TOKENS = 512;  // per product

// Side of the tiles: the larger, the less is packed twice; but each thread needs some of them.
int64_t tile_side(int64_t rows, int64_t columns) {
    for (int64_t side : {256, 128})
        if (ceil_div(rows, side) * ceil_div(columns, side) >= 2 * omp_get_max_threads()) return side;
    return 64;
}

}  // namespace

// From a row of g or x to the next: ld_g, ld_x elements. rows must be a multiple of 16, columns of 32. add: to what is in dw.
extern "C" void weight_gradient(int64_t tokens, int64_t rows, int64_t columns, const bf16* g, int64_t ld_g, const bf16* x,
                                int64_t ld_x, float* dw, int64_t add) {
    const int64_t side = tile_side(rows, columns), across = ceil_div(columns, side), tasks = ceil_div(rows, side) * across;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t row = task / across * side, column = task % across * side;
        const int64_t m = std::min(side, rows - row), n = std::min(side, columns - column);
        scratch.reserve(m * padded(TOKENS) * sizeof(bf16) + TOKENS * n * sizeof(bf16));
        bf16* g_transposed = scratch.take<bf16>(m * padded(TOKENS));
        pair* x_rows = scratch.take<pair>(TOKENS / 2 * n);
        for (int64_t from = 0; from < tokens; from += TOKENS) {
            const int64_t count = std::min(TOKENS, ceil_div(tokens - from, BLOCK) * BLOCK);
            for (int64_t t = 0; t < count; t += BLOCK) {
                const int64_t left = tokens - from - t;
                pack_transposed(g + (from + t) * ld_g + row, ld_g, left, m, g_transposed + t, padded(TOKENS));
                pack_rows(x + (from + t) * ld_x + column, ld_x, left, n, x_rows + t / 2 * n, n);
            }
            product(m, n, count, g_transposed, padded(TOKENS), x_rows, n, dw + row * columns + column, columns, add || from);
        }
        at::native::cpublas::brgemm_release(true);
    }
    if (tokens == 0 && !add) std::fill_n(dw, rows * columns, 0.0f);
}
