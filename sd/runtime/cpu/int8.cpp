// Convolutions by Winograd's algorithm with products in 8 bits, for processors with AVX512-VNNI; and what lies between
// other such products: rounding what goes into them, the gate of a feed-forward, and scales that differ from row to row.
//
// A number is stored as q from 0 to 255, and stands for scale * (q - zero).

#include <cfloat>
#include <cmath>

#include "winograd.h"

constexpr int MIDDLE = 128;  // the zero of numbers that are rounded to as many steps above as below
using Sixteen = int32_t __attribute__((vector_size(64)));  // an array of __m512i would not stay in registers

// The nearest of the steps from -127 to 127 for each number. at: the 16 numbers from a place on; `count` is a multiple
// of 16. Returns the step, NaN if one of the numbers is.
template <class At> static float round_row(At at, uint8_t *q, long count) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 not_numbers = 0;
    for (long k = 0; k < count; k += 16) {
        most = _mm512_max_ps(most, _mm512_abs_ps(at(k)));
        not_numbers |= _mm512_cmp_ps_mask(at(k), at(k), _CMP_UNORD_Q);
    }
    const float highest = _mm512_reduce_max_ps(most), step = highest > FLT_MIN * 127 ? highest / 127 : 1;
    const __m512 factor = _mm512_set1_ps(1 / step);
    for (long k = 0; k < count; k += 16) {
        const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(at(k), factor)));
        _mm_storeu_si128(reinterpret_cast<__m128i *>(q + k), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
    }
    return not_numbers ? NAN : step;
}

// What is multiplied is rounded for each tile and point; so are the weights, for each output and point, elsewhere.
struct Convolution8 : Convolution<bf16> {
    const int8_t *factors;  // [panel][point][input / 4][PANEL][4]
    const float *scales;    // [panel][point][PANEL] of the factors
    const int32_t *begins;  // [panel][point][PANEL] of the sums, as the zero of the inputs is MIDDLE

    // u[point][tile][input] -> q, and the step of each of its rows
    void round(const bf16 *u, long count, uint8_t *q, float *steps) const {
        for (long p = 0; p < POINTS; p++)
            for (long t = p * TILES; t < p * TILES + count && counts(upsampled, p); t++)
                steps[t] = round_row([&](long k) { return widened(u + t * in + k); }, q + t * in, in);
    }

    void multiply_rows(const uint8_t *q, const float *steps, long place, float *m) const {
        const int8_t *panel = factors + place * in * PANEL;
        Sixteen sums[ROWS][4];
#pragma GCC unroll 6
        for (long r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (long n = 0; n < 4; n++) sums[r][n] = (Sixteen)_mm512_loadu_si512(begins + place * PANEL + n * 16);
        for (long k = 0; k < in; k += 4, panel += PANEL * 4) {
            __m512i w[4];
            for (long n = 0; n < 4; n++) w[n] = _mm512_loadu_si512(panel + n * 64);
#pragma GCC unroll 6
            for (long r = 0; r < ROWS; r++) {
                int32_t four;
                memcpy(&four, q + r * in + k, 4);
                for (long n = 0; n < 4; n++) sums[r][n] = (Sixteen)_mm512_dpbusd_epi32((__m512i)sums[r][n], _mm512_set1_epi32(four), w[n]);
            }
        }
#pragma GCC unroll 6
        for (long r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (long n = 0; n < 4; n++) {
                const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(steps[r]), _mm512_loadu_ps(scales + place * PANEL + n * 16));
                _mm512_store_ps(m + r * PANEL + n * 16, _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sums[r][n]), scale));
            }
    }

    void multiply(const uint8_t *q, const float *steps, long count, long panel, float *m) const {
        long place = panel * points(upsampled);
        for (long p = 0; p < POINTS; p++) {
            if (!counts(upsampled, p)) continue;
            for (long t = p * TILES; t < p * TILES + count; t += ROWS)
                multiply_rows(q + t * in, steps + t, place, m + t * PANEL);
            place++;
        }
    }

    static long memory_for(long in) { return POINTS * TILES * (in * 3 + PANEL * 4 + 4); }

    void run(char *memory, long threads) const {
        const long chunks = up(tiles(), TILES) / TILES, all = POINTS * TILES, panels = out / PANEL;
        const long groups = chunks < 2 * threads && panels >= threads ? threads : 1;  // of panels: work for all threads
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (long part = 0; part < groups * chunks; part++) {
            const long group = part / chunks, chunk = part % chunks;
            float *m = reinterpret_cast<float *>(memory + omp_get_thread_num() * memory_for(in)), *steps = m + all * PANEL;
            bf16 *u = reinterpret_cast<bf16 *>(steps + all);
            uint8_t *q = reinterpret_cast<uint8_t *>(u + all * in);
            const long first = chunk * TILES, count = tiles() - first < TILES ? tiles() - first : TILES;
            read(first, count, u);
            round(u, count, q, steps);
            for (long panel = panels * group / groups; panel < panels * (group + 1) / groups; panel++) {
                multiply(q, steps, count, panel, m);
                write(m, first, count, panel);
            }
        }
    }
};

