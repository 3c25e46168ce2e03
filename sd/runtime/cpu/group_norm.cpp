// Group norm and the SiLU behind it in bf16, for processors with AVX512-BF16: two readings of x, one writing.
//
// Wu & He, "Group Normalization" (2018), eq. 1 and 6. x has the channels of a position side by side, so a vector holds 16
// channels; sums are those of channels, over PART positions in float and then in double, and those of groups come last.
// They are of what is left of a number less the first one of its channel: where the mean is far from zero, the square of
// the mean would take their digits. How positions are divided does not depend on the number of threads.

#include <omp.h>

#include <cmath>

#include "vectors.h"

constexpr long PART = 128;     // positions
constexpr long TOGETHER = 64;  // channels, four vectors

// x / (1 + e^-x)
static inline __m512 silu(__m512 x) {
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1), power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f))));
    return _mm512_div_ps(x, below);
}

// Sums over `count` positions of a picture, and of squares, N vectors of channels at a time.
template <int N> static void add_up(const bf16 *x, const bf16 *first, long count, long C, float *sums, float *squares) {
    __m512 start[N], sum[N], square[N];
    for (int n = 0; n < N; n++) {
        start[n] = widened(first + n * 16);
        sum[n] = square[n] = _mm512_setzero_ps();
    }
    for (long p = 0; p < count; p++)
        for (int n = 0; n < N; n++) {
            const __m512 rest = _mm512_sub_ps(widened(x + p * C + n * 16), start[n]);
            sum[n] = _mm512_add_ps(sum[n], rest);
            square[n] = _mm512_fmadd_ps(rest, rest, square[n]);
        }
    for (int n = 0; n < N; n++) {
        _mm512_storeu_ps(sums + n * 16, sum[n]);
        _mm512_storeu_ps(squares + n * 16, square[n]);
    }
}

static float number(bf16 x) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(x << 16))); }

// Floats that are needed for x (B, P, C).
extern "C" long sd_group_norm_memory(long B, long P, long C) { return B * (up(P, PART) / PART + 1) * 2 * C; }

// x and y (B, P, C), which may be the same; C a multiple of 16 and of the number of groups.
extern "C" void sd_group_norm(const bf16 *x, bf16 *y, const bf16 *weight, const bf16 *bias, long B, long P, long C,
                              long groups, float eps, float *memory, long threads) {
    const long parts = up(P, PART) / PART, width = C / groups;
    float *factors = memory + B * parts * 2 * C;  // of each picture's channels, and what is added then
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long part = 0; part < B * parts; part++) {
            const long b = part / parts, start = part % parts * PART, count = P - start < PART ? P - start : PART;
            const bf16 *first = x + b * P * C, *from = first + start * C;
            float *sums = memory + part * 2 * C, *squares = sums + C;
            long c = 0;
            for (; c + TOGETHER <= C; c += TOGETHER) add_up<4>(from + c, first + c, count, C, sums + c, squares + c);
            for (; c < C; c += 16) add_up<1>(from + c, first + c, count, C, sums + c, squares + c);
        }
#pragma omp for schedule(static)
        for (long group = 0; group < B * groups; group++) {
            const long b = group / groups, from = group % groups * width;
            double total = 0, total_squares = 0;
            for (long c = from; c < from + width; c++) {
                const double start = number(x[b * P * C + c]);
                double sum = 0, square = 0;
                for (long part = 0; part < parts; part++) {
                    sum += memory[(b * parts + part) * 2 * C + c];
                    square += memory[(b * parts + part) * 2 * C + C + c];
                }
                total += sum + P * start;
                total_squares += square + 2 * start * sum + P * start * start;
            }
            const double mean = total / (P * width), variance = total_squares / (P * width) - mean * mean;
            const double scale = 1 / std::sqrt((variance > 0 || std::isnan(variance) ? variance : 0) + eps);
            for (long c = from; c < from + width; c++) {
                factors[b * 2 * C + c] = number(weight[c]) * scale;
                factors[b * 2 * C + C + c] = number(bias[c]) - mean * scale * number(weight[c]);
            }
        }
#pragma omp for schedule(static)
        for (long part = 0; part < B * parts; part++) {
            const long b = part / parts, start = part % parts * PART, count = P - start < PART ? P - start : PART;
            const float *factor = factors + b * 2 * C, *more = factor + C;
            for (long i = (b * P + start) * C; i < (b * P + start + count) * C; i += C)
                for (long c = 0; c < C; c += 16) {
                    const __m512 z =
                        _mm512_fmadd_ps(widened(x + i + c), _mm512_loadu_ps(factor + c), _mm512_loadu_ps(more + c));
                    narrowed(y + i + c, silu(z));
                }
        }
    }
}
