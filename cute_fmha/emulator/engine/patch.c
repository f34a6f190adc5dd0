/* Patches: one instruction of a decoded program altered, for mutation tests; and watched waits.
 *
 * A patch puts another Instr in the instruction's place, whose function knows the patch. It counts how
 * often lanes got there: an instruction whose guard never holds is not a mutant that was tried.
 */
#include "core.h"
#include "sync.h"

typedef enum {
    PATCH_SKIP,   /* nothing happens */
    PATCH_ASSIGN, /* nothing happens but that the first operand becomes `value` (a predicate: all of it) */
    PATCH_ADD,    /* `value` is added to an operand: to a number, an address's offset, a register's contents */
    PATCH_XOR,    /* the same with exclusive or; a predicate is negated */
    PATCH_RENAME, /* another mnemonic */
    PATCH_WATCH,  /* unchanged; counts whether it tells its warp anything about other agents */
} PatchKind;

typedef struct {
    int kind, operand[3], depth; /* operand: index, then indices of parts */
    int64_t value;
    const char *name;
    uint64_t executions, blocked, idle; /* idle: completed, and the warp's clock was the same before */
    Instr original, instr;       /* what was there; what is executed */
    Operand *target;             /* in instr */
    Clock before;
} Patch;

/* ---------------------------------------------------------------- execution */
static Status exec_skip(Warp *warp, const Instr *in, uint32_t mask) {
    (void)warp, (void)mask;
    ((Patch *)in->data)->executions++;
    return NEXT;
}

static Status exec_assign(Warp *warp, const Instr *in, uint32_t mask) {
    Patch *patch = in->data;
    const Operand *o = &in->args[0];
    patch->executions++;
    if (o->kind == OPERAND_REGISTER && !o->width) set_pred(warp, o, mask, patch->value ? FULL_MASK : 0);
    else FOR_LANES(mask, lane) set_lane(warp, o, (int)lane, (uint64_t)patch->value);
    return NEXT;
}

static Status run_original(Warp *warp, Patch *patch, uint32_t mask) {
    Status status = patch->instr.exec(warp, &patch->instr, mask);
    if (status == BLOCKED) patch->blocked++;
    else patch->executions++;
    return status;
}

static Status exec_changed(Warp *warp, const Instr *in, uint32_t mask) {
    return run_original(warp, in->data, mask);
}

/* Another value in the register for this instruction only, unless the instruction writes it. */
static Status exec_perturbed(Warp *warp, const Instr *in, uint32_t mask) {
    Patch *patch = in->data;
    const Operand *o = patch->target->kind == OPERAND_ADDRESS ? &patch->target->parts[0] : patch->target;
    uint8_t *place = warp->registers + o->offset;
    const uint64_t value = (uint64_t)patch->value;
    uint64_t kept[LANES * 2], changed[LANES * 2];
    size_t bytes = o->width ? (o->width == 8 ? 8 : 4) * (size_t)LANES : 4;
    memcpy(kept, place, bytes);
    if (!o->width) *(uint32_t *)place ^= mask;
    else FOR_LANES(mask, lane) {
        if (o->width == 8) {
            uint64_t *of_lane = (uint64_t *)place + lane;
            *of_lane = patch->kind == PATCH_XOR ? *of_lane ^ value : *of_lane + value;
        } else {
            uint32_t *of_lane = (uint32_t *)place + lane;
            *of_lane = patch->kind == PATCH_XOR ? *of_lane ^ (uint32_t)value : *of_lane + (uint32_t)value;
        }
    }
    memcpy(changed, place, bytes);
    Status status = run_original(warp, patch, mask);
    if (!memcmp(changed, place, bytes)) memcpy(place, kept, bytes);
    return status;
}

/* Whether `after` says more than `before` about agents other than the warp itself. */
static bool learned(const Warp *warp, const Clock *before, const Clock *after) {
    for (int i = 0; i < after->n; i++) {
        const ClockPart *part = &after->part[i], *old = clock_part((Clock *)before, part->cta);
        for (int a = 0; a < AGENTS; a++) {
            if (part->cta == warp->cta->id && a == warp->agent.index) continue;
            if (part->seen[a] > (old ? old->seen[a] : 0) || part->fenced[a] > (old ? old->fenced[a] : 0))
                return true;
            if (wide_clocks && (part->order[a] > (old ? old->order[a] : 0) ||
                                part->tensor[a] > (old ? old->tensor[a] : 0) ||
                                part->view[a] > (old ? old->view[a] : 0)))
                return true;
        }
    }
    return false;
}

/* Loads of the warp itself that a tcgen05.fence::before_thread_sync is the first to cover. */
static bool unfenced_loads(const Warp *warp, const Instr *in) {
    const ClockPart *part = clock_part((Clock *)&warp->clock, warp->cta->id);
    return strstr(in->name, "before_thread_sync") && part && warp->tensor_loaded > part->tensor[warp->index];
}

