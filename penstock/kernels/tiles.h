/* The same two products in AMX tiles, for bfloat16: 16 tokens and 8 queries at a time.

   A block of keys is a tile as it lies. Values are two tokens to an element there, so rows are interleaved first. Weights
   are two bfloat16 numbers each, what is left by rounding the first one is the second: eight rows of each fill a tile, so
   nothing is lost by it, and sums are as exact as in float32. */

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && LANES == 16 && defined(__linux__)
#define HAS_TILES 1
#else
#define HAS_TILES 0
#endif

#define TILE_QUERIES 8
#define TILE_TOKENS 16
#define TILE_FLOATS 256
#define VISIT 64 /* tokens whose values are added while a sum is in a register */
#define MOST_KEYS 1024

/* The rows that come next: a line of them is asked for with each line that is used. The processor has few places for
   lines on their way, and who asks for many at once waits instead of computing. */
struct next_rows {
    const char *const *rows, *const *end;
    int64_t offset, nbytes, at;
};

INLINE void ask(struct next_rows *next) {
    if (next->rows == next->end)
        return;
    __builtin_prefetch(*next->rows + next->offset + next->at, 0, 2);
    int64_t at = next->at + 64, is_last = at >= next->nbytes;
    next->at = is_last ? 0 : at;
    next->rows += is_last;
}

#if HAS_TILES
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REQUEST_PERMISSION 0x1023 /* ARCH_REQ_XCOMP_PERM */
#define TILE_DATA 18

/* Ask the kernel once for the registers: they are large, so a process must. */
static int may_use_tiles(void) {
    static atomic_int known;
    int said = atomic_load(&known);
    if (!said) {
        said = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) ? 2 : 1;
        atomic_store(&known, said);
    }
    return said == 1;
}

struct tile_shapes {
    uint8_t palette, start, zeros[14];
    uint16_t nbytes[16];
    uint8_t rows[16];
};

/* Give tiles 0 and 1 rows of so many bytes; the others have 64. */
static void shape_tiles(int narrow) {
    struct tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.nbytes[i] = (uint16_t)(i < 2 ? narrow : 64);
        shapes.rows[i] = 16;
    }
    _tile_loadconfig(&shapes);
}

static void leave_tiles(void) { _tile_release(); }

/* Lay TILE_QUERIES queries, of which there are `count`, out in pairs of elements: [size / 2][TILE_QUERIES][2]. */
static void lay_out_queries(const char *from, int64_t stride, int64_t count, int64_t size, uint32_t *to) {
    for (int64_t q = 0; q < count; q++)
        for (int64_t pair = 0; pair < size / 2; pair++)
            memcpy(to + pair * TILE_QUERIES + q, from + q * stride + 4 * pair, 4);
}

/* Scores of TILE_QUERIES queries with TILE_TOKENS keys, `step` bytes apart. */
static void score_in_tiles(const char *keys, int64_t step, int64_t size, const uint16_t *queries, float *scores,
                           int64_t stride, struct next_rows *next) {
    float made[TILE_TOKENS * TILE_QUERIES] __attribute__((aligned(64)));
    _tile_zero(0);
    for (int64_t d = 0; d < size; d += 32) {
        _tile_loadd(1, queries + d * TILE_QUERIES, 4 * TILE_QUERIES);
        _tile_loadd(2, keys + 2 * d, (size_t)step);
        _tile_dpbf16ps(0, 2, 1);
        for (int i = 0; i < TILE_TOKENS; i++) ask(next);
    }
    _tile_stored(0, made, 4 * TILE_QUERIES);
    __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                        _mm512_set1_epi32(TILE_QUERIES));
    UNROLL for (int q = 0; q < TILE_QUERIES; q++)
        _mm512_storeu_ps(scores + q * stride, _mm512_i32gather_ps(places, made + q, 4));
}

