// Shared by all kernels: vectors of 16 fp32 numbers from bf16 and back. nanochat/kernels/cpp_kernels.py pastes this file in place
// of `#include "bf16.h"`, as it compiles a single source text.

#include <immintrin.h>

#include <cstdint>

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

}  // namespace
