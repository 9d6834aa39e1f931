/* Vectors of the machine's width, in the compilers' own extension: conversions, sums and exponentials.

   LANES floats make one vector: 16 with AVX-512, 8 with AVX, else 4 (SSE, NEON). The file is compiled on the machine
   that runs it, so the width is known here. */

#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float floats __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef int32_t integers __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2)));
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef uint8_t octets __attribute__((vector_size(LANES)));

INLINE floats splat(float value) { return value - (floats){0}; }

INLINE floats load_floats(const float *from) {
    floats vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}

INLINE void store_floats(float *to, floats vector) { memcpy(to, &vector, sizeof vector); }

/* One where the mask (all bits or none) is set, the other elsewhere. */
INLINE floats choose(integers mask, floats one, floats other) {
    return (floats)((mask & (integers)one) | (~mask & (integers)other));
}

/* Factors of a product as pairs of bfloat16: half the instructions, and products as exact as in float32. */
#define PAIRS 5
#define PAIRS_OF_INT8 6
#if defined(__AVX512BF16__) && LANES == 16
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

INLINE int64_t size_of(int dtype) {
    const int is_byte = dtype == PENSTOCK_INT8 || dtype == PENSTOCK_FLOAT8 || dtype == PAIRS_OF_INT8;
    return dtype == PENSTOCK_FLOAT32 ? 4 : is_byte ? 1 : 2;
}

/* How keys are multiplied with queries. */
INLINE int paired(int keys, int queries) {
    if (HAS_PAIRS && queries == PENSTOCK_BFLOAT16 && (keys == PENSTOCK_BFLOAT16 || keys == PENSTOCK_INT8))
        return keys == PENSTOCK_INT8 ? PAIRS_OF_INT8 : PAIRS;
    return keys;
}

/* How many elements of a row make one vector. */
INLINE int64_t step_of(int dtype) { return dtype >= PAIRS ? 2 * LANES : LANES; }

INLINE floats add_product(floats sum, floats a, floats b, int dtype) {
#if HAS_PAIRS
    if (dtype >= PAIRS)
        return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)dtype;
    return sum + a * b;
}

INLINE floats load_float16(const char *from) {
#if LANES == 16
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8 && defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__aarch64__)
    float16x4_t raw;
    memcpy(&raw, from, sizeof raw);
    return (floats)vcvt_f32_f16(raw);
#else
    halves raw;
    memcpy(&raw, from, sizeof raw);
    words bits = __builtin_convertvector(raw, words), sign = (bits & 0x8000) << 16, rest = (bits & 0x7fff) << 13;
    /* The exponents' biases differ by 112; the product is exact, for subnormal numbers too. */
    words finite = (words)((floats)rest * 0x1p112f);
    words special = (words)(rest >= (0x7c00u << 13));
    return (floats)(sign | finite | (special & (0x7f800000u | rest)));
#endif
}

/* e4m3: the exponents' biases differ by 120; the product is exact, for subnormal numbers too. There is no infinity. */
INLINE floats load_float8(const char *from) {
#if LANES == 16
    words bits = (words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#else
    octets raw;
    memcpy(&raw, from, sizeof raw);
    words bits = __builtin_convertvector(raw, words);
#endif
    words sign = (bits & 0x80) << 24, rest = (bits & 0x7f) << 20;
    words finite = (words)((floats)rest * 0x1p120f), none = (words)(rest == (0x7fu << 20)) & 0x7fc00000u;
    return (floats)(sign | finite | none);
}

INLINE floats load_vector(const char *from, int dtype) {
    if (dtype == PENSTOCK_FLOAT32 || dtype == PAIRS) {
        floats vector;
        memcpy(&vector, from, sizeof vector);
        return vector;
    }
    if (dtype == PENSTOCK_FLOAT16)
        return load_float16(from);
    if (dtype == PENSTOCK_FLOAT8)
        return load_float8(from);
    if (dtype == PENSTOCK_BFLOAT16) {
#if LANES == 16
        return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#endif
        halves raw;
        memcpy(&raw, from, sizeof raw);
        return (floats)(__builtin_convertvector(raw, words) << 16);
    }
#if HAS_PAIRS
    if (dtype == PAIRS_OF_INT8)
        return (floats)_mm512_cvtne2ps_pbh(
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + LANES)))),
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from))));
#endif
#if LANES == 16
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
#endif
    bytes raw;
    memcpy(&raw, from, sizeof raw);
    return __builtin_convertvector(__builtin_convertvector(raw, integers), floats);
}

