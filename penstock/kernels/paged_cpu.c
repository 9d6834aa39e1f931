/* Attention of one query for each sequence over keys and values in blocks, on the CPU.

   A sequence's tokens are cut into parts of PART tokens, at multiples of PART. A task is one part of some key heads:
   scores of all its tokens, their weights, and the weighted sum of values with the largest score and the sum of
   weights, kept aside. Who ends the last part of these heads joins the parts in their order. So the result depends on
   the sequence alone: not on threads, nor on neighbours, nor on how many heads a task takes.

   Keys are read once for all query heads that share them: each vector of a key is multiplied with up to QUERIES
   queries, LANES sums side by side in registers; each vector of values with 8 weights. A tile is a few tokens, visited
   head by head, so memory is read nearly in order: long rows of many tokens side by side are slower by a third.
   As in every kernel of this kind, sums come before their division: weighted values beyond 3e38 overflow. */

#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>

#include "paged_cpu.h"
#include "products.h"
#include "tiles.h"
#include "workers.h"

#define PART 512
#define STRIDE (PART + LANES) /* of a row of scores: no power of two */
#define MAX_TASK_HEADS 64     /* query heads; their scores stay in the second level of the cache */
#define TASKS_PER_THREAD 4
#define LINE 64
#define AHEAD (16 << 10) /* bytes between what is asked for and what is used */

struct plan {
    const struct penstock_attention *call;
    int product_dtype;                /* of keys and queries as they are multiplied */
    int tiled;                        /* products are made in tiles */
    int64_t groups;                   /* query heads of a key head */
    int64_t group_rows;               /* rows of queries and of scores for a key head */
    int64_t tile;                     /* tokens that are visited together */
    int64_t task_heads, num_slices;   /* key heads of a task, tasks of a part */
    int64_t query_width, value_width; /* sizes, rounded up to whole vectors */
    int64_t partial_width;            /* of one query head and part: values, largest score, sum of weights */
    int64_t *first_part;              /* [N + 1], counted over all sequences */
    atomic_int *missing;              /* [N, num_slices]: parts that have not ended */
    float *partials;                  /* [parts, Hq, partial_width] */
    float *scratch;                   /* [num_threads, scratch_width] */
    int64_t scratch_width;
    int64_t sums_at; /* where in it sums in tiles are */
};

/* One part of one sequence, and the key heads of a task. */
struct part {
    int64_t sequence, number, num_tokens, first_head, num_heads;
    const char *keys[PART], *values[PART]; /* rows of the tokens, at head 0 */
    int64_t slots[PART];                   /* where the tokens' scales are, without the head */
};

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t a, int64_t unit) { return (a + unit - 1) / unit * unit; }

static int64_t task_rows(const struct plan *plan) { return round_up(plan->task_heads * plan->group_rows, QUERIES); }

static int64_t first_token(const struct penstock_attention *call, int64_t sequence) {
    return call->window ? larger(call->lengths[sequence] - call->window, 0) : 0;
}

/* Ask for the rows of `count` heads that are used AHEAD bytes after those of head h. A short way: what is asked for far
   ahead of its use is slower than not to ask. Into the second level: the first holds too little, and has few requests.
   Inline, or the compiler takes it for a function without effect. */
INLINE void fetch_ahead(const struct part *part, const struct penstock_rows *rows, const char *const *starts,
                        int64_t begin, int64_t tile, int64_t h, int64_t count) {
    int64_t nbytes = rows->size * size_of(rows->dtype), next = h + larger(AHEAD / (tile * nbytes), count);
    int64_t token = begin + next / part->num_heads * tile, end = smaller(token + tile, part->num_tokens);
    int64_t last = smaller(next % part->num_heads + count, part->num_heads);
    for (; token < end; token++)
        for (int64_t head = next % part->num_heads; head < last; head++)
            for (int64_t at = 0; at < nbytes; at += LINE)
                __builtin_prefetch(starts[token] + (part->first_head + head) * rows->head_stride + at, 0, 2);
}

/* --- scores --- */

