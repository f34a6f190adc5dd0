/* The descriptors of tcgen05.mma and tcgen05.cp: what they say, and what is illegal.
 *
 * A shared-memory tile is made of 16-byte chunks. In units of chunks and bytes, with W the width of the
 * swizzle (16, 32, 64, 128 bytes) and n = W / 16:
 *   K-major   row r, chunk c:   (r % 8) W + (r / 8) SBO + c 16 (without swizzle: c LBO)
 *   MN-major  chunk c, k:       (c % n) 16 + (c / n) LBO + (k % 8) W + (k / 8) SBO; without swizzle
 *                               c SBO + (k % 8) 16 + (k / 8) LBO
 * added to the start address; then bits 4.. of the absolute address are XORed with bits 7.. of it. As the
 * XOR sees the sum, a start address may lie inside of a swizzle atom: that is how one advances along K.
 * A base offset b says that the pattern of the swizzle starts b * 128 bytes after a multiple of its
 * period, so that the XOR takes (address >> 7) - b.
 */
#include "tensor.h"
#include <stdarg.h>

static bool wrong(char *why, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
static bool wrong(char *why, size_t size, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, size, format, arguments);
    va_end(arguments);
    return false;
}

/* ---------------------------------------------------------------- shared-memory tiles */
bool smem_descriptor(uint64_t bits, SmemTile *tile, bool *unmodelled, char *why, size_t size) {
    static const int8_t swizzles[8] = {0, -1, 3, -1, 2, -1, 1, -1};
    unsigned layout = (unsigned)(bits >> 61), version = (unsigned)(bits >> 46 & 7);
    *unmodelled = false;
    *tile = (SmemTile){.start = (uint32_t)(bits & 0x3fff) << 4,
                       .leading = (uint32_t)(bits >> 16 & 0x3fff) << 4,
                       .stride = (uint32_t)(bits >> 32 & 0x3fff) << 4, .base = bits >> 49 & 7};
    if (version != 1)
        return wrong(why, size, "bits 46..48 of a shared-memory descriptor must be 1, not %u (0x%016llx)",
                     version, (unsigned long long)bits);
    if (bits >> 53 & 0xff)
        return wrong(why, size, "bits 53..60 of a shared-memory descriptor must be 0 (0x%016llx)",
                     (unsigned long long)bits);
    if (layout == 1 || bits >> 52 & 1) {
        *unmodelled = true;
        return wrong(why, size, "%s is not modelled (descriptor 0x%016llx)",
                     layout == 1 ? "128-byte swizzle with 32-byte atoms"
                         : "an absolute leading-dimension address",
                     (unsigned long long)bits);
    }
    if (swizzles[layout] < 0) return wrong(why, size, "there is no swizzling mode %u", layout);
    tile->swizzle = (uint8_t)swizzles[layout];
    return true;
}

static uint32_t swizzled(const SmemTile *tile, uint32_t address) {
    return address ^ ((((address >> 7) - tile->base) & ((1u << tile->swizzle) - 1)) << 4);
}

static uint32_t chunk_offset(const SmemTile *tile, Major major, uint32_t line, uint32_t c) {
    uint32_t width = 16u << tile->swizzle, n = 1u << tile->swizzle;
    if (major == MAJOR_K)
        return line % 8 * width + line / 8 * tile->stride + c * (tile->swizzle ? 16 : tile->leading);
    if (!tile->swizzle) return c * tile->stride + line % 8 * 16 + line / 8 * tile->leading;
    return c % n * 16 + c / n * tile->leading + line % 8 * width + line / 8 * tile->stride;
}

static int by_offset(const void *a, const void *b) {
    int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return x < y ? -1 : x > y;
}

static void find_runs(Geometry *g) {
    size_t n = (size_t)g->lines * g->chunks;
    int32_t *sorted = malloc(n * sizeof *sorted);
    g->run = malloc(n * sizeof *g->run);
    if (!sorted || !g->run) abort();
    memcpy(sorted, g->chunk, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, by_offset);
    g->runs = 0;
    for (size_t i = 0; i < n; i++) {
        ChunkRun *last = g->runs ? &g->run[g->runs - 1] : NULL;
        if (last && last->offset + (int32_t)last->bytes >= sorted[i])
            last->bytes = (uint32_t)(sorted[i] + 16 - last->offset);
        else
            g->run[g->runs++] = (ChunkRun){sorted[i], 16};
    }
    g->low = sorted[0];
    g->high = sorted[n - 1] + 16;
    free(sorted);
}