/* The first `count` elements, at most one vector's, and zeros; nothing after them is touched. */
INLINE floats load_part(const char *from, int dtype, int64_t count) {
    char raw[LANES * 4] = {0};
    memcpy(raw, from, (size_t)(count * size_of(dtype)));
    return load_vector(raw, dtype);
}

/* Round to nearest, ties to even; a NaN stays one. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE uint16_t to_float16(float value) {
#if defined(__F16C__)
    return _cvtss_sh(value, 0);
#elif defined(__aarch64__)
    __fp16 half = (__fp16)value;
    uint16_t made;
    memcpy(&made, &half, 2);
    return made;
#else
    uint32_t bits, sign;
    memcpy(&bits, &value, 4);
    sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x47800000) /* 2^16 and more, infinity, NaN */
        return (uint16_t)(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
    if (bits < 0x38800000) { /* less than 2^-14: the sum's last bits are those of a subnormal number */
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return (uint16_t)(sign | (bits - 0x3f000000));
    }
    return (uint16_t)(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13));
#endif
}

INLINE void store_elements(char *to, const float *from, int64_t count, int dtype) {
    if (dtype == PENSTOCK_FLOAT32) {
        memcpy(to, from, sizeof(float) * (size_t)count);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t made = dtype == PENSTOCK_BFLOAT16 ? to_bfloat16(from[i]) : to_float16(from[i]);
        memcpy(to + 2 * i, &made, 2);
    }
}

/* --- sums --- */

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (integers){__VA_ARGS__})
#endif

/* Vectors of partial sums a and b -> one vector that holds half as many partial sums of each: a's first. */
#if LANES == 16
INLINE floats fold_8(floats a, floats b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
INLINE floats fold_4(floats a, floats b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
INLINE floats fold_2(floats a, floats b) {
    return SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
INLINE floats fold_1(floats a, floats b) {
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
#elif LANES == 8
INLINE floats fold_4(floats a, floats b) {
    return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
INLINE floats fold_2(floats a, floats b) {
    return SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}
INLINE floats fold_1(floats a, floats b) {
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}
#else
INLINE floats fold_2(floats a, floats b) { return SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7); }
INLINE floats fold_1(floats a, floats b) { return SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7); }
#endif

/* Sum each of LANES vectors; lane i of the result is the sum of vector i. */
INLINE floats sum_each(floats *v) {
#if LANES == 16
    UNROLL for (int i = 0; i < 8; i++) v[i] = fold_8(v[2 * i], v[2 * i + 1]);
#endif
#if LANES >= 8
    UNROLL for (int i = 0; i < 4; i++) v[i] = fold_4(v[2 * i], v[2 * i + 1]);
#endif
    UNROLL for (int i = 0; i < 2; i++) v[i] = fold_2(v[2 * i], v[2 * i + 1]);
    return fold_1(v[0], v[1]);
}

/* --- exponentials --- */

/* e^x for x <= 0 within 2 units in the last place; 0 below -87, where numbers are subnormal; NaN for NaN. */
INLINE floats exponential(floats x) {
    const float rounding = 0x1.8p23f; /* adding it rounds to an integer, in the last bits of the sum */
    floats shifted = x * 0x1.715476p0f + rounding;
    floats n = shifted - rounding;
    floats r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f; /* x - n ln 2; the first product is exact */
    floats p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    floats power = (floats)(((words)shifted << 23) + 0x3f800000u);
    return choose(x < -87.0f, splat(0), p * power);
}

/* tanh within 1e-7: a series near 0, where the quotient loses its digits. */
INLINE floats hyperbolic_tangent(floats x) {
    words sign = (words)x & 0x80000000u;
    floats magnitude = (floats)((words)x ^ sign), e = exponential(-2.0f * magnitude);
    floats far = (floats)((words)((1.0f - e) / (1.0f + e)) | sign);
    floats y = x * x;
    floats near = x + x * y * (-1.0f / 3 + y * (2.0f / 15 + y * (-17.0f / 315 + y * (62.0f / 2835))));
    return choose(magnitude < 0.25f, near, far);
}
