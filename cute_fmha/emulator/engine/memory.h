/* What memory.c, atomic.c, copy.c and tma.c share: where addresses lead, batched recording of
 * accesses, reductions, and the groups of asynchronous copies that a lane waits for. */
#pragma once
#include "machine.h"

/* Where the bytes behind an address are. */
typedef struct {
    Space space;   /* SPACE_GLOBAL, SPACE_SHARED, SPACE_LOCAL, or SPACE_PARAM (read only, not recorded) */
    Cta *cta;      /* of shared memory */
    uint64_t at;   /* shared offset, local offset, or global address */
    uint8_t *host;
} Place;
bool locate(Warp *warp, const Instr *in, Space space, uint64_t address, uint32_t bytes, int lane, bool write,
            Place *place);
void lane_addresses(Warp *warp, const Instr *in, const Operand *o, uint32_t mask, uint64_t *out);
bool aligned_to(Warp *warp, const Instr *in, uint64_t address, uint32_t bytes, const char *what);
Space space_of(const Warp *warp, Space space, uint64_t address); /* generic ones told apart */
/* Where the lanes' values of a source lie, and the bytes from one lane to the next. */
const uint8_t *source_lanes(Warp *warp, const Instr *in, const Operand *o, uint32_t mask, uint32_t *stride);
Decoded deny(char *why, size_t size, const char *format, ...) __attribute__((format(printf, 3, 4)));
bool space_modifier(const char *part, Space *space);
bool scope_modifier(const char *part);
InstrClass class_of(Space space);
bool cache_modifier(const char *part); /* a modifier without meaning for the values: caches and hints */

/* Neighbouring accesses joined into one record. Counts the bytes, too. */
typedef struct {
    Machine *machine; Agent *agent; const Instr *in;
    bool write; Proxy proxy;
    Space space; Cta *cta; uint64_t at; uint32_t bytes;
} Run;
void run_add(Run *run, Space space, Cta *cta, uint64_t at, uint32_t bytes);
void run_flush(Run *run);

/* ---------------------------------------------------------------- reductions (atomic.c) */
typedef enum { RED_NONE, RED_ADD, RED_MIN, RED_MAX, RED_INC, RED_DEC, RED_AND, RED_OR, RED_XOR, RED_EXCH,
               RED_CAS } RedOp;
typedef struct { uint8_t op, bytes; char kind; bool flush; } Reduction; /* flush: f32 subnormals are zeros */
RedOp red_op(const char *name);
bool reduction_allowed(const Reduction *r);
void reduce(const Reduction *r, void *memory, const void *value, size_t elements);
Decoded decode_address(Decode *d, char *why, size_t n);
Decoded decode_atomic(Decode *d, char *why, size_t n);
Decoded decode_matrix(Decode *d, char *why, size_t n);

/* ---------------------------------------------------------------- groups (copy.c)
 * A transfer is one asynchronous copy of some lanes. A lane numbers its groups; a transfer belongs, for
 * each of its lanes, to the group that was open at its issue. */
typedef struct Transfer Transfer;
struct Transfer {
    uint32_t lanes, group[LANES];
    bool read, done;              /* the source was read; everything happened */
    Clock read_clock, done_clock; /* what a wait for either acquires */
    Transfer *next;
};
Transfer *transfer_open(Warp *warp, uint32_t lanes, bool bulk);
void transfer_read(Machine *machine, Transfer *t, AsyncOp *op);
void transfer_done(Machine *machine, Transfer *t, AsyncOp *op);
void copy_free_groups(Warp *warp);

/* An mbarrier that receives a copy's bytes, at completion. */
bool deliver_bytes(Machine *machine, AsyncOp *op, Cta *cta, uint32_t offset, uint32_t bytes);
bool cta_reachable(Machine *machine, AsyncOp *op, Cta *cta); /* reports a CTA that has exited */
/* The CTAs of a multicast mask; 0 is returned and reported for a mask that names others. */
uint32_t multicast_targets(Warp *warp, const Instr *in, uint32_t mask, Cta **targets);

/* Modelled cycles of the copy engine: lower bounds. */
#define COPY_LATENCY 300.0
#define COPY_BYTES_PER_CYCLE 128.0
static inline void copy_times(AsyncOp *op, double bytes, uint8_t lane_class) {
    op->start = op->warp->now;
    op->finish = op->start + COPY_LATENCY + bytes / COPY_BYTES_PER_CYCLE;
    op->lane_class = lane_class;
}