static void fill_geometry(Geometry *g, const SmemTile *tile) {
    uint32_t base = base_of(tile->start);
    g->chunk = malloc((size_t)g->lines * g->chunks * sizeof *g->chunk);
    if (!g->chunk) abort();
    for (uint32_t l = 0; l < g->lines; l++)
        for (uint32_t c = 0; c < g->chunks; c++) {
            uint32_t address = tile->start + chunk_offset(tile, g->major, l, c);
            g->chunk[l * g->chunks + c] = (int32_t)(swizzled(tile, address) - base);
        }
    find_runs(g);
}

/* A kernel uses few layouts, each at few phases of its swizzle. */
const Geometry *tile_geometry(const SmemTile *tile, Major major, uint32_t lines, uint32_t chunks) {
    enum { CACHE = 256, WAYS = 4 };
    static Geometry cache[CACHE][WAYS];
    static uint8_t next[CACHE];
    uint32_t phase = tile->start & 1023;
    uint32_t hash = (tile->leading * 31 + tile->stride) * 0x9e3779b1u ^ (phase >> 4) * 0x85ebca6bu ^
                    (lines * 64 + chunks) * 0xc2b2ae35u ^
                        (uint32_t)(major * 16 + tile->swizzle * 32 + tile->base) * 0x165667b1u;
    hash = (hash ^ hash >> 15) % CACHE;
    for (int i = 0; i < WAYS; i++) {
        const Geometry *g = &cache[hash][i];
        if (g->chunk && g->phase == phase && g->leading == tile->leading && g->stride == tile->stride &&
            g->lines == lines && g->chunks == chunks && g->major == major && g->swizzle == tile->swizzle &&
            g->base == tile->base)
            return g;
    }
    Geometry *g = &cache[hash][next[hash]++ % WAYS];
    free(g->chunk);
    free(g->run);
    *g = (Geometry){.leading = tile->leading, .stride = tile->stride, .phase = phase,
                    .lines = lines, .chunks = chunks,
                    .swizzle = tile->swizzle, .base = tile->base, .major = (uint8_t)major};
    fill_geometry(g, tile);
    return g;
}

const uint8_t *tile_access(Machine *machine, AsyncOp *op, Cta *cta, const SmemTile *tile, const Geometry *g) {
    int64_t base = base_of(tile->start);
    if (base + g->low < 0 || base + g->high > (int64_t)cta->shared_bytes) {
        report(machine, FINDING_BOUNDS, op->warp, op->in, true,
               "the tile that a shared-memory descriptor describes reaches bytes %lld..%lld of %u of CTA %u",
               (long long)(base + g->low), (long long)(base + g->high), cta->shared_bytes, cta->id);
        return NULL;
    }
    if (machine->config.races)
        for (int i = 0; i < g->runs; i++)
            access_shared(&op->agent, cta, (uint32_t)(base + g->run[i].offset), g->run[i].bytes, false,
                          ASYNC_PROXY, op->in);
    return cta->shared + base;
}

/* ---------------------------------------------------------------- instruction descriptors */
static bool choose_formats(MmaKind kind, unsigned a, unsigned b, unsigned d, MmaShape *s, bool *unmodelled,
                           char *why, size_t size) {
    static const int8_t f8[8] = {ELEMENT_E4M3, ELEMENT_E5M2, -1, ELEMENT_E2M3, ELEMENT_E3M2, ELEMENT_E2M1, -1,
                                 -1};
    s->d = (uint8_t)d;
    switch (kind) {
    case KIND_F16:
        if (a > 1 || b > 1) return wrong(why, size, "kind::f16 has no input formats %u and %u", a, b);
        if (d > 1) return wrong(why, size, "kind::f16 has no accumulator format %u", d);
        if (d == ACCUMULATE_F16 && (a || b)) return wrong(why, size, "bf16 inputs need an f32 accumulator");
        if (a != b) {
            *unmodelled = true;
            return wrong(why, size, "kind::f16 with one f16 and one bf16 operand is not modelled");
        }
        s->a = s->b = a ? ELEMENT_BF16 : ELEMENT_F16;
        s->k = 16;
        return true;
    case KIND_F8F6F4:
        if (f8[a] < 0 || f8[b] < 0)
            return wrong(why, size, "kind::f8f6f4 has no input formats %u and %u", a, b);
        if (d > 1) return wrong(why, size, "kind::f8f6f4 has no accumulator format %u", d);
        s->a = (uint8_t)f8[a];
        s->b = (uint8_t)f8[b];
        s->k = 32;
        return true;
    case KIND_I8:
        if (a > 1 || b > 1) return wrong(why, size, "kind::i8 has no input formats %u and %u", a, b);
        if (d != ACCUMULATE_S32)
            return wrong(why, size, "kind::i8 accumulates in s32 (2), not in format %u", d);
        s->a = a ? ELEMENT_S8 : ELEMENT_U8;
        s->b = b ? ELEMENT_S8 : ELEMENT_U8;
        s->k = 32;
        return true;
    }
    return false;
}