/* Scores of QUERIES rows with a strip: the rows of one head, or one of each head, of which `heads` are left. */
INLINE void score_strip(const struct plan *plan, const struct part *part, int64_t token, int64_t head, int64_t heads,
                        const float *query, float *scores, int dtype, const int queries) {
    const struct penstock_rows *rows = &plan->call->keys;
    const int64_t width = plan->query_width;
    const char *keys[TOKENS];
    floats sums[LANES], made;
    UNROLL for (int i = 0; i < LANES; i++) sums[i] = (floats){0};
    UNROLL for (int j = 0; j < TOKENS; j++)
        keys[j] = part->keys[smaller(token + j, part->num_tokens - 1)] + head * rows->head_stride;
    UNROLL for (int i = 0; i < QUERIES; i += queries) {
        score_rows(keys, rows->size, query + i * width, width, dtype, queries, sums + i * TOKENS);
        UNROLL for (int j = 0; j < TOKENS; j++) keys[j] += i + 1 < heads ? rows->head_stride : 0;
    }
    made = sum_each(sums);
    UNROLL for (int i = 0; i < QUERIES; i++)
        memcpy(scores + i * STRIDE + token, (const float *)&made + i * TOKENS, sizeof(float) * TOKENS);
}

INLINE void score_tile(const struct plan *plan, const struct part *part, int64_t begin, int64_t end, int64_t head,
                       int64_t heads, const float *query, float *scores, int dtype) {
    for (int64_t token = begin; token < end; token += TOKENS)
        if (plan->groups == 1)
            score_strip(plan, part, token, head, heads, query, scores, dtype, 1);
        else
            for (int64_t g = 0; g < plan->groups; g += QUERIES)
                score_strip(plan, part, token, head, 1, query + g * plan->query_width, scores + g * STRIDE, dtype,
                            QUERIES);
}

/* --- values --- */

INLINE void add_head(const struct plan *plan, const struct part *part, int64_t begin, int64_t end, int64_t head,
                     const float *weights, float *sums, int dtype) {
    const struct penstock_rows *values = &plan->call->values;
    int64_t width = plan->partial_width, offset = head * values->head_stride, g = 0;
#define ADD(queries)                                                                                                 \
    for (; g + queries <= plan->groups; g += queries)                                                                \
    add_rows(part->values, begin, end, offset, values->size, weights + g * STRIDE, STRIDE, sums + g * width, width,   \
             dtype, queries)
    ADD(8);
    ADD(4);
    ADD(2);
    ADD(1);
}

/* --- one part --- */

/* Call `function` with a dtype that is constant in it. */
#define FOR_DTYPE(dtype, function, ...)                                                                              \
    switch (dtype) {                                                                                                 \
    case PENSTOCK_FLOAT32: function(__VA_ARGS__, PENSTOCK_FLOAT32); break;                                           \
    case PENSTOCK_BFLOAT16: function(__VA_ARGS__, PENSTOCK_BFLOAT16); break;                                         \
    case PENSTOCK_FLOAT16: function(__VA_ARGS__, PENSTOCK_FLOAT16); break;                                           \
    case PENSTOCK_FLOAT8: function(__VA_ARGS__, PENSTOCK_FLOAT8); break;                                             \
    case PAIRS: function(__VA_ARGS__, PAIRS); break;                                                                 \
    case PAIRS_OF_INT8: function(__VA_ARGS__, PAIRS_OF_INT8); break;                                                 \
    default: function(__VA_ARGS__, PENSTOCK_INT8);                                                                   \
    }

/* Heads with one query each are scored QUERIES at once. */
static void score_part(const struct plan *plan, const struct part *part, const float *query, float *scores) {
    int64_t count = plan->groups == 1 ? QUERIES : 1;
    for (int64_t begin = 0; begin < part->num_tokens; begin += plan->tile) {
        int64_t end = smaller(begin + plan->tile, part->num_tokens);
        for (int64_t h = 0; h < part->num_heads; h += count) {
            const float *queries = query + h * plan->group_rows * plan->query_width;
            float *rows = scores + h * plan->group_rows * STRIDE;
            fetch_ahead(part, &plan->call->keys, part->keys, begin, plan->tile, h, count);
            FOR_DTYPE(plan->product_dtype, score_tile, plan, part, begin, end, part->first_head + h,
                      part->num_heads - h, queries, rows)
        }
    }
}

static void add_part(const struct plan *plan, const struct part *part, const float *weights, float *sums) {
    for (int64_t begin = 0; begin < part->num_tokens; begin += plan->tile) {
        int64_t end = smaller(begin + plan->tile, part->num_tokens);
        for (int64_t h = 0; h < part->num_heads; h++) {
            const float *rows = weights + h * plan->group_rows * STRIDE;
            float *sum = sums + h * plan->groups * plan->partial_width;
            fetch_ahead(part, &plan->call->values, part->values, begin, plan->tile, h, 1);
            FOR_DTYPE(plan->call->values.dtype, add_head, plan, part, begin, end, part->first_head + h, rows, sum)
        }
    }
}

