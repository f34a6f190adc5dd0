/* What shadow.c, which keeps the accesses to every place, and rules.c, which judges them, share. */
#pragma once
#include "sync.h"

enum { PARTS = 16, ALL_PARTS = 0xffff, MAX_READERS = 16, MAX_CHAIN = 2 * PARTS, AGENT_BITS = 7,
       NODE_CACHE = 4096, PAGE_SHIFT = 14, PAGE_CELLS = 1 << (PAGE_SHIFT - 4), PAGE_CACHE = 64,
       TMEM_GROUPS = TMEM_LANES / PARTS };
enum { NODE_ASYNC = 1, NODE_ATOMIC = 2, NODE_MBARRIER = 4, NODE_FLAGS = 7,
       ACCESS_WRITE = 8, ACCESS_SHARED = 16, ACCESS_TMEM = 32, ACCESS_GLOBAL = 64 };
#define NO_STATE UINT64_MAX /* no cell is ever in it */

typedef struct { uint32_t who, time, pc, next; uint16_t mask, flags; } Node;
typedef struct { uint64_t number; uint64_t *cells; } Page;
typedef struct { uint64_t before, after; uint32_t access, mask; } Memo; /* what an access made of a state */

typedef struct {
    Node *node;
    uint32_t n, capacity, unused, n_unused, collect_at;
    uint32_t cache[NODE_CACHE];
    Page *pages, recent[PAGE_CACHE];
    size_t n_pages, page_capacity;
    /* the access under way */
    Agent *agent;
    const Instr *in;
    uint32_t who, time, pc, flags;
    uint32_t access;             /* counts accesses that differ in these */
    Memo memo[PARTS];            /* by the first part that is touched */
    /* for reports */
    Machine *machine;
    Cta *cta;
    const uint64_t *base;
    uint64_t base_address;
    unsigned reported;
} Shadow;

/* An access against an earlier one of the same place; false if that was reported. */
bool shadow_check_write(Shadow *s, const uint64_t *cell, Node other); /* the earlier one is a write */
bool shadow_check_read(Shadow *s, const uint64_t *cell, Node other);  /* this one writes */
bool shadow_ordered(const Shadow *s, Node other);
void shadow_report_unwritten(Shadow *s, const uint64_t *cell, unsigned mask);
