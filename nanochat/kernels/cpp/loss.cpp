// Soft-capped cross-entropy of rows of logits, and its gradient, written over the logits. Used by
// nanochat/kernels/cross_entropy.py, which also has the reference implementation.
//
// With u = exp(2 z / cap) and r = 1 / (1 + u), the capped logit is s = cap tanh(z / cap) = cap (1 - 2 r) and its derivative is
// 4 r (1 - r). As |s| <= cap, exp(s) neither overflows nor underflows, so no maximum is needed: one pass over a row gives the sum
// of exp(s) and the gradient up to the division by that sum.

#include <algorithm>
#include <cmath>
#include <vector>

#include "bf16.h"

namespace {

// r = 1 / (1 + u) of logits z. Beyond the clamp it is 0 or 1 to fp32 precision. NaN stays NaN.
inline __m512 r_of(__m512 z, float cap) {
    __m512 x = _mm512_mul_ps(z, _mm512_set1_ps(2.0f * LOG2_E / cap));
    x = _mm512_max_ps(_mm512_set1_ps(-60.0f), _mm512_min_ps(_mm512_set1_ps(60.0f), x));
    const __m512 d = _mm512_add_ps(exp2_of(x), _mm512_set1_ps(1.0f));
    const __m512 r = _mm512_rcp14_ps(d);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(1.0f)), r);  // one Newton step
}

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
    const __m512 log2_cap = _mm512_set1_ps(cap * LOG2_E);
    __m512 sums = _mm512_setzero_ps();
    for (int64_t i = 0; i < vocab; i += LANES) {
        const __mmask16 mask = first(vocab - i);
        const __m512 r = r_of(load(logits + i, mask), cap);
        const __m512 e = exp2_of(_mm512_fnmadd_ps(_mm512_set1_ps(2.0f * cap * LOG2_E), r, log2_cap));
        sums = _mm512_mask_add_ps(sums, mask, sums, e);
        if (GRADIENT) _mm512_mask_storeu_ps(scratch + i, mask, _mm512_mul_ps(e, _mm512_fnmadd_ps(r, r, r)));
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
