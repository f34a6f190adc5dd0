/* Decoding of tensor maps, and the geometry of a box of one. */
#include "tensormap.h"
#include <stdarg.h>

/* ---------------------------------------------------------------- decoding
 * Bit positions as the tensormap.replace instruction writes them. */
static uint32_t word_at(const uint8_t *bytes, int offset) {
    uint32_t v;
    memcpy(&v, bytes + offset, 4);
    return v;
}

static bool wrong(char *why, size_t n, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(why, n, format, list);
    va_end(list);
    return false;
}

static bool decode_type(uint32_t code, TensorMap *map) {
    static const struct { uint8_t bytes; char kind; } types[] = {
        {1, 'u'}, {2, 'u'}, {4, 'u'}, {4, 's'}, {8, 'u'}, {8, 's'},
        {2, 'f'}, {4, 'f'}, {0, 0},   {8, 'f'}, {2, 'h'}};
    if (code >= sizeof types / sizeof *types || !types[code].bytes) return false;
    map->element = types[code].bytes;
    map->kind = types[code].kind;
    return true;
}

static bool decode_flags(uint32_t flags, TensorMap *map, char *why, size_t n) {
    /* CuTe DSL's host code, for Blackwell, writes 2; the driver, on Hopper, 0. */
    if (flags & 15 & ~2u) return wrong(why, n, "this is no tiled tensor map (0x%08x)", flags);
    map->rank = (int)(flags >> 4 & 7) + 1;
    if (map->rank > MAP_RANK) return wrong(why, n, "rank %d", map->rank);
    uint32_t type = flags >> 7 & 15;
    if (!decode_type(type, map)) return wrong(why, n, "element type %u is not modelled", type);
    if (flags >> 11 & 3) return wrong(why, n, "interleaved layouts are not modelled");
    map->swizzle = (int)(flags >> 13 & 3);
    map->nan = flags >> 15 & 1;
    if (flags >> 16 & 1) return wrong(why, n, "conversion to tf32 is not modelled");
    if (flags >> 19 & 3) return wrong(why, n, "swizzles of atoms other than 16 bytes are not modelled");
    if (flags >> 22 & 1) return wrong(why, n, "the 96-byte swizzle is not modelled");
    return true;
}

static bool check_map(const TensorMap *map, char *why, size_t n) {
    uint32_t inner = map->box[0] * map->element;
    if (!map->address || map->address & 15)
        return wrong(why, n, "the address 0x%llx is not a multiple of 16", (unsigned long long)map->address);
    if (inner & 15) return wrong(why, n, "the box is %u bytes wide, not a multiple of 16", inner);
    if (map->swizzle && inner > 16u << map->swizzle)
        return wrong(why, n, "the box is %u bytes wide, more than its swizzle of %u", inner,
                     16u << map->swizzle);
    if (map->nan && map->kind != 'f' && map->kind != 'h') return wrong(why, n, "NaN to fill integers");
    return true;
}

bool tensor_map_decode(const uint8_t *bytes, TensorMap *map, char *why, size_t n) {
    *map = (TensorMap){0};
    memcpy(&map->address, bytes, 8);
    if (!decode_flags(word_at(bytes, 8), map, why, n)) return false;
    uint32_t high = word_at(bytes, 28), steps = word_at(bytes, 52);
    map->stride[0] = map->element;
    for (int i = 0; i < MAP_RANK; i++) {
        bool used = i < map->rank;
        map->size[i] = used ? (uint64_t)word_at(bytes, 32 + 4 * i) + 1 : 1;
        map->box[i] = used ? bytes[55 + i] + 1u : 1;
        map->step[i] = used && i ? (steps >> 3 * i & 7) + 1 : 1; /* the innermost one is ignored */
        if (!i) continue;
        uint64_t above = high >> 4 * (i - 1) & 15;
        map->stride[i] = used ? (word_at(bytes, 8 + 4 * i) | above << 32) << 4 : 0;
    }
    return check_map(map, why, n);
}