/* Gather the scales of one head, or ones; the rest of the last vector becomes 0. */
static void gather_scales(const struct penstock_rows *rows, const struct part *part, int64_t head, float *scales) {
    for (int64_t i = 0; i < part->num_tokens; i++)
        scales[i] = rows->scales ? rows->scales[part->slots[i] + head] : 1.0f;
    for (int64_t i = part->num_tokens; i < round_up(part->num_tokens, LANES); i++) scales[i] = 0;
}

/* Make products into weights e^(score - largest), times the values' scales; return the largest score and the sum. */
static void weigh(const struct penstock_attention *call, int64_t count, float *row, const float *key_scales,
                  const float *value_scales, float *largest, float *total) {
    floats top = splat(-INFINITY), sum = splat(0);
    for (int64_t i = 0; i < count; i += LANES) {
        floats score = load_floats(row + i) * call->scale * load_floats(key_scales + i);
        if (call->softcap != 0)
            score = hyperbolic_tangent(score / call->softcap) * call->softcap;
        if (count - i < LANES)
            for (int64_t j = count - i; j < LANES; j++) score[j] = -INFINITY;
        store_floats(row + i, score);
        top = choose(score > top, score, top);
    }
    float most = -INFINITY;
    for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
    float from = most == -INFINITY ? 0 : most; /* all scores are -infinity, or none is a number */
    for (int64_t i = 0; i < count; i += LANES) {
        floats weight = exponential(load_floats(row + i) - from);
        sum += weight;
        store_floats(row + i, weight * load_floats(value_scales + i));
    }
    *largest = most;
    *total = 0;
    for (int i = 0; i < LANES; i++) *total += sum[i];
}

static void weigh_part(const struct plan *plan, const struct part *part, float *scores, float *partials) {
    float key_scales[STRIDE], value_scales[STRIDE];
    for (int64_t h = 0; h < part->num_heads; h++) {
        gather_scales(&plan->call->keys, part, part->first_head + h, key_scales);
        gather_scales(&plan->call->values, part, part->first_head + h, value_scales);
        for (int64_t g = 0; g < plan->groups; g++) {
            float *row = scores + (h * plan->group_rows + g) * STRIDE;
            float *kept = partials + (h * plan->groups + g) * plan->partial_width;
            memset(kept, 0, sizeof(float) * (size_t)plan->value_width);
            weigh(plan->call, part->num_tokens, row, key_scales, value_scales, kept + plan->value_width,
                  kept + plan->value_width + 1);
        }
    }
}

#if HAS_TILES
/* --- the same in tiles --- */

/* Return the first of TILE_TOKENS rows at even distances; rows that do not lie so, or are too few, are copied. */
static const char *even_rows(const struct part *part, int64_t begin, int64_t offset, int64_t nbytes, char *copies,
                             int64_t *step) {
    const char *const *rows = part->keys + begin;
    int64_t count = smaller(part->num_tokens - begin, TILE_TOKENS), even = count == TILE_TOKENS;
    *step = count > 1 ? rows[1] - rows[0] : 0;
    for (int64_t i = 2; i < count; i++) even &= rows[i] - rows[i - 1] == *step;
    if (even && *step > 0)
        return rows[0] + offset;
    for (int64_t i = 0; i < count; i++) memcpy(copies + i * nbytes, rows[i] + offset, (size_t)nbytes);
    memset(copies + count * nbytes, 0, (size_t)((TILE_TOKENS - count) * nbytes));
    *step = nbytes;
    return copies;
}

/* The rows of one head of `count` tokens from `begin` on, as far as there are any. */
static struct next_rows rows_next(const struct part *part, const struct penstock_rows *rows, const char *const *starts,
                                  int64_t begin, int64_t count, int64_t head) {
    return (struct next_rows){starts + smaller(begin, part->num_tokens), starts + smaller(begin + count, part->num_tokens),
                              (part->first_head + head) * rows->head_stride, 2 * rows->size, 0};
}

