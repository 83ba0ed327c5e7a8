// Soft-capped cross-entropy of rows of logits, and its gradient, written over the logits. Used by
// nanochat/kernels/cross_entropy.py, which also has the reference implementation. One pass over a
// row gives the sum of exp(s) and the gradient up to the division by that sum.

#include <algorithm>
#include <cmath>
#include <vector>

#include "bf16.h"
#include "softcap.h"

namespace {

inline __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline void store(float* p, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, x); }
inline __mmask16 first(int64_t n) { return n >= LANES ? 0xffff : (1u << std::max<int64_t>(n, 0)) - 1; }

// Loss of one row, and with GRADIENT its gradient. `scratch` has space for `vocab` numbers.
template <bool GRADIENT, typename T>
float row_loss(T* logits, int64_t target, int64_t width, int64_t vocab, float cap, float scale, float* scratch) {
    if (target < 0) {
        if (GRADIENT) std::fill_n(logits, width, T(0));
        return 0.0f;
    }
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < vocab; i += LANES) {
        const __mmask16 mask = first(vocab - i);
        const __m512 r = r_of(load(logits + i, mask), cap);
        const __m512 e = exp_of_capped(r, cap);
        sums = _mm512_mask_add_ps(sums, mask, sums, e);
        if (GRADIENT) _mm512_mask_storeu_ps(scratch + i, mask, _mm512_mul_ps(e, quarter_of_slope(r)));
    }
    const float sum = _mm512_reduce_add_ps(sums);
    const float r = _mm512_cvtss_f32(r_of(load(logits + target, 1), cap)), loss = std::log(sum) - cap * (1.0f - 2.0f * r);
    if (!GRADIENT) return loss;
    const __m512 factor = _mm512_set1_ps(4.0f * scale / sum);
    for (int64_t i = 0; i < width; i += LANES) {
        const __m512 g = _mm512_maskz_loadu_ps(first(vocab - i), scratch + i);  // zero in the padding
        store(logits + i, _mm512_mul_ps(g, factor), first(width - i));
    }
    store(logits + target, _mm512_set1_ps(4.0f * scale * (scratch[target] / sum - r * (1.0f - r))), 1);
    return loss;
}

template <bool GRADIENT, typename T>
int64_t rows_loss(T* logits, const int64_t* targets, float* losses, int64_t rows, int64_t width, int64_t vocab, float cap,
                  float scale) {
    int64_t wrong = 0;
#pragma omp parallel reduction(+ : wrong)
    {
        std::vector<float> scratch(GRADIENT ? vocab : 0);
#pragma omp for schedule(dynamic, 8)
        for (int64_t row = 0; row < rows; ++row) {
            if (targets[row] < -1 || targets[row] >= vocab) {
                ++wrong;
                continue;
            }
            losses[row] = row_loss<GRADIENT>(logits + row * width, targets[row], width, vocab, cap, scale, scratch.data());
        }
    }
    return wrong;
}

}  // namespace

// logits (rows, width): fp32 or bf16. With `gradient` overwritten by the gradient of the sum of the losses, times `scale`; columns
// from `vocab` on are padding and get 0. targets (rows,): -1 = ignored. losses (rows,): in nats, 0 if ignored.
// Returns the number of invalid targets; their rows are not changed.
extern "C" int64_t loss_fp32(float* logits, const int64_t* targets, float* losses, int64_t rows, int64_t width, int64_t vocab,
                             float cap, float scale, int64_t gradient) {
    return (gradient ? rows_loss<true, float> : rows_loss<false, float>)(logits, targets, losses, rows, width, vocab, cap, scale);
}
extern "C" int64_t loss_bf16(bf16* logits, const int64_t* targets, float* losses, int64_t rows, int64_t width, int64_t vocab,
                             float cap, float scale, int64_t gradient) {
    return (gradient ? rows_loss<true, bf16> : rows_loss<false, bf16>)(logits, targets, losses, rows, width, vocab, cap, scale);
}