extern "C" {

// x (batch, rows, columns, channels) -> y, which is larger by `pad` rows and columns of zeros on each side. Writes the
// scale of all numbers, NaN if one of them is not finite, and the zero to `how`. channels: a multiple of 16
void sd_int8_round(const bf16 *x, uint8_t *y, long batch, long rows, long columns, long channels, long pad, float *how,
                   long threads) {
    const long lines = batch * rows, line = columns * channels, wide = (columns + 2 * pad) * channels;
    float low = 0, high = 0;
    bool numbers = true;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : low) reduction(max : high) \
    reduction(&& : numbers)
    for (long i = 0; i < lines; i++) {
        __m512 least = _mm512_setzero_ps(), most = least;
        for (long k = i * line; k < (i + 1) * line; k += 16) {
            const __m512 a = widened(x + k);
            least = _mm512_min_ps(least, a);
            most = _mm512_max_ps(most, a);
            numbers = numbers && !_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        }
        low = fminf(low, _mm512_reduce_min_ps(least));
        high = fmaxf(high, _mm512_reduce_max_ps(most));
    }
    const float span = high - low, scale = span > FLT_MIN * 255 ? span / 255 : 1;
    const float zero = std::isfinite(span) ? roundf(-low / scale) : 0;
    how[0] = numbers && std::isfinite(span) ? scale : NAN;
    how[1] = zero;
    const __m512 factor = _mm512_set1_ps(1 / scale), shift = _mm512_set1_ps(zero);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < lines; i++) {
        uint8_t *to = y + ((i / rows) * (rows + 2 * pad) + i % rows + pad) * wide;
        memset(to, (int)zero, wide);
        for (long k = 0; k < line; k += 16) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_fmadd_ps(widened(x + i * line + k), factor, shift));
            const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(q, _mm512_setzero_si512()));
            _mm_storeu_si128(reinterpret_cast<__m128i *>(to + pad * channels + k), bytes);
        }
        if (i % rows == 0) memset(to - pad * wide, (int)zero, pad * wide);
        if (i % rows == rows - 1) memset(to + wide, (int)zero, pad * wide);
    }
}

// x times the gate -> y (rows, width), around MIDDLE, with a scale for each row; width: a multiple of 16
void sd_int8_round_rows(const bf16 *x, const bf16 *gate, uint8_t *y, float *scales, long rows, long width, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++) {
        const bf16 *from = x + i * width, *passes = gate + i * width;
        const auto at = [&](long k) { return _mm512_mul_ps(widened(from + k), widened(passes + k)); };
        scales[i] = round_row(at, y + i * width, width);
    }
}

// x (rows, width): each row times its scale, plus bias, in place; width: a multiple of 16
void sd_int8_rescale(bf16 *x, const float *scales, const float *bias, long rows, long width, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < rows; i++)
        for (long k = 0; k < width; k += 16) {
            bf16 *at = x + i * width + k;
            narrowed(at, _mm512_fmadd_ps(widened(at), _mm512_set1_ps(scales[i]), widened(bias + k)));
        }
}

// What Convolution8 needs of weights w, as in `lay_out`. memory: for each thread 16 * PANEL * in numbers
void sd_winograd_weights_int8(const float *w, int8_t *factors, float *scales, int32_t *begins, long in, long out,
                              long next_input, long next_place, long upsampled, float *memory, long threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long panel = 0; panel < out / PANEL; panel++) {
        float *plain = memory + omp_get_thread_num() * POINTS * PANEL * in;
        lay_out(w + panel * PANEL * in * 9, plain, in, PANEL, next_input, next_place, upsampled, 1);
        for (long p = 0; p < points(upsampled); p++)
            for (long n = 0; n < PANEL; n += 16) {
                const float *from = plain + p * in * PANEL + n;
                const long place = (panel * points(upsampled) + p) * PANEL;
                __m512 most = _mm512_set1_ps(FLT_MIN * 127);
                for (long k = 0; k < in; k++) most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_loadu_ps(from + k * PANEL)));
                const __m512 scale = _mm512_div_ps(most, _mm512_set1_ps(127)), factor = _mm512_div_ps(_mm512_set1_ps(1), scale);
                __m512i sum = _mm512_setzero_si512();
                for (long k = 0; k < in; k += 4) {
                    __m512i four = _mm512_setzero_si512();
                    for (int i = 0; i < 4; i++) {
                        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + (k + i) * PANEL), factor);
                        const __m512i q = _mm512_cvtps_epi32(x);
                        sum = _mm512_add_epi32(sum, q);
                        const __m512i byte = _mm512_and_epi32(q, _mm512_set1_epi32(255));
                        four = _mm512_or_epi32(four, _mm512_sllv_epi32(byte, _mm512_set1_epi32(8 * i)));
                    }
                    _mm512_storeu_si512(factors + place * in + (k * PANEL + n * 4), four);
                }
                _mm512_storeu_ps(scales + place + n, scale);
                _mm512_storeu_si512(begins + place + n, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-MIDDLE)));
            }
    }
}

// As sd_winograd_bf16.
long sd_winograd_memory_int8(long in) { return Convolution8::memory_for(in); }
void sd_winograd_int8(const bf16 *x, const int8_t *factors, const float *scales, const int32_t *begins,
                                 const bf16 *bias, bf16 *y, const long *s, char *memory, long threads) {
    Convolution8{{x, nullptr, bias, y, s[0], s[1], s[2], s[3], s[4], s[5] != 0}, factors, scales, begins}.run(memory, threads);
}
}