/* Cut the weights of 32 tokens, of which there are `count`, in two: [2][TILE_QUERIES][32], for `queries` of the rows. */
static void cut_weights(const float *weights, int64_t stride, int64_t count, int64_t queries, uint16_t *to) {
    for (int64_t q = 0; q < TILE_QUERIES; q++)
        for (int64_t i = 0; i < 32; i += 16) {
            int64_t there = q < queries && i < count ? (count - i < 16 ? count - i : 16) : 0;
            __m512 whole = _mm512_maskz_loadu_ps((__mmask16)((1u << there) - 1), weights + q * stride + i);
            __m256bh first = _mm512_cvtneps_pbh(whole);
            __m512 rounded = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)first), 16));
            __m256bh second = _mm512_cvtneps_pbh(_mm512_sub_ps(whole, rounded));
            _mm256_store_si256((__m256i *)(to + q * 32 + i), (__m256i)first);
            _mm256_store_si256((__m256i *)(to + (TILE_QUERIES + q) * 32 + i), (__m256i)second);
        }
}

/* Interleave 32 elements of the values of 32 tokens, of which there are `count`: of tokens 2i and 2i + 1 together, in a
   tile for each half of the elements, [2][16][16][2]. Asks for as many lines. */
INLINE void interleave_values(const char *const *rows, int64_t count, int64_t at, uint16_t *to, struct next_rows *next) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < 32; i += 2) {
        __m512i even = _mm512_setzero_si512(), odd = _mm512_setzero_si512();
        if (i < count)
            even = _mm512_loadu_si512(rows[i] + at);
        if (i + 1 < count)
            odd = _mm512_loadu_si512(rows[i + 1] + at);
        ask(next);
        ask(next);
        _mm512_store_si512(to + i * 16, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(to + 512 + i * 16, _mm512_permutex2var_epi16(even, high, odd));
    }
}

/* Add weighted values of at most VISIT tokens to sums for TILE_QUERIES rows of weights, of which there are `queries`. Sums
   are tiles of the weights' halves and 16 elements, [size / 16][2][TILE_QUERIES][16]. */
static void add_in_tiles(const char *const *rows, int64_t count, int64_t offset, int64_t size, const float *weights,
                         int64_t stride, int64_t queries, float *sums, struct next_rows *next) {
    uint16_t pairs[2][2 * 512] __attribute__((aligned(64))), halves[2][512] __attribute__((aligned(64)));
    for (int64_t i = 0; i < 2; i++) cut_weights(weights + 32 * i, stride, count - 32 * i, queries, halves[i]);
    _tile_loadd(0, halves[0], 64);
    _tile_loadd(1, halves[1], 64);
    for (int64_t d = 0; d < size; d += 32) {
        float *sum = sums + d * TILE_QUERIES * 2;
        _tile_loadd(2, sum, 64);
        _tile_loadd(3, sum + TILE_FLOATS, 64);
        interleave_values(rows, count, offset + 2 * d, pairs[0], next);
        _tile_loadd(4, pairs[0], 64);
        _tile_dpbf16ps(2, 0, 4);
        _tile_loadd(5, pairs[0] + 512, 64);
        _tile_dpbf16ps(3, 0, 5);
        if (count > 32) {
            interleave_values(rows + 32, count - 32, offset + 2 * d, pairs[1], next);
            _tile_loadd(6, pairs[1], 64);
            _tile_dpbf16ps(2, 1, 6);
            _tile_loadd(7, pairs[1] + 512, 64);
            _tile_dpbf16ps(3, 1, 7);
        }
        _tile_stored(2, sum, 64);
        _tile_stored(3, sum + TILE_FLOATS, 64);
    }
}

/* Add both halves of the sums of one query. */
static void join_halves(const float *sums, int64_t query, int64_t size, float *to) {
    for (int64_t d = 0; d < size; d += 16) {
        const float *tile = sums + d * TILE_QUERIES * 2 + query * 16;
        store_floats(to + d, load_floats(tile) + load_floats(tile + TILE_FLOATS / 2));
    }
}
#else
static int may_use_tiles(void) { return 0; }
#endif
