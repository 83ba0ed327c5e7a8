// Shared by all kernels: vectors of 16 fp32 numbers from bf16 and back. nanochat/kernels/cpp_kernels.py pastes this file in place
// of `#include "bf16.h"`, as it compiles a single source text.

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

namespace {

using bf16 = uint16_t;  // the upper half of an fp32

constexpr int64_t LANES = 16;
constexpr float LOG2_E = 1.44269504f;

inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __m512 load(const bf16* p) { return widened(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(bf16* p, __m512 x) { _mm256_storeu_si256((__m256i*)p, rounded(x)); }

// Masked versions: other lanes load as zero, and are not stored.
inline __m512 load(const bf16* p, __mmask16 mask) { return widened(_mm256_maskz_loadu_epi16(mask, p)); }
inline void store(bf16* p, __m512 x, __mmask16 mask) { _mm256_mask_storeu_epi16(p, mask, rounded(x)); }

inline __m512 exp2_of(__m512 x) {
    // 2^x = 2^n * 2^r with |r| <= 1/2, where this polynomial has an error below 8e-8. Very negative x give 0.
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
    __m512 y = _mm512_set1_ps(0.00132765f);
    for (float c : {0.00967554f, 0.05550713f, 0.2402212f, 0.69314697f, 1.00000007f}) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, n);
}

}  // namespace
