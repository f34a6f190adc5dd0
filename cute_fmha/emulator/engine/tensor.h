/* What the tcgen05 files share: tmem.c (loads, stores), tmem_alloc.c, tmem_copy.c (cp, commit), mma.c,
 * descriptors.c (what the 64-bit and 32-bit descriptors say).
 *
 * Every warp has its Traffic: the stores it has in flight land in order and are waited for together; the
 * loads it remembers until they are waited for or used, because until then the read may still happen. */
#pragma once
#include "machine.h"

typedef struct { int lane, lanes, column, columns, second; /* -1, or where a second access begins */ } Span;
typedef struct { Span span; uint32_t time; const Instr *in; } PendingLoad;
enum { PENDING_LOADS = 64 };
typedef struct {
    Queue stores;
    Clock stored;                          /* what wait::st acquires */
    PendingLoad loads[PENDING_LOADS]; int n_loads;
} Traffic;

/* ---------------------------------------------------------------- TMEM addresses */
static inline int tmem_lane(uint32_t address) { return (int)(address >> 16); }
static inline int tmem_column(uint32_t address) { return (int)(address & 0xffff); }
/* Whether columns [column, column + columns) exist and are allocated; reports if not. */
bool tmem_allocated(Machine *machine, const Warp *warp, const Instr *in, const Cta *cta, int column,
                    int columns);
/* The two CTAs of a pair, even rank first; false and reported if there is no live peer. */
bool cta_pair(Warp *warp, const Instr *in, Cta *pair[2]);

/* ---------------------------------------------------------------- decoding */
Decoded tensor_refuse(char *why, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The N of .cta_group::N; 0 and a reason if it is missing or differs from other tcgen05 instructions. */
int cta_group(const Decode *d, char *why, size_t size);
/* One of the modifiers that is not in the list (NULL-terminated), or NULL. */
const char *unknown_modifier(const Decode *d, int from, const char *const *known);
Decoded decode_tmem_copy(Decode *d, char *why, size_t size);
Decoded decode_tmem_alloc(Decode *d, char *why, size_t size);
Status whole_warp(Warp *warp, const Instr *in, uint32_t mask); /* FATAL and reported if lanes are missing */

/* ---------------------------------------------------------------- shared-memory descriptors */
typedef enum { MAJOR_K, MAJOR_MN } Major;
typedef struct { uint32_t start, leading,
                stride; uint8_t swizzle; /* log2 of 16-byte chunks */ uint8_t base; } SmemTile;
/* False: `why` says what is wrong, *unmodelled whether it is legal all the same. */
bool smem_descriptor(uint64_t bits, SmemTile *tile, bool *unmodelled, char *why, size_t size);

/* Where the 16-byte chunks of a tile are. Chunk c of line l is at chunk[l * chunks + c] + base_of(start):
 * a line is a row (K-major) or one k (MN-major). `run`: the same bytes as few contiguous pieces. */
typedef struct { int32_t offset; uint32_t bytes; } ChunkRun;
typedef struct {
    uint32_t leading, stride, phase, lines, chunks; uint8_t swizzle, base, major;
    int32_t *chunk; ChunkRun *run; int runs; int32_t low, high; /* bytes touched, from base_of(start) */
} Geometry;
static inline uint32_t base_of(uint32_t start) { return start & ~1023u; }
const Geometry *tile_geometry(const SmemTile *tile, Major major, uint32_t lines, uint32_t chunks);
/* Bounds, and the accesses of an asynchronous operation; the first byte of shared memory, or NULL. */
const uint8_t *tile_access(Machine *machine, AsyncOp *op, Cta *cta, const SmemTile *tile,
                           const Geometry *geometry);

/* ---------------------------------------------------------------- instruction descriptors */
typedef enum { KIND_F16, KIND_F8F6F4, KIND_I8 } MmaKind;
typedef enum { ELEMENT_F16, ELEMENT_BF16, ELEMENT_E4M3, ELEMENT_E5M2, ELEMENT_E2M3, ELEMENT_E3M2,
              ELEMENT_E2M1,
               ELEMENT_U8, ELEMENT_S8 } Element;
typedef enum { ACCUMULATE_F16, ACCUMULATE_F32, ACCUMULATE_S32 } Accumulate;
typedef struct {
    int m, n, k;
    uint8_t a, b, d;                /* Element, Element, Accumulate */
    uint8_t a_major, b_major;
    bool a_negate, b_negate, saturate;
} MmaShape;
bool instruction_descriptor(uint32_t bits, MmaKind kind, int group, bool ws, MmaShape *shape,
                            bool *unmodelled,
                            char *why, size_t size);
/* Which columns of B count as zero; false if the descriptor asks for what is not modelled. */
bool zero_columns(uint64_t bits, int m, int n, bool *zero, char *why, size_t size);
static inline bool element_packed(Element e) { return e == ELEMENT_E2M3 || e == ELEMENT_E3M2 ||
                                              e == ELEMENT_E2M1; }
static inline int element_bytes(Element e) { return e <= ELEMENT_BF16 ? 2 : 1; }
