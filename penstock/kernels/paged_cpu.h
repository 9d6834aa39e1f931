/* The call from Python; cffi parses this file too, so there is nothing in it but declarations. Strides are in bytes. */

enum penstock_dtype { PENSTOCK_FLOAT32, PENSTOCK_BFLOAT16, PENSTOCK_FLOAT16, PENSTOCK_INT8, PENSTOCK_FLOAT8 };

struct penstock_rows { /* [num_blocks, block_tokens, H, size], the last dimension contiguous */
    const void *data;
    const float *scales; /* [num_blocks, block_tokens, H], contiguous, or NULL */
    int64_t block_stride, token_stride, head_stride, size;
    int dtype;
};

struct penstock_attention {
    struct penstock_rows keys, values;
    const void *query; /* [N, Hq, D] */
    void *out;         /* [N, Hq, Dv] */
    int64_t query_stride, query_head_stride, out_stride, out_head_stride;
    const int32_t *block_table; /* [N, max_blocks], contiguous */
    const int32_t *lengths;     /* [N] */
    const float *sinks;         /* [Hq] or NULL */
    int64_t num_sequences, num_query_heads, num_heads, num_blocks, block_tokens, max_blocks;
    int64_t window; /* 0: none */
    float scale;
    float softcap; /* 0: none */
    int query_dtype, out_dtype, num_threads;
};

/* Returns 0; 1 when a length or a block number is out of range, and nothing was written; 2 without memory. */
int penstock_attend_paged(const struct penstock_attention *call);
