/* Tensor maps (CUtensorMap, tiled mode), decoded. */
#pragma once
#include "memory.h"

enum { MAP_BYTES = 128, MAP_RANK = 5 };
typedef struct {
    uint64_t address;
    int rank;
    uint32_t element;              /* bytes */
    char kind;                     /* 'u', 's', 'f', 'h' (bf16) */
    uint64_t size[MAP_RANK], stride[MAP_RANK]; /* elements; bytes (stride[0]: of an element) */
    uint32_t box[MAP_RANK], step[MAP_RANK];    /* elements traversed; every step-th of them is copied */
    int swizzle;                   /* 0 to 3: none, 32, 64, 128 bytes */
    bool nan;                      /* what out-of-bounds elements read: NaN, else zero */
} TensorMap;
/* False: `why` says what is wrong with it, or what is not modelled. */
bool tensor_map_decode(const uint8_t *bytes, TensorMap *map, char *why, size_t n);
/* The map behind a generic address, checked and read now. Reports. */
bool tensor_map_read(Warp *warp, const Instr *in, uint64_t address, int rank, TensorMap *map);

/* One copy: which rows of the map, where each lies in shared memory, and what of it is in bounds.
 * Rows are dense without a swizzle. With one they begin a swizzle's width apart, however narrow the box
 * is, and what lies between stays as it was; a barrier counts the bytes of the rows alone. So measured on
 * an H200; the ISA does not say it. */
typedef struct {
    TensorMap map;
    bool gather;                   /* tile::gather4, scatter4: four rows of their own */
    int32_t at[MAP_RANK], row[4];
    uint32_t count[MAP_RANK];      /* elements copied in every dimension */
    uint32_t rows, row_bytes, bytes;
    uint32_t pitch, extent;        /* from row to row in shared memory; bytes from the first to the last */
    uint32_t first, last;          /* elements of a row that are in bounds: [first, last) */
} Box;
/* False: `why` says what is wrong. */
bool box_init(Box *box, char *why, size_t n);
bool box_row(const Box *box, uint32_t row, uint64_t *address); /* of element 0; false: all out of bounds */
bool box_inside(const Box *box);
static inline uint32_t swizzled(uint32_t address, int swizzle) {
    return address ^ (((address >> 7) & ((1u << swizzle) - 1)) << 4);
}