bool tensor_map_read(Warp *w, const Instr *in, uint64_t address, int rank, TensorMap *map) {
    char why[160];
    Place p;
    if (address & 63) {
        fail(w, in, FINDING_ALIGNMENT, "tensor map at 0x%llx, not a multiple of 64",
             (unsigned long long)address);
        return false;
    }
    if (!locate(w, in, SPACE_GENERIC, address, MAP_BYTES, 0, false, &p)) return false;
    if (p.space != SPACE_GLOBAL && p.space != SPACE_PARAM) {
        fail(w, in, FINDING_DESCRIPTOR, "a tensor map in neither parameters nor global memory");
        return false;
    }
    if (p.space == SPACE_GLOBAL) access_global(&w->agent, address, MAP_BYTES, false, GENERIC_PROXY, in);
    if (!tensor_map_decode(p.host, map, why, sizeof why)) {
        fail(w, in, FINDING_DESCRIPTOR, "tensor map: %s", why);
        return false;
    }
    if (map->rank != rank) {
        fail(w, in, FINDING_DESCRIPTOR, "a tensor map of rank %d in an instruction for %d", map->rank, rank);
        return false;
    }
    return true;
}

/* ---------------------------------------------------------------- geometry */
bool box_init(Box *box, char *why, size_t n) {
    const TensorMap *map = &box->map;
    /* Hopper raises an illegal instruction. Any multiple of 16 bytes will do, out of bounds or not. */
    int64_t inner = (int64_t)box->at[0] * map->element;
    if (inner % 16)
        return wrong(why, n, "the box begins %lld bytes into its rows, not a multiple of 16",
                     (long long)inner);
    box->rows = box->gather ? 4 : 1;
    for (int i = 0; i < MAP_RANK; i++) {
        box->count[i] = (map->box[i] + map->step[i] - 1) / map->step[i];
        if (i && !box->gather) box->rows *= box->count[i];
    }
    box->row_bytes = map->box[0] * map->element;
    box->bytes = box->rows * box->row_bytes;
    box->pitch = map->swizzle ? 16u << map->swizzle : box->row_bytes;
    box->extent = map->swizzle ? (box->rows * box->pitch + 127) & ~127u : box->bytes;
    int64_t left = (int64_t)map->size[0] - box->at[0]; /* elements to the right of the box's left edge */
    int64_t first = box->at[0] < 0 ? -(int64_t)box->at[0] : 0;
    box->first = first > map->box[0] ? map->box[0] : (uint32_t)first;
    box->last = left < 0 ? 0 : left > map->box[0] ? map->box[0] : (uint32_t)left;
    if (box->last < box->first) box->last = box->first;
    if (box->extent <= SHARED_CAPACITY) return true;
    return wrong(why, n, "a box of %u bytes, more than shared memory holds", box->extent);
}

bool box_row(const Box *box, uint32_t row, uint64_t *address) {
    const TensorMap *map = &box->map;
    int64_t offset = (int64_t)box->at[0] * map->element;
    for (int i = 1; i < map->rank; i++) {
        int64_t at = box->gather ? box->row[row] : box->at[i] + (int64_t)(row % box->count[i]) * map->step[i];
        if (!box->gather) row /= box->count[i];
        if (at < 0 || at >= (int64_t)map->size[i]) return false;
        offset += at * (int64_t)map->stride[i];
    }
    *address = map->address + (uint64_t)offset;
    return box->first < box->last;
}

bool box_inside(const Box *box) {
    if (box->gather || box->first || box->last != box->map.box[0]) return false;
    for (int i = 1; i < box->map.rank; i++) {
        int64_t last = box->at[i] + (int64_t)(box->count[i] - 1) * box->map.step[i];
        if (box->at[i] < 0 || last >= (int64_t)box->map.size[i]) return false;
    }
    return true;
}
