/* What clocks.c, shadow.c, async.c and barrier.c share among themselves. */
#pragma once
#include "machine.h"

enum { ASYNC_STRIDE = 32 }; /* times an asynchronous operation may use for itself */

/* By scope: what fence.acq_rel of a warp made releasable, and what its relaxed reads have seen since. */
typedef struct { Clock released[SCOPES], pending[SCOPES]; } Fences;
typedef struct {
    Fences warp[MAX_WARPS];
    uint32_t slot_time[AGENTS - AGENT_ASYNC]; /* of the last operation in every asynchronous slot */
    uint32_t slot_store[AGENTS - AGENT_ASYNC]; /* of the last tcgen05.st in it */
    struct { const Warp *warp; const Instr *in; double now; int slot; } last_issue; /* see async_new */
    Clock mbarrier_fence;                     /* all that fence.mbarrier_init of this CTA's warps covered */
} CtaSync;
CtaSync *sync_of(Cta *cta); /* made on first use */

ClockPart *clock_part(Clock *clock, uint32_t cta);      /* NULL: nothing is known of that CTA */
ClockPart *clock_part_made(Clock *clock, uint32_t cta); /* added if missing */
uint32_t agent_time(Agent *agent);
bool clock_covers(const Clock *clock, const Clock *other);

/* The clock kept at the address of an atomic; without acquire or release only fences give it effect. */
void atomic_acquire(Agent *agent, Space space, const Cta *cta, uint64_t address, Scope scope, bool acquire);
void atomic_release(Agent *agent, Space space, const Cta *cta, uint64_t address, Scope scope, bool release);
void atomic_clocks_free(Machine *machine);

/* Bytes of mbarrier objects: initialisation and invalidation write them, every use reads them. */
typedef enum { MBARRIER_USE, MBARRIER_INIT } MBarrierAccess;
void access_mbarrier(Agent *agent, Cta *cta, uint32_t offset, MBarrierAccess kind, Proxy proxy,
                     const Instr *in);

Decoded decode_mbarrier(Decode *d, char *why, size_t n);
void barrier_free_cta(Cta *cta); /* mbarrier objects and the clocks of all barriers */

/* The plain store whose access is being recorded (memory.c), and whether it leaves as they are those of the
 * bytes [at, at + 16) that the mask names, of a CTA's shared memory or of global memory. */
extern const struct StoreUnderWay *store_under_way;
bool store_keeps_bytes(const Cta *cta, uint64_t at, uint32_t mask);

extern AsyncOp *async_running; /* whose run() is being called, for reports */