static void score_part_in_tiles(const struct plan *plan, const struct part *part, const float *query, float *scores) {
    const struct penstock_rows *rows = &plan->call->keys;
    char copies[TILE_TOKENS * MOST_KEYS * 2];
    shape_tiles(4 * TILE_QUERIES);
    for (int64_t begin = 0; begin < part->num_tokens; begin += TILE_TOKENS)
        for (int64_t h = 0; h < part->num_heads; h++) {
            int64_t step, offset = (part->first_head + h) * rows->head_stride;
            int64_t head = h + 1 < part->num_heads ? h + 1 : 0;
            struct next_rows next = rows_next(part, rows, part->keys, head ? begin : begin + TILE_TOKENS, TILE_TOKENS, head);
            const char *keys = even_rows(part, begin, offset, 2 * rows->size, copies, &step);
            for (int64_t g = 0; g < plan->groups; g += TILE_QUERIES)
                score_in_tiles(keys, step, rows->size,
                               (const uint16_t *)(query + (h * plan->group_rows + g) * plan->query_width),
                               scores + (h * plan->group_rows + g) * STRIDE + begin, STRIDE, &next);
        }
}

static void add_part_in_tiles(const struct plan *plan, const struct part *part, const float *weights, float *sums,
                              float *partials) {
    const struct penstock_rows *rows = &plan->call->values;
    int64_t width = rows->size * TILE_QUERIES * 2, chunks = plan->group_rows / TILE_QUERIES;
    memset(sums, 0, sizeof(float) * (size_t)(part->num_heads * chunks * width));
    shape_tiles(64);
    for (int64_t begin = 0; begin < part->num_tokens; begin += VISIT)
        for (int64_t h = 0; h < part->num_heads; h++) {
            int64_t head = h + 1 < part->num_heads ? h + 1 : 0;
            struct next_rows next = rows_next(part, rows, part->values, head ? begin : begin + VISIT, VISIT, head);
            for (int64_t g = 0; g < plan->groups; g += TILE_QUERIES)
                add_in_tiles(part->values + begin, smaller(part->num_tokens - begin, VISIT),
                             (part->first_head + h) * rows->head_stride, rows->size,
                             weights + (h * plan->group_rows + g) * STRIDE + begin, STRIDE, plan->groups - g,
                             sums + (h * chunks + g / TILE_QUERIES) * width, &next);
        }
    leave_tiles();
    for (int64_t h = 0; h < part->num_heads; h++)
        for (int64_t g = 0; g < plan->groups; g++)
            join_halves(sums + (h * chunks + g / TILE_QUERIES) * width, g % TILE_QUERIES, rows->size,
                        partials + (h * plan->groups + g) * plan->partial_width);
}

static void convert_queries_to_tiles(const struct plan *plan, const struct part *part, float *to) {
    const struct penstock_attention *call = plan->call;
    const char *from = (const char *)call->query + part->sequence * call->query_stride;
    memset(to, 0, sizeof(float) * (size_t)(task_rows(plan) * plan->query_width));
    for (int64_t h = 0; h < part->num_heads; h++)
        for (int64_t g = 0; g < plan->groups; g += TILE_QUERIES)
            lay_out_queries(from + ((part->first_head + h) * plan->groups + g) * call->query_head_stride,
                            call->query_head_stride, smaller(plan->groups - g, TILE_QUERIES), call->keys.size,
                            (uint32_t *)(to + (h * plan->group_rows + g) * plan->query_width));
}
#endif

/* Convert the part's queries to what is multiplied; the ends of rows, and rows without a query, become zeros. */
static void convert_queries(const struct plan *plan, const struct part *part, float *to) {
    const struct penstock_attention *call = plan->call;
    int64_t size = call->keys.size, element = size_of(call->query_dtype);
    memset(to, 0, sizeof(float) * (size_t)(task_rows(plan) * plan->query_width));
    int dtype = step_of(plan->product_dtype) > LANES ? PAIRS : call->query_dtype;
    for (int64_t g = 0; g < part->num_heads * plan->groups; g++) {
        float *row = to + (g / plan->groups * plan->group_rows + g % plan->groups) * plan->query_width;
        const char *from = (const char *)call->query + part->sequence * call->query_stride +
                           (part->first_head * plan->groups + g) * call->query_head_stride;
        for (int64_t d = 0, i = 0; d < size; d += step_of(dtype), i += LANES)
            store_floats(row + i, load_part(from + d * element, dtype, smaller(size - d, step_of(dtype))));
    }
}

INLINE const char *row_of(const struct penstock_rows *rows, int64_t block, int64_t slot) {
    return (const char *)rows->data + block * rows->block_stride + slot * rows->token_stride;
}

