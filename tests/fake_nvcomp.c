/* Stands for nvCOMP where there is no GPU: the same symbols, on host memory. It looks at what it is given as closely as
   the real library's header asks, and codes bytes below the largest by up to 14 in 4 bits, other ones after these. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct { int type, data_type; uint8_t subs, states, histogram; char reserved[53]; } compress_options;
typedef struct { int backend, data_type; uint8_t subs, states, skip; char reserved[53]; } decompress_options;
typedef struct { size_t input, output, temp; } alignments;
typedef struct { uint32_t version, cudart; } properties;

enum { INVALID = 10, CANNOT_DECOMPRESS = 12, TOO_SMALL = 15, UNALIGNED = 17, MAGIC = 0xA25 };

#ifndef VERSION
#define VERSION 6000
#endif

static int clean(const char *reserved) {
    for (int i = 0; i < 53; i++) if (reserved[i]) return 0;
    return 1;
}
static int fine(compress_options o) { return o.type == 0 && o.data_type == 0 && !o.subs && o.states < 3 && !o.histogram && clean(o.reserved); }
static int good(decompress_options o) { return o.backend == 0 && o.data_type == 0 && !o.subs && o.states < 3 && !o.skip && clean(o.reserved); }

int nvcompGetProperties(properties *p) { p->version = VERSION; p->cudart = 13000; return 0; }
const char *nvcompGetStatusString(int status) { return status == INVALID ? "an invalid value" : "another error"; }

int nvcompBatchedANSCompressGetRequiredAlignments(compress_options o, alignments *a) {
    a->input = 1; a->output = 16; a->temp = 8;
    return fine(o) ? 0 : INVALID;
}
int nvcompBatchedANSDecompressGetRequiredAlignments(decompress_options o, alignments *a) {
    a->input = 16; a->output = 16; a->temp = 8;
    return good(o) ? 0 : INVALID;
}
int nvcompBatchedANSCompressGetMaxOutputChunkSize(size_t n, compress_options o, size_t *most) {
    *most = 16 + 2 * n;
    return fine(o) ? 0 : INVALID;
}
int nvcompBatchedANSCompressGetTempSize(size_t count, size_t chunk, compress_options o, size_t *temp, size_t total, void *s) {
    *temp = 24 * count;
    return fine(o) && total <= count * chunk && !s ? 0 : INVALID;
}
int nvcompBatchedANSDecompressGetTempSize(size_t count, size_t chunk, decompress_options o, size_t *temp, size_t total, void *s) {
    *temp = 8 * count;
    return good(o) && total <= count * chunk && !s ? 0 : INVALID;
}

static size_t pack(const uint8_t *in, size_t n, uint8_t *out) {
    uint32_t head[3] = {MAGIC, (uint32_t)n, 0};
    for (size_t i = 0; i < n; i++) if (in[i] > head[2]) head[2] = in[i];
    size_t at = sizeof head, end = at + (n + 1) / 2;
    memset(out + at, 0, (n + 1) / 2);
    for (size_t i = 0; i < n; i++) {
        unsigned code = head[2] - in[i];
        if (code > 14) { code = 15; out[end++] = in[i]; }
        out[at + i / 2] |= (uint8_t)(code << 4 * (i % 2));
    }
    memcpy(out, head, sizeof head);
    return end;
}

int nvcompBatchedANSCompressAsync(const uint8_t *const *sources, const size_t *sizes, size_t chunk, size_t count,
                                  uint8_t *temp, size_t temp_size, uint8_t *const *targets, size_t *made,
                                  compress_options o, int *statuses, void *stream) {
    if (!fine(o) || stream || temp_size < 24 * count || !statuses) return INVALID;
    memset(temp, 0xEE, temp_size);
    for (size_t i = 0; i < count; i++) {
        if (sizes[i] > chunk || !sizes[i]) return INVALID;
        if ((uintptr_t)targets[i] % 16) return UNALIGNED;
        made[i] = pack(sources[i], sizes[i], targets[i]);
        statuses[i] = 0;
    }
    return 0;
}

static int unpack(const uint8_t *in, size_t size, uint8_t *out, size_t room, size_t *made) {
    uint32_t head[3];
    *made = 0;
    if (size < sizeof head) return CANNOT_DECOMPRESS;
    memcpy(head, in, sizeof head);
    size_t n = head[1], at = sizeof head, end = at + (n + 1) / 2;
    if (head[0] != MAGIC || n > room || end > size) return CANNOT_DECOMPRESS;
    for (size_t i = 0; i < n; i++) {
        unsigned code = in[at + i / 2] >> 4 * (i % 2) & 15;
        if (code == 15 && end >= size) return CANNOT_DECOMPRESS;
        out[i] = code == 15 ? in[end++] : (uint8_t)(head[2] - code);
    }
    *made = n;
    return end == size ? 0 : CANNOT_DECOMPRESS;
}

int nvcompBatchedANSDecompressAsync(const uint8_t *const *sources, const size_t *sizes, const size_t *rooms, size_t *made,
                                    size_t count, uint8_t *temp, size_t temp_size, uint8_t *const *targets,
                                    decompress_options o, int *statuses, void *stream) {
    if (!good(o) || stream || temp_size < 8 * count || !statuses) return INVALID;
    memset(temp, 0xEE, temp_size);
    for (size_t i = 0; i < count; i++) {
        if ((uintptr_t)sources[i] % 16 || (uintptr_t)targets[i] % 16) return UNALIGNED;
        statuses[i] = unpack(sources[i], sizes[i], targets[i], rooms[i], &made[i]);
    }
    return 0;
}
