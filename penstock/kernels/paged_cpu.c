/* Attention of one query for each sequence over keys and values in blocks, on the CPU.

   A sequence's tokens are cut into parts of PART tokens, at multiples of PART. A task is one part of some key heads:
   scores of all its tokens, their weights, and the weighted sum of values with the largest score and the sum of
   weights, kept aside. Who ends the last part of these heads joins the parts in their order. So the result depends on
   the sequence alone: not on threads, nor on neighbours, nor on how many heads a task takes.

   Keys are read once for all query heads that share them: each vector of a key is multiplied with up to 4 queries,
   LANES sums side by side in registers; each vector of values with 8 weights. The tokens of a tile are visited head by
   head while they are in the cache, and the next tile is on its way meanwhile, so memory is read nearly in order.
   As in every kernel of this kind, sums come before their division: weighted values beyond 3e38 overflow. */

#include <math.h>
#include <stdlib.h>

#include "paged_cpu.h"
#include "vectors.h"
#include "workers.h"

#define PART 512
#define TILE 8
#define STRIDE (PART + LANES) /* of a row of scores: tiles write whole vectors */
#define MAX_TASK_HEADS 64     /* query heads; their scores stay in the second level of the cache */
#define TASKS_PER_THREAD 4
#define LINE 64

struct plan {
    const struct penstock_attention *call;
    int product_dtype;                /* of keys and queries as they are multiplied */
    int64_t groups;                   /* query heads of a key head */
    int64_t task_heads, num_slices;   /* key heads of a task, tasks of a part */
    int64_t query_width, value_width; /* sizes, rounded up to whole vectors */
    int64_t partial_width;            /* of one query head and part: values, largest score, sum of weights */
    int64_t *first_part;              /* [N + 1], counted over all sequences */
    atomic_int *missing;              /* [N, num_slices]: parts that have not ended */
    float *partials;                  /* [parts, Hq, partial_width] */
    float *scratch;                   /* [num_threads, scratch_width] */
    int64_t scratch_width;
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

static int64_t first_token(const struct penstock_attention *call, int64_t sequence) {
    return call->window ? larger(call->lengths[sequence] - call->window, 0) : 0;
}

/* Ask for what head h's share of the next tile is, when that is cut into one share per head: rows in their order, since
   the machine runs ahead by itself then. Into the second level: the first holds too little, and has few requests.
   Inline, or the compiler takes it for a function without effect. */
INLINE void fetch_ahead(const struct part *part, const struct penstock_rows *rows, const char *const *starts,
                        int64_t end, int64_t h) {
    int64_t from = end + TILE * h / part->num_heads, to = end + TILE * (h + 1) / part->num_heads;
    int64_t offset = part->first_head * rows->head_stride;
    int64_t nbytes = smaller(part->num_heads * rows->head_stride, rows->token_stride);
    for (int64_t token = from; token < to && token < part->num_tokens; token++)
        for (int64_t at = 0; at < nbytes; at += LINE)
            __builtin_prefetch(starts[token] + offset + at, 0, 2);
}

/* --- scores --- */

/* Scores of `queries` rows with the tokens of a tile: scores[query][token]. `queries` divides LANES. */
INLINE void score_tile(const char *const *rows, int64_t begin, int64_t end, int64_t offset, const float *query,
                       int64_t query_width, int64_t size, int dtype, const int queries, float *scores) {
    const int tokens = LANES / queries;
    const int64_t element = size_of(dtype), step = step_of(dtype), whole = size / step;
    for (int64_t token = begin; token < end; token += tokens) {
        const char *row[LANES];
        floats sums[LANES], key[LANES], made;
        UNROLL for (int j = 0; j < tokens; j++) row[j] = rows[smaller(token + j, end - 1)] + offset;
        UNROLL for (int i = 0; i < LANES; i++) sums[i] = (floats){0};
        for (int64_t d = 0; d < whole; d++) {
            UNROLL for (int j = 0; j < tokens; j++) key[j] = load_vector(row[j] + d * step * element, dtype);
            UNROLL for (int i = 0; i < LANES; i++) sums[i] = add_product(
                sums[i], load_floats(query + i / tokens * query_width + d * LANES), key[i % tokens], dtype);
        }
        if (whole * step < size) {
            const float *last = query + whole * LANES;
            UNROLL for (int j = 0; j < tokens; j++)
                key[j] = load_part(row[j] + whole * step * element, dtype, size - whole * step);
            UNROLL for (int i = 0; i < LANES; i++) sums[i] =
                add_product(sums[i], load_floats(last + i / tokens * query_width), key[i % tokens], dtype);
        }
        made = sum_each(sums);
        UNROLL for (int i = 0; i < queries; i++)
            memcpy(scores + i * STRIDE + token, (const float *)&made + i * tokens, sizeof(float) * (size_t)tokens);
    }
}

/* Scores of one head's queries with a tile, in groups of 4, 2 and 1. */
INLINE void score_head(const struct plan *plan, const struct part *part, int64_t begin, int64_t end, int64_t head,
                       const float *query, float *scores, int dtype) {
    const struct penstock_rows *keys = &plan->call->keys;
    int64_t width = plan->query_width, start = head * keys->head_stride, g = 0;
#define SCORE(queries)                                                                                               \
    for (; g + queries <= plan->groups; g += queries)                                                                \
    score_tile(part->keys, begin, end, start, query + g * width, width, keys->size, dtype, queries, scores + g * STRIDE)
    SCORE(4);
    SCORE(2);
    SCORE(1);
}

/* --- values --- */

/* Add weighted values of a tile to `queries` rows of sums, in `vectors` vectors at element `d`. */
INLINE void add_columns(const char *const *rows, int64_t begin, int64_t end, int64_t offset, int64_t d, int64_t size,
                        const float *weights, float *sums, int64_t width, int dtype, const int queries,
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
            sum[i] += weights[i / vectors * STRIDE + token] * value[i % vectors];
    }
    UNROLL for (int i = 0; i < queries * vectors; i++)
        store_floats(sums + i / vectors * width + d + i % vectors * LANES, sum[i]);
}