static void find_rows(const struct plan *plan, struct part *part) {
    const struct penstock_attention *call = plan->call;
    const int32_t *table = call->block_table + part->sequence * call->max_blocks;
    int64_t begin = larger(part->number * PART, first_token(call, part->sequence));
    part->num_tokens = smaller((part->number + 1) * PART, call->lengths[part->sequence]) - begin;
    for (int64_t i = 0; i < part->num_tokens; i++) {
        int64_t block = table[(begin + i) / call->block_tokens], slot = (begin + i) % call->block_tokens;
        part->keys[i] = row_of(&call->keys, block, slot);
        part->values[i] = row_of(&call->values, block, slot);
        part->slots[i] = (block * call->block_tokens + slot) * call->num_heads;
    }
}

/* --- joining parts --- */

/* Join the parts of one query head in their order, and write the result. */
static void join_head(const struct plan *plan, int64_t sequence, int64_t head, float *sum) {
    const struct penstock_attention *call = plan->call;
    int64_t first = plan->first_part[sequence], last = plan->first_part[sequence + 1], width = plan->value_width;
    int64_t step = call->num_query_heads * plan->partial_width;
    const float *partials = plan->partials + head * plan->partial_width;
    float most = call->sinks ? call->sinks[head] : -INFINITY;
    for (int64_t i = first; i < last; i++)
        most = partials[i * step + width] > most ? partials[i * step + width] : most;
    float from = most == -INFINITY ? 0 : most;
    float total = call->sinks ? expf(call->sinks[head] - from) : 0;
    memset(sum, 0, sizeof(float) * (size_t)width);
    for (int64_t i = first; i < last; i++) {
        const float *kept = partials + i * step;
        float share = kept[width] == -INFINITY ? 1 : expf(kept[width] - from);
        total += kept[width + 1] * share;
        for (int64_t d = 0; d < width; d++) sum[d] += kept[d] * share;
    }
    for (int64_t d = 0; d < width; d++) sum[d] = sum[d] / total;
    char *to = (char *)call->out + sequence * call->out_stride + head * call->out_head_stride;
    store_elements(to, sum, call->values.size, call->out_dtype);
}

/* Find a task's sequence, part and heads: parts of all sequences in order, slices of heads within each. */
static void find_task(const struct plan *plan, int64_t task, struct part *part) {
    int64_t number = task / plan->num_slices, low = 0, high = plan->call->num_sequences;
    while (high - low > 1) { /* the last sequence whose first part is not after this one has it: it is not empty */
        int64_t middle = (low + high) / 2;
        *(plan->first_part[middle] <= number ? &low : &high) = middle;
    }
    part->sequence = low;
    part->number = number - plan->first_part[low] + first_token(plan->call, low) / PART;
    part->first_head = task % plan->num_slices * plan->task_heads;
    part->num_heads = smaller(plan->task_heads, plan->call->num_heads - part->first_head);
}

static void run_task(void *context, int worker, int64_t task) {
    const struct plan *plan = context;
    struct part part;
    find_task(plan, task, &part);
    find_rows(plan, &part);
    int64_t first_query_head = part.first_head * plan->groups, rows = part.num_heads * plan->groups;
    float *query = plan->scratch + worker * plan->scratch_width;
    float *scores = query + task_rows(plan) * plan->query_width;
    float *partials = plan->partials + (task / plan->num_slices * plan->call->num_query_heads + first_query_head) *
                                           plan->partial_width;
#if HAS_TILES
    if (plan->tiled) {
        convert_queries_to_tiles(plan, &part, query);
        score_part_in_tiles(plan, &part, query, scores);
        weigh_part(plan, &part, scores, partials);
        add_part_in_tiles(plan, &part, scores, query + plan->sums_at, partials);
    } else
#endif
    {
        convert_queries(plan, &part, query);
        score_part(plan, &part, query, scores);
        weigh_part(plan, &part, scores, partials);
        add_part(plan, &part, scores, partials);
    }
    if (atomic_fetch_sub(&plan->missing[part.sequence * plan->num_slices + task % plan->num_slices], 1) == 1)
        for (int64_t i = 0; i < rows; i++)
            join_head(plan, part.sequence, first_query_head + i, scores);
}

/* --- the call --- */

static int is_valid(const struct penstock_attention *call) {
    for (int64_t n = 0; n < call->num_sequences; n++) {
        if (call->lengths[n] < 0 || call->lengths[n] > call->max_blocks * call->block_tokens)
            return 0;
        for (int64_t i = first_token(call, n) / call->block_tokens; i * call->block_tokens < call->lengths[n]; i++) {
            int64_t block = call->block_table[n * call->max_blocks + i];
            if (block < 0 || block >= call->num_blocks)
                return 0;
        }
    }
    return 1;
}