static Status exec_watched(Warp *warp, const Instr *in, uint32_t mask) {
    Patch *patch = in->data;
    uint64_t executions = patch->executions;
    int loads = warp->n_tmem_loads;
    bool fence = in->class_ == CLASS_FENCE, unfenced = fence && (!wide_clocks || unfenced_loads(warp, &patch->instr));
    clock_copy(&patch->before, warp->agent.clock);
    Status status = run_original(warp, patch, mask);
    if (patch->executions == executions) return status;
    const Operand *o = in->n ? &in->args[0] : NULL;
    if (in->class_ == CLASS_WAIT && o && o->kind == OPERAND_REGISTER && !o->width &&
        (*(const uint32_t *)(warp->registers + o->offset) & mask) != mask) {
        patch->executions--; /* it gave up and will be tried again */
        patch->blocked++;
    } else if (warp->n_tmem_loads == loads && !unfenced && !learned(warp, &patch->before, warp->agent.clock)) {
        patch->idle++;
    }
    return status;
}

/* ---------------------------------------------------------------- making */
static void copy_operand(Program *program, Operand *o) {
    if (!o->count) return;
    Operand *parts = arena(program, o->count * sizeof *parts);
    memcpy(parts, o->parts, o->count * sizeof *parts);
    o->parts = parts;
    for (int i = 0; i < o->count; i++) copy_operand(program, &parts[i]);
}

static void set_immediate(Program *program, Operand *o, int64_t value) {
    o->immediate = value;
    o->broadcast64 = arena(program, LANES * sizeof *o->broadcast64);
    o->broadcast32 = arena(program, LANES * sizeof *o->broadcast32);
    for (int lane = 0; lane < LANES; lane++) {
        o->broadcast64[lane] = (uint64_t)value;
        o->broadcast32[lane] = (uint32_t)value;
    }
}

static bool find_target(Patch *patch) {
    Operand *list = patch->instr.args;
    int n = patch->instr.n;
    for (int i = 0; i < patch->depth; i++) {
        if (patch->operand[i] < 0 || patch->operand[i] >= n) return false;
        patch->target = &list[patch->operand[i]];
        list = patch->target->parts;
        n = patch->target->count;
    }
    return patch->depth > 0;
}

static bool decode_again(Program *program, Patch *patch, char *why, size_t size) {
    Instr *in = &patch->instr;
    in->exec = NULL;
    in->flags = 0;
    in->class_ = CLASS_OTHER;
    memset(in->u, 0, sizeof in->u);
    in->data = NULL;
    return decode_instruction(program, in, why, size);
}

/* Alters the target. *held: its contents are a register's, which is done at every execution. */
static bool alter(Program *program, Patch *patch, bool *held, char *why, size_t size) {
    Operand *o = patch->target;
    const int64_t value = patch->value;
    *held = o->kind == OPERAND_REGISTER || (o->kind == OPERAND_ADDRESS && patch->kind == PATCH_XOR &&
                                            o->parts[0].kind == OPERAND_REGISTER);
    if (*held) return true;
    if (o->kind == OPERAND_ADDRESS) o->immediate += value;
    else if (o->kind == OPERAND_IMMEDIATE)
        set_immediate(program, o, patch->kind == PATCH_XOR ? o->immediate ^ value : o->immediate + value);
    else return snprintf(why, size, "the operand is neither a number nor a register nor an address"), false;
    return decode_again(program, patch, why, size);
}

/* Puts a patch in the place of instruction `pc`; NULL, and why, if it cannot be made. */
Patch *patch_new(Program *program, int pc, int kind, const int *operand, int depth, int64_t value,
                 const char *name, char *why, size_t size) {
    Patch *patch = calloc(1, sizeof *patch);
    if (!patch) abort();
    Instr *place = &program->instrs[pc];
    *patch = (Patch){.kind = kind, .depth = depth, .value = value, .original = *place, .instr = *place};
    for (int i = 0; i < depth && i < 3; i++) patch->operand[i] = operand[i];
    Instr *in = &patch->instr;
    Operand list = {.count = in->n, .parts = in->args};
    copy_operand(program, &list);
    in->args = list.parts;
    Exec exec = exec_changed;
    bool held = false, made = true;
    if (kind == PATCH_SKIP) exec = exec_skip;
    else if (kind == PATCH_ASSIGN) exec = exec_assign;
    else if (kind == PATCH_WATCH) exec = exec_watched;
    else if (kind == PATCH_RENAME) {
        char *kept = arena(program, strlen(name) + 1);
        in->name = strcpy(kept, name);
        made = decode_again(program, patch, why, size);
    } else {
        made = find_target(patch);
        if (!made) snprintf(why, size, "there is no such operand");
        else made = alter(program, patch, &held, why, size);
        if (held) exec = exec_perturbed;
    }
    if (!made) {
        free(patch);
        return NULL;
    }
    Instr wrapper = *in;
    wrapper.exec = exec;
    wrapper.data = patch;
    if (kind == PATCH_SKIP || kind == PATCH_ASSIGN) wrapper.flags = 0;
    *place = wrapper;
    return patch;
}

/* counts: executions, blocked, idle; since the patch was made. */
void patch_counts(const Patch *patch, uint64_t *counts) {
    counts[0] = patch->executions;
    counts[1] = patch->blocked;
    counts[2] = patch->idle;
}

/* Puts the instruction back. */
void patch_free(Program *program, Patch *patch) {
    program->instrs[patch->original.pc] = patch->original;
    clock_free(&patch->before);
    free(patch);
}
