// Vectors of 16 numbers, of float or of bf16 (AVX512-BF16), which are float in registers.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

static inline long up(long count, long step) { return (count + step - 1) / step * step; }

static inline __m512 widened(const float *from) { return _mm512_loadu_ps(from); }
static inline void narrowed(float *to, __m512 x) { _mm512_storeu_ps(to, x); }

#ifdef __AVX512BF16__
static inline __m512 widened(const bf16 *from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void narrowed(bf16 *to, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// Products of vectors take pairs of numbers: one pair in all places, and sixteen pairs.
static inline __m512bh everywhere(const bf16 *pair) {
    int32_t both;
    memcpy(&both, pair, 4);
    return (__m512bh)_mm512_set1_epi32(both);
}

static inline __m512bh pairs_at(const bf16 *from) { return (__m512bh)_mm512_load_si512(from); }
#endif

// 2^x: 2 to the whole part, times a polynomial in the rest, off by 1e-4 at most; bf16 is off by 2e-3.
static inline __m512 power_of_two(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
    __m512 p = _mm512_set1_ps(0.07944154f);
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.22449434f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.69604165f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0.99992520f));
    return _mm512_scalef_ps(p, x);
}
