// How fast can the processor's matrix instruction run at all? It is repeated on registers, with nothing to load, by all threads.
// Used by nanochat/benchmarks/yardsticks.py: no program can exceed that rate.

#include "bf16.h"

namespace {

constexpr int CHAINS = 16;  // additions that do not wait for each other: more than latency times throughput

#ifdef __AMX_BF16__
// 4 sums of 16 x 16, from 2 tiles of 16 x 32 and 2 of 32 x 16, as in a product that keeps its sums in tiles.
int64_t repeat_amx(int64_t rounds) {
    alignas(64) struct { uint8_t palette = 1, start = 0, unused[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
    for (int64_t i = 0; i < rounds; i++) {
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return rounds * 4 * (2 * 16 * 16 * 32);
}
#endif

int64_t repeat_avx512(int64_t rounds) {
    __m512 sum[CHAINS];
    __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);  // ones
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (int64_t i = 0; i < rounds; i++) {
        asm volatile("" : "+v"(x));  // or the compiler would take the whole loop apart
        for (auto& s : sum) s = _mm512_dpbf16_ps(s, x, x);
    }
    for (auto& s : sum) asm volatile("" : : "v"(s));
    return rounds * CHAINS * (2 * 2 * LANES);
}

}  // namespace

// Whether the compiler knows AMX.
extern "C" int knows_amx() {
#ifdef __AMX_BF16__
    return 1;
#else
    return 0;
#endif
}

// Repeats the instruction on every thread; returns the floating-point operations of all of them. `amx`: AMX's, which torch has
// asked the system for.
extern "C" int64_t repeat_matrix_instruction(int64_t rounds, int64_t amx) {
    int64_t flops = 0;
#pragma omp parallel reduction(+ : flops)
    {
#ifdef __AMX_BF16__
        flops += amx ? repeat_amx(rounds) : repeat_avx512(rounds);
#else
        flops += repeat_avx512(rounds);
#endif
    }
    return flops;
}
