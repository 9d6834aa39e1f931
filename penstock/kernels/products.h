/* The two products of attention over rows that lie anywhere: keys with queries, and weights with values.

   Sums stay in registers: LANES vectors, or twice as many. What is `const` is known where these are inlined. */

#include "vectors.h"

#define QUERIES 4
#define TOKENS (LANES / QUERIES) /* whose sums with QUERIES rows fill LANES vectors */

/* --- scores --- */

/* Add products of TOKENS keys with `queries` rows to sums[query][token], in `vectors` vectors from vector d on; the
   last one has `left` elements. Rows are `width` floats apart. */
INLINE void score_columns(const char *const *keys, int64_t d, int64_t left, const float *query, int64_t width,
                          int dtype, const int queries, const int vectors, floats *sums) {
    const int64_t nbytes = step_of(dtype) * size_of(dtype);
    floats factor[LANES];
    UNROLL for (int i = 0; i < queries * vectors; i++)
        factor[i] = load_floats(query + i / vectors * width + (d + i % vectors) * LANES);
    UNROLL for (int i = 0; i < TOKENS * vectors; i++) {
        const char *from = keys[i / vectors] + (d + i % vectors) * nbytes;
        floats key = left < step_of(dtype) ? load_part(from, dtype, left) : load_vector(from, dtype);
        UNROLL for (int q = 0; q < queries; q++) {
            floats *sum = sums + q * TOKENS + i / vectors;
            *sum = add_product(*sum, factor[q * vectors + i % vectors], key, dtype);
        }
    }
}

/* The same for all elements; of a single query 64 wait in registers while the tokens pass. */
INLINE void score_rows(const char *const *keys, int64_t size, const float *query, int64_t width, int dtype,
                       const int queries, floats *sums) {
    const int most = LANES / (queries > 1 ? 2 : dtype >= PAIRS ? 8 : 4) / queries, vectors = most ? most : 1;
    const int64_t step = step_of(dtype), whole = size / step;
    int64_t d = 0;
    for (; d + vectors <= whole; d += vectors)
        score_columns(keys, d, step, query, width, dtype, queries, vectors, sums);
    for (; vectors > 1 && d < whole; d++)
        score_columns(keys, d, step, query, width, dtype, queries, 1, sums);
    if (d * step < size)
        score_columns(keys, d, size - d * step, query, width, dtype, queries, 1, sums);
}

/* --- values --- */

/* Add weighted values of tokens to `queries` rows of sums, in `vectors` vectors at element `d`. Rows of sums are
   `width` floats apart, rows of weights `stride`. */
INLINE void add_columns(const char *const *rows, int64_t begin, int64_t end, int64_t offset, int64_t d, int64_t size,
                        const float *weights, int64_t stride, float *sums, int64_t width, int dtype, const int queries,
                        const int vectors) {
    const int64_t element = size_of(dtype), left = size - d;
    floats sum[2 * LANES], value[LANES];
    UNROLL for (int i = 0; i < queries * vectors; i++)
        sum[i] = load_floats(sums + i / vectors * width + d + i % vectors * LANES);
    for (int64_t token = begin; token < end; token++) {
        const char *row = rows[token] + offset + d * element;
        if (vectors > 1 || left >= LANES) {
            UNROLL for (int j = 0; j < vectors; j++) value[j] = load_vector(row + j * LANES * element, dtype);
        } else {
            value[0] = load_part(row, dtype, left);
        }
        UNROLL for (int i = 0; i < queries * vectors; i++)
            sum[i] += weights[i / vectors * stride + token] * value[i % vectors];
    }
    UNROLL for (int i = 0; i < queries * vectors; i++)
        store_floats(sums + i / vectors * width + d + i % vectors * LANES, sum[i]);
}

/* The same for all elements: LANES sums in registers at a time, fewer at the end of a row. */
INLINE void add_rows(const char *const *rows, int64_t begin, int64_t end, int64_t offset, int64_t size,
                     const float *weights, int64_t stride, float *sums, int64_t width, int dtype, const int queries) {
    const int vectors = LANES < queries ? 1 : LANES / queries < 8 ? LANES / queries : 8;
    int64_t d = 0;
    for (; d + vectors * LANES <= size; d += vectors * LANES)
        add_columns(rows, begin, end, offset, d, size, weights, stride, sums, width, dtype, queries, vectors);
    for (; d < size; d += LANES)
        add_columns(rows, begin, end, offset, d, size, weights, stride, sums, width, dtype, queries, 1);
}