static bool shape_exists(const MmaShape *s, MmaKind kind, int group, bool ws) {
    int m = s->m, n = s->n;
    if (ws) return group == 1 && (m == 32 || m == 64 || m == 128) && (n == 64 || n == 128 || n == 256);
    if (group == 1 ? m != 64 && m != 128 : m != 128 && m != 256) return false;
    int step = group == 1 ? 8 : 16;
    if (kind == KIND_I8) step = group == 2 ? 32 : n <= 32 ? 8 : 16;
    return n >= step && n <= 256 && n % step == 0;
}

bool instruction_descriptor(uint32_t bits, MmaKind kind, int group, bool ws, MmaShape *s, bool *unmodelled,
                            char *why, size_t size) {
    *unmodelled = false;
    *s = (MmaShape){.m = (int)(bits >> 24 & 31) << 4, .n = (int)(bits >> 17 & 63) << 3,
                    .saturate = bits >> 3 & 1,
                    .a_negate = bits >> 13 & 1, .b_negate = bits >> 14 & 1, .a_major = bits >> 15 & 1,
                    .b_major = bits >> 16 & 1};
    if (!choose_formats(kind, bits >> 7 & 7, bits >> 10 & 7, bits >> 4 & 3, s, unmodelled, why, size))
        return false;
    if (bits & 4) return wrong(why, size, "the sparsity bit is set in a dense tcgen05.mma");
    if (bits & (1u << 6 | 1u << 23 | 1u << 29))
        return wrong(why, size, "reserved bits are set in the instruction descriptor 0x%08x", bits);
    if (s->saturate && kind != KIND_I8) return wrong(why, size, "saturation exists for integers only");
    if ((s->a_negate || s->b_negate) && kind == KIND_I8) return wrong(why, size, "kind::i8 cannot negate");
    if (bits >> 30 && !ws) return wrong(why, size, "a maximum shift is for tcgen05.mma.ws only");
    if (!shape_exists(s, kind, group, ws))
        return wrong(why, size, "there is no M = %d, N = %d for this kind%s with cta_group::%d", s->m, s->n,
                     ws ? " of .ws" : "", group);
    if ((s->a_major && element_packed(s->a)) || (s->b_major && element_packed(s->b)))
        return wrong(why, size, "4-bit and 6-bit operands cannot be transposed");
    if (s->b_major && kind != KIND_F16 && s->n % (16 * group))
        return wrong(why, size, "a transposed 8-bit B needs N in steps of %d, not %d", 16 * group, s->n);
    return true;
}

/* A sub-mask of count bits for every M-dependent part of N: after `start` bits of a periodic sequence of
 * used (0) and skipped (1) columns, which starts with the skipped ones if first is set. */
bool zero_columns(uint64_t bits, int m, int n, bool *zero, char *why, size_t size) {
    memset(zero, 0, (size_t)n);
    if (bits >> 56 & 63) return wrong(why, size, "a column shift in the zero-column mask is not modelled");
    if (!(bits >> 39 & 1)) return true;
    int masks = m == 128 ? 1 : m == 64 ? 2 : 4;
    int skip = (int)(bits >> 40 & 255) + 1, use = (int)(bits >> 48 & 255) + 1, count = n / masks;
    for (int i = 0; i < masks; i++) {
        int start = (int)(bits >> (8 * i) & 255), first = (int)(bits >> (32 + i) & 1);
        for (int j = 0; j < count; j++) {
            int at = (start + j) % (skip + use);
            zero[i * count + j] = first ? at < skip : at >= use;
        }
    }
    return true;
}
