// Shared by the kernels of the loss: the soft cap of logits, and exp of what it gives. Pasted in like bf16.h, which comes before.
//
// With u = exp(2 z / cap) and r = 1 / (1 + u), the capped logit is s = cap tanh(z / cap) = cap (1 - 2 r) and its derivative is
// 4 r (1 - r). As |s| <= cap, exp(s) neither overflows nor underflows, so softmax needs no maximum.

namespace {

// r of logits z. Beyond the clamp it is 0 or 1 to fp32 precision. NaN stays NaN.
inline __m512 r_of(__m512 z, float cap) {
    __m512 x = _mm512_mul_ps(z, _mm512_set1_ps(2.0f * LOG2_E / cap));
    x = _mm512_max_ps(_mm512_set1_ps(-60.0f), _mm512_min_ps(_mm512_set1_ps(60.0f), x));
    const __m512 d = _mm512_add_ps(exp2_of(x), _mm512_set1_ps(1.0f));
    const __m512 r = _mm512_rcp14_ps(d);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(1.0f)), r);  // one Newton step
}

// exp(s) = exp(cap (1 - 2 r))
inline __m512 exp_of_capped(__m512 r, float cap) {
    return exp2_of(_mm512_fnmadd_ps(_mm512_set1_ps(2.0f * cap * LOG2_E), r, _mm512_set1_ps(cap * LOG2_E)));
}

// r (1 - r): a quarter of the derivative of s
inline __m512 quarter_of_slope(__m512 r) { return _mm512_fnmadd_ps(r, r, r); }

}  // namespace