/* Count parts; write zeros for sequences without tokens, which no task visits. */
static int64_t count_parts(struct plan *plan) {
    const struct penstock_attention *call = plan->call;
    plan->first_part[0] = 0;
    for (int64_t n = 0; n < call->num_sequences; n++) {
        int64_t length = call->lengths[n], first = first_token(call, n);
        plan->first_part[n + 1] = plan->first_part[n] + (length ? (length - 1) / PART - first / PART + 1 : 0);
        for (int64_t h = 0; length == 0 && h < call->num_query_heads; h++)
            memset((char *)call->out + n * call->out_stride + h * call->out_head_stride, 0,
                   (size_t)(call->values.size * size_of(call->out_dtype)));
    }
    return plan->first_part[call->num_sequences];
}

/* Take as many heads at once as the cache likes, fewer when there would be too few tasks for the threads. */
static void choose_slices(struct plan *plan, int64_t num_parts) {
    int64_t num_heads = plan->call->num_heads;
    plan->task_heads = larger(smaller(MAX_TASK_HEADS / plan->groups, num_heads), 1);
    do {
        plan->num_slices = (num_heads + plan->task_heads - 1) / plan->task_heads;
    } while (num_parts * plan->num_slices < TASKS_PER_THREAD * plan->call->num_threads &&
             plan->task_heads > 1 && (plan->task_heads = (plan->task_heads + 1) / 2));
}

/* One query head alone to a key head is read faster than it is multiplied anyway. */
static int can_be_tiled(const struct plan *plan) {
    const struct penstock_rows *keys = &plan->call->keys, *values = &plan->call->values;
    int fits = keys->size % 32 == 0 && values->size % 32 == 0 && keys->size <= MOST_KEYS;
    return plan->groups > 1 && fits && plan->product_dtype == PAIRS && values->dtype == PENSTOCK_BFLOAT16;
}

int penstock_attend_paged(const struct penstock_attention *call) {
    struct plan plan = {.call = call, .groups = call->num_query_heads / call->num_heads};
    if (!is_valid(call))
        return 1;
    plan.product_dtype = paired(call->keys.dtype, call->query_dtype);
    plan.tiled = can_be_tiled(&plan) && may_use_tiles();
    plan.group_rows = plan.groups == 1 ? 1 : round_up(plan.groups, plan.tiled ? TILE_QUERIES : QUERIES);
    plan.tile = plan.groups == 1 ? 8 : 16; /* more of them amortise loads and stores of sums, rows are shorter */
    plan.query_width = round_up(call->keys.size, step_of(plan.product_dtype)) / step_of(plan.product_dtype) * LANES;
    plan.value_width = round_up(call->values.size, LANES);
    plan.partial_width = plan.value_width + LANES;
    plan.first_part = malloc(sizeof(int64_t) * (size_t)(call->num_sequences + 1));
    if (!plan.first_part)
        return 2;
    int64_t num_parts = count_parts(&plan);
    choose_slices(&plan, num_parts);
    int64_t num_tasks = num_parts * plan.num_slices, num_rows = task_rows(&plan);
    int num_threads = (int)smaller(call->num_threads, larger(num_tasks, 1));
    plan.scratch_width = round_up(num_rows * plan.query_width + larger(num_rows * STRIDE, plan.value_width), LINE);
    plan.sums_at = plan.scratch_width;
    plan.scratch_width += plan.tiled ? plan.task_heads * plan.group_rows * call->values.size * 2 : 0;
    plan.missing = malloc(sizeof(atomic_int) * (size_t)(call->num_sequences * plan.num_slices + 1));
    size_t partials = (size_t)round_up(num_parts * call->num_query_heads * plan.partial_width, LINE);
    plan.partials = aligned_alloc(LINE, sizeof(float) * (partials + (size_t)(plan.scratch_width * num_threads)));
    int failed = !plan.missing || !plan.partials;
    if (!failed) {
        plan.scratch = plan.partials + partials;
        for (int64_t n = 0; n < call->num_sequences; n++)
            for (int64_t s = 0; s < plan.num_slices; s++)
                atomic_init(&plan.missing[n * plan.num_slices + s], (int)(plan.first_part[n + 1] - plan.first_part[n]));
        run_tasks(run_task, &plan, num_tasks, num_threads);
    }
    free(plan.first_part);
    free(plan.missing);
    free(plan.partials);
    return failed ? 2 : 0;
}