/* The same for all elements: LANES sums in registers at a time, fewer at the end of a row. */
INLINE void add_tile(const struct part *part, int64_t begin, int64_t end, int64_t offset, int64_t size,
                     const float *weights, float *sums, int64_t width, int dtype, const int queries) {
    const int vectors = LANES < queries ? 1 : LANES / queries < 8 ? LANES / queries : 8;
    int64_t d = 0;
    for (; d + vectors * LANES <= size; d += vectors * LANES)
        add_columns(part->values, begin, end, offset, d, size, weights, sums, width, dtype, queries, vectors);
    for (; d < size; d += LANES)
        add_columns(part->values, begin, end, offset, d, size, weights, sums, width, dtype, queries, 1);
}

INLINE void add_head(const struct plan *plan, const struct part *part, int64_t begin, int64_t end, int64_t head,
                     const float *weights, float *sums, int dtype) {
    const struct penstock_rows *values = &plan->call->values;
    int64_t width = plan->partial_width, offset = head * values->head_stride, g = 0;
#define ADD(queries)                                                                                                 \
    for (; g + queries <= plan->groups; g += queries)                                                                \
    add_tile(part, begin, end, offset, values->size, weights + g * STRIDE, sums + g * width, width, dtype, queries)
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

static void score_part(const struct plan *plan, const struct part *part, const float *query, float *scores) {
    for (int64_t begin = 0; begin < part->num_tokens; begin += TILE) {
        int64_t end = smaller(begin + TILE, part->num_tokens);
        for (int64_t h = 0; h < part->num_heads; h++) {
            const float *queries = query + h * plan->groups * plan->query_width;
            float *rows = scores + h * plan->groups * STRIDE;
            fetch_ahead(part, &plan->call->keys, part->keys, end, h);
            FOR_DTYPE(plan->product_dtype, score_head, plan, part, begin, end, part->first_head + h, queries, rows)
        }
    }
}

static void add_part(const struct plan *plan, const struct part *part, const float *weights, float *sums) {
    for (int64_t begin = 0; begin < part->num_tokens; begin += TILE) {
        int64_t end = smaller(begin + TILE, part->num_tokens);
        for (int64_t h = 0; h < part->num_heads; h++) {
            const float *rows = weights + h * plan->groups * STRIDE;
            float *sum = sums + h * plan->groups * plan->partial_width;
            fetch_ahead(part, &plan->call->values, part->values, end, h);
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
        for (int64_t j = larger(count - i, 0); j < LANES; j++)
            score[j] = -INFINITY;
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
        for (int64_t g = h * plan->groups; g < (h + 1) * plan->groups; g++) {
            float *kept = partials + g * plan->partial_width;
            memset(kept, 0, sizeof(float) * (size_t)plan->value_width);
            weigh(plan->call, part->num_tokens, scores + g * STRIDE, key_scales, value_scales, kept + plan->value_width,
                  kept + plan->value_width + 1);
        }
    }
}

/* Convert the part's queries to what is multiplied; the end of each row is filled with zeros. */
static void convert_queries(const struct plan *plan, const struct part *part, float *to) {
    const struct penstock_attention *call = plan->call;
    int64_t size = call->keys.size, element = size_of(call->query_dtype);
    int dtype = step_of(plan->product_dtype) > LANES ? PAIRS : call->query_dtype;
    for (int64_t g = 0; g < part->num_heads * plan->groups; g++, to += plan->query_width) {
        const char *from = (const char *)call->query + part->sequence * call->query_stride +
                           (part->first_head * plan->groups + g) * call->query_head_stride;
        for (int64_t d = 0, i = 0; d < size; d += step_of(dtype), i += LANES)
            store_floats(to + i, load_part(from + d * element, dtype, smaller(size - d, step_of(dtype))));
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
    float *scores = query + plan->task_heads * plan->groups * plan->query_width;
    float *partials = plan->partials + (task / plan->num_slices * plan->call->num_query_heads + first_query_head) *
                                           plan->partial_width;
    convert_queries(plan, &part, query);
    score_part(plan, &part, query, scores);
    weigh_part(plan, &part, scores, partials);
    add_part(plan, &part, scores, partials);
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

int penstock_attend_paged(const struct penstock_attention *call) {
    struct plan plan = {.call = call, .groups = call->num_query_heads / call->num_heads};
    if (!is_valid(call))
        return 1;
    plan.product_dtype = paired(call->keys.dtype, call->query_dtype);
    plan.query_width = round_up(call->keys.size, step_of(plan.product_dtype)) / step_of(plan.product_dtype) * LANES;
    plan.value_width = round_up(call->values.size, LANES);
    plan.partial_width = plan.value_width + LANES;
    plan.first_part = malloc(sizeof(int64_t) * (size_t)(call->num_sequences + 1));
    if (!plan.first_part)
        return 2;
    int64_t num_parts = count_parts(&plan);
    choose_slices(&plan, num_parts);
    int64_t num_tasks = num_parts * plan.num_slices, task_rows = plan.task_heads * plan.groups;
    int num_threads = (int)smaller(call->num_threads, larger(num_tasks, 1));
    plan.scratch_width = round_up(task_rows * plan.query_width + larger(task_rows * STRIDE, plan.value_width), LINE);
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
