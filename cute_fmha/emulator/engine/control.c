/* Branches, exit, and instructions in which the lanes of a warp act together. */
#include "core.h"

/* ---------------------------------------------------------------- branches */
static Status do_branch(Warp *w, const Instr *in, uint32_t mask) {
    fragments_jump(w, mask, (uint32_t)in->args[0].immediate, in->pc + 1);
    return JUMPED;
}

static Status do_uniform_branch(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t here = w->fragment[w->current].mask;
    if (mask != here)
        report(w->machine, FINDING_DIVERGENCE, w, in, false,
               "%s promises that all lanes agree, but of %08x only %08x take it", in->name, here, mask);
    return do_branch(w, in, mask);
}

static Status do_indexed_branch(Warp *w, const Instr *in, uint32_t mask) {
    const uint32_t *index = src32(w, in, &in->args[0], mask);
    const Operand *table = &in->args[1];
    uint32_t lanes_of[LANES], target_of[LANES];
    int targets = 0;
    FOR_LANES(mask, lane) {
        if (index[lane] >= table->count)
            return fail(w, in, FINDING_OTHER, "index %u into a table of %u targets", index[lane], table->count);
        uint32_t target = (uint32_t)table->parts[index[lane]].immediate;
        int i = 0;
        while (i < targets && target_of[i] != target) i++;
        if (i == targets) target_of[targets] = target, lanes_of[targets++] = 0;
        lanes_of[i] |= 1u << lane;
    }
    if (in->u[0] && targets > 1)
        report(w->machine, FINDING_DIVERGENCE, w, in, false, "%s promises that all lanes agree; they take %d targets",
               in->name, targets);
    /* One target after the other leaves the current fragment; the last one is where it goes itself. */
    for (int i = 0; i < targets; i++) fragments_jump(w, lanes_of[i], target_of[i], in->pc + 1);
    return JUMPED;
}

static Status do_exit(Warp *w, const Instr *in, uint32_t mask) {
    fragments_exit(w, mask, in->pc + 1);
    return JUMPED;
}

static Status do_trap(Warp *w, const Instr *in, uint32_t mask) {
    return fail(w, in, FINDING_OTHER, "trap executed by lanes %08x", mask);
}

static Status do_nothing(Warp *w, const Instr *in, uint32_t mask) {
    (void)w, (void)in, (void)mask;
    return NEXT;
}

/* ---------------------------------------------------------------- acting together
 * The lanes of `mask` fall into groups that name the same member mask. All live members have to be
 * here; otherwise they wait for the missing ones. */
static bool member_group(Warp *w, const Instr *in, const Operand *o, uint32_t mask, uint32_t *group, uint32_t *members) {
    const uint32_t *value = src32(w, in, o, mask);
    int first = __builtin_ctz(mask);
    *members = value[first];
    *group = 0;
    FOR_LANES(mask, lane) if (value[lane] == *members) *group |= 1u << lane;
    if (~*members & *group) {
        fail(w, in, FINDING_DIVERGENCE, "lanes %08x execute it with the member mask %08x, which lacks them",
             *group & ~*members, *members);
        return false;
    }
    return true;
}

/* NEXT: everyone is here. Members that exited are not waited for. */
static Status together(Warp *w, const Instr *in, const Operand *o, uint32_t mask) {
    if (o->kind == OPERAND_IMMEDIATE && mask == w->live && !(mask & ~(uint32_t)o->immediate)) return NEXT;
    for (uint32_t left = mask, group, members; left; left &= ~group) {
        if (!member_group(w, in, o, left, &group, &members)) return FATAL;
        if (members & w->live & ~group) return block_on(w, (Wait){.kind = WAIT_LANES, .what = in->name});
    }
    return NEXT;
}

#define FOR_GROUPS(o) \
    for (uint32_t left = mask, group, members; left && member_group(w, in, o, left, &group, &members); left &= ~group)

static const Operand *first_part(const Operand *o) { return o->kind == OPERAND_VECTOR ? &o->parts[0] : o; }
static const Operand *second_part(const Operand *o) {
    static const Operand sink = {.kind = OPERAND_SINK};
    return o->kind == OPERAND_VECTOR ? &o->parts[1] : &sink;
}

/* ---------------------------------------------------------------- shfl */
enum { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, SHUFFLE_INDEX };

static Status do_shuffle(Warp *w, const Instr *in, uint32_t mask) {
    Status status = together(w, in, &in->args[4], mask);
    if (status != NEXT) return status;
    const uint32_t *b = src32(w, in, &in->args[2], mask), *c = src32(w, in, &in->args[3], mask);
    uint32_t from[LANES], sources = 0, inside = 0, result[LANES];
    FOR_LANES(mask, lane) {
        int32_t distance = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31, self = (int32_t)lane;
        int32_t highest = (self & segment) | (clamp & ~segment), lowest = self & segment, j;
        bool ok;
        switch (in->u[0]) {
        case SHUFFLE_UP: j = self - distance, ok = j >= highest; break;
        case SHUFFLE_DOWN: j = self + distance, ok = j <= highest; break;
        case SHUFFLE_XOR: j = self ^ distance, ok = j <= highest; break;
        default: j = lowest | (distance & ~segment), ok = j <= highest; break;
        }
        if (!ok) j = self;
        inside |= (uint32_t)ok << lane;
        from[lane] = (uint32_t)j;
        sources |= 1u << j;
    }
    if (sources & ~mask)
        report(w->machine, FINDING_DIVERGENCE, w, in, false, "a lane reads from lanes %08x, which do not take part",
               sources & ~mask);
    const uint32_t *a = src32(w, in, &in->args[1], sources & mask);
    FOR_LANES(mask, lane) result[lane] = mask >> from[lane] & 1 ? a[from[lane]] : 0xffffffffu;
    uint32_t *d = dst32(w, first_part(&in->args[0]), mask);
    FOR_LANES(mask, lane) d[lane] = result[lane];
    set_pred(w, second_part(&in->args[0]), mask, inside);
    return NEXT;
}

/* ---------------------------------------------------------------- vote, match, activemask, elect */
enum { VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT };

static Status do_vote(Warp *w, const Instr *in, uint32_t mask) {
    Status status = together(w, in, &in->args[2], mask);
    if (status != NEXT) return status;
    uint32_t p = src_pred(w, in, &in->args[1], mask) & mask;
    FOR_GROUPS(&in->args[2]) {
        uint32_t yes = p & group;
        bool holds = in->u[0] == VOTE_ALL ? yes == group : in->u[0] == VOTE_ANY ? yes != 0 : !yes || yes == group;
        if (in->u[0] == VOTE_BALLOT) {
            uint32_t *d = dst32(w, &in->args[0], group);
            FOR_LANES(group, lane) d[lane] = yes;
        } else {
            set_pred(w, &in->args[0], group, holds ? FULL_MASK : 0);
        }
    }
    return NEXT;
}

static Status do_match(Warp *w, const Instr *in, uint32_t mask) {
    Status status = together(w, in, &in->args[2], mask);
    if (status != NEXT) return status;
    uint64_t value[LANES];
    uint32_t same[LANES];
    FOR_LANES(mask, lane)
        value[lane] = in->u[1] == 8 ? src64(w, in, &in->args[1], mask)[lane] : src32(w, in, &in->args[1], mask)[lane];
    FOR_GROUPS(&in->args[2]) {
        FOR_LANES(group, lane) {
            same[lane] = 0;
            FOR_LANES(group, other) same[lane] |= (uint32_t)(value[other] == value[lane]) << other;
        }
        uint32_t *d = dst32(w, first_part(&in->args[0]), group);
        bool all = same[__builtin_ctz(group)] == group;
        FOR_LANES(group, lane) d[lane] = !in->u[0] ? same[lane] : all ? group : 0;
        if (in->u[0]) set_pred(w, second_part(&in->args[0]), group, all ? FULL_MASK : 0);
    }
    return NEXT;
}

static Status do_active_mask(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t *d = dst32(w, &in->args[0], mask);
    FOR_LANES(mask, lane) d[lane] = mask;
    return NEXT;
}

static Status do_elect(Warp *w, const Instr *in, uint32_t mask) {
    Status status = together(w, in, &in->args[1], mask);
    if (status != NEXT) return status;
    FOR_GROUPS(&in->args[1]) {
        uint32_t leader = (uint32_t)__builtin_ctz(group);
        uint32_t *d = dst32(w, first_part(&in->args[0]), group);
        FOR_LANES(group, lane) d[lane] = leader;
        set_pred(w, second_part(&in->args[0]), group, 1u << leader);
    }
    return NEXT;
}

/* ---------------------------------------------------------------- redux */
enum { REDUCE_ADD, REDUCE_MIN, REDUCE_MAX, REDUCE_AND, REDUCE_OR, REDUCE_XOR };
enum { REDUX_SIGNED = 1, REDUX_FLOAT = 2, REDUX_ABS = 4, REDUX_NAN = 8 };

/* min and max of f32: a NaN gives way to a number unless .NaN is asked for; -0 is below +0. */
static uint32_t reduce_float(uint32_t a, uint32_t b, bool max, uint64_t flags) {
    if (flags & REDUX_ABS) a &= 0x7fffffffu, b &= 0x7fffffffu;
    bool nan_a = (a & 0x7fffffffu) > 0x7f800000u, nan_b = (b & 0x7fffffffu) > 0x7f800000u;
    if (nan_a || nan_b) return (flags & REDUX_NAN) || (nan_a && nan_b) ? 0x7fffffffu : nan_a ? b : a;
    int32_t x = (int32_t)(a ^ (a >> 31 ? 0x7fffffffu : 0)), y = (int32_t)(b ^ (b >> 31 ? 0x7fffffffu : 0));
    return (x < y) == max ? b : a;
}

static uint32_t reduce(uint32_t a, uint32_t b, uint64_t op, uint64_t flags) {
    bool less = flags & REDUX_SIGNED ? (int32_t)a < (int32_t)b : a < b;
    if (flags & REDUX_FLOAT) return reduce_float(a, b, op == REDUCE_MAX, flags);
    switch (op) {
    case REDUCE_ADD: return a + b;
    case REDUCE_MIN: return less ? a : b;
    case REDUCE_MAX: return less ? b : a;
    case REDUCE_AND: return a & b;
    case REDUCE_OR: return a | b;
    default: return a ^ b;
    }
}

static Status do_redux(Warp *w, const Instr *in, uint32_t mask) {
    Status status = together(w, in, &in->args[2], mask);
    if (status != NEXT) return status;
    const uint32_t *a = src32(w, in, &in->args[1], mask);
    FOR_GROUPS(&in->args[2]) {
        uint32_t first = (uint32_t)__builtin_ctz(group), result = a[first];
        if (in->u[1] & REDUX_FLOAT) result = reduce(result, result, in->u[0], in->u[1]);
        FOR_LANES(group & (group - 1), lane) result = reduce(result, a[lane], in->u[0], in->u[1]);
        uint32_t *d = dst32(w, &in->args[0], group);
        FOR_LANES(group, lane) d[lane] = result;
    }
    return NEXT;
}

/* ---------------------------------------------------------------- bar.warp.sync
 * Lanes may meet here from different instructions: whoever waits remembers its member mask in
 * Wait.phase and is let go (Wait.timed_out) by the last one to come. */
static Status do_warp_barrier(Warp *w, const Instr *in, uint32_t mask) {
    if (w->wait.kind == WAIT_OTHER && w->wait.timed_out) return NEXT;
    uint32_t members, group;
    if (!member_group(w, in, &in->args[0], mask, &group, &members)) return FATAL;
    if (group != mask) return together(w, in, &in->args[0], mask);
    uint32_t here = mask;
    for (int i = 0; i < w->fragments; i++)
        if (w->waits[i].kind == WAIT_LANES && w->waits[i].over == wait_is_over && w->waits[i].phase == members)
            here |= w->fragment[i].mask;
    if (members & w->live & ~here)
        return block_on(w, (Wait){.kind = WAIT_LANES, .phase = members, .over = wait_is_over, .what = in->name});
    for (int i = 0; i < w->fragments; i++)
        if (w->waits[i].kind == WAIT_LANES && w->waits[i].over == wait_is_over && w->waits[i].phase == members)
            w->waits[i] = (Wait){.kind = WAIT_OTHER, .timed_out = true, .what = in->name}, w->fragment[i].arrived = true;
    return NEXT;
}

/* ---------------------------------------------------------------- setmaxnreg, clocks, sleep
 * A CTA has the registers it was launched with; whoever wants more waits until others gave some back. */
static uint32_t registers_in_use(const Warp *w) {
    uint32_t sum = 0;
    for (int i = 0; i < w->cta->n_warps; i++)
        if (w->cta->warps[i].live) sum += w->cta->warps[i].registers_held;
    return sum;
}

static bool registers_are_free(Warp *w) {
    uint32_t wanted = (uint32_t)w->program->instrs[w->fragment[w->current].pc].args[0].immediate;
    uint32_t pool = w->program->launch_registers * (uint32_t)w->cta->n_warps;
    return wanted <= w->registers_held || registers_in_use(w) - w->registers_held + wanted <= pool;
}

static Status do_set_registers(Warp *w, const Instr *in, uint32_t mask) {
    (void)mask;
    if (!w->program->launch_registers) return NEXT;
    if (in->u[0] && !registers_are_free(w))
        return block_on(w, (Wait){.kind = WAIT_OTHER, .over = registers_are_free,
                                  .what = "registers that other warps have to give back"});
    w->registers_held = (uint32_t)in->args[0].immediate;
    w->machine->progress = true;
    return NEXT;
}

static Status do_sleep(Warp *w, const Instr *in, uint32_t mask) {
    uint32_t most = 0;
    const uint32_t *t = src32(w, in, &in->args[0], mask);
    FOR_LANES(mask, lane) if (t[lane] > most) most = t[lane];
    w->now += most < 1000000 ? most : 1000000;
    w->machine->yielded = true;
    w->fragment[w->current].pc++;
    return JUMPED;
}

enum { CLOCK_CYCLES, CLOCK_HIGH, CLOCK_NANOSECONDS, CLOCK_NANOSECONDS_HIGH };

static Status do_clock(Warp *w, const Instr *in, uint32_t mask) {
    uint64_t cycles = (uint64_t)w->now;
    uint64_t value = in->u[0] < CLOCK_NANOSECONDS ? cycles : cycles + 1000000000; /* at 1 GHz, since some time */
    if (in->u[0] & 1) value >>= 32;
    FOR_LANES(mask, lane) set_lane(w, &in->args[0], (int)lane, value);
    return NEXT;
}

/* ---------------------------------------------------------------- decode */
static Decoded refuse(char *why, size_t n, const char *text) {
    snprintf(why, n, "%s", text);
    return REFUSED;
}

static Decoded done(Decode *d, Exec exec, InstrClass class_, int n_args, char *why, size_t n) {
    if (d->in->n != n_args) {
        snprintf(why, n, "%d operands, not %d", d->in->n, n_args);
        return REFUSED;
    }
    d->in->exec = exec;
    d->in->class_ = (uint8_t)class_;
    return DECODED;
}

static int position(const char *const *names, int count, const char *name) {
    for (int i = 0; i < count; i++) if (!strcmp(names[i], name)) return i;
    return -1;
}

static Decoded decode_branch(Decode *d, char *why, size_t n) {
    Instr *in = d->in;
    if (is(d, 0, "bra")) {
        if (d->n > 2 || (d->n == 2 && !is(d, 1, "uni"))) return refuse(why, n, "unknown modifier");
        if (in->n != 1 || in->args[0].kind != OPERAND_LABEL) return refuse(why, n, "the target is not a label");
        return done(d, d->n == 2 ? do_uniform_branch : do_branch, CLASS_BRANCH, 1, why, n);
    }
    if (!is(d, 1, "idx") || d->n > 3 || (d->n == 3 && !is(d, 2, "uni"))) return refuse(why, n, "unknown modifier");
    if (in->n != 2 || in->args[1].kind != OPERAND_VECTOR) return refuse(why, n, "no table of targets");
    in->u[0] = d->n == 3;
    return done(d, do_indexed_branch, CLASS_BRANCH, 2, why, n);
}

static Decoded decode_shuffle(Decode *d, char *why, size_t n) {
    static const char *const modes[] = {"up", "down", "bfly", "idx"};
    if (!is(d, 1, "sync")) return refuse(why, n, "only the .sync form exists");
    int mode = d->n == 4 ? position(modes, 4, d->part[2]) : -1;
    if (mode < 0 || !is(d, 3, "b32")) return refuse(why, n, "unknown mode or type");
    d->in->u[0] = (uint64_t)mode;
    return done(d, do_shuffle, CLASS_SHUFFLE, 5, why, n);
}

static Decoded decode_vote(Decode *d, char *why, size_t n) {
    static const char *const modes[] = {"all", "any", "uni", "ballot"};
    if (!is(d, 1, "sync")) return refuse(why, n, "only the .sync form exists");
    int mode = d->n == 4 ? position(modes, 4, d->part[2]) : -1;
    if (mode < 0 || !is(d, 3, mode == VOTE_BALLOT ? "b32" : "pred")) return refuse(why, n, "unknown mode or type");
    d->in->u[0] = (uint64_t)mode;
    return done(d, do_vote, CLASS_SHUFFLE, 3, why, n);
}

static Decoded decode_match(Decode *d, char *why, size_t n) {
    int bytes;
    char kind;
    if (d->n != 4 || !is(d, 2, "sync") || !(is(d, 1, "any") || is(d, 1, "all")) ||
        !ptx_type(d->part[3], &bytes, &kind) || kind != 'b' || bytes < 4 || bytes > 8)
        return refuse(why, n, "unknown mode or type");
    d->in->u[0] = is(d, 1, "all");
    d->in->u[1] = (uint64_t)bytes;
    return done(d, do_match, CLASS_SHUFFLE, 3, why, n);
}

static Decoded decode_redux(Decode *d, char *why, size_t n) {
    static const char *const ops[] = {"add", "min", "max", "and", "or", "xor"};
    int op = d->n >= 4 && is(d, 1, "sync") ? position(ops, 6, d->part[2]) : -1;
    if (op < 0) return refuse(why, n, "unknown operation");
    const char *type = d->part[d->n - 1];
    uint64_t flags = !strcmp(type, "s32") ? REDUX_SIGNED : !strcmp(type, "f32") ? REDUX_FLOAT : 0;
    bool bits = op >= REDUCE_AND;
    if (bits ? strcmp(type, "b32") != 0 : !flags && strcmp(type, "u32")) return refuse(why, n, "unknown type");
    for (int i = 3; i < d->n - 1; i++) {
        if (!(flags & REDUX_FLOAT) || !(is(d, i, "abs") || is(d, i, "NaN"))) return refuse(why, n, "unknown modifier");
        flags |= is(d, i, "abs") ? REDUX_ABS : REDUX_NAN;
    }
    if (flags & REDUX_FLOAT && op == REDUCE_ADD) return refuse(why, n, "floats have min and max only");
    d->in->u[0] = (uint64_t)op;
    d->in->u[1] = flags;
    return done(d, do_redux, CLASS_SHUFFLE, 3, why, n);
}

static Decoded decode_set_registers(Decode *d, char *why, size_t n) {
    Instr *in = d->in;
    if (!(is(d, 1, "inc") || is(d, 1, "dec")) || !is(d, 2, "sync") || !is(d, 3, "aligned") || !is(d, 4, "u32"))
        return refuse(why, n, "unknown form");
    if (in->n != 1 || in->args[0].kind != OPERAND_IMMEDIATE) return refuse(why, n, "the count is not a constant");
    int64_t count = in->args[0].immediate;
    if (count < 24 || count > 256 || count % 8) return refuse(why, n, "the count is not a multiple of 8 in 24 .. 256");
    in->u[0] = is(d, 1, "inc");
    in->flags |= ALIGNED;
    return done(d, do_set_registers, CLASS_OTHER, 1, why, n);
}

static Decoded decode_clock(Decode *d, char *why, size_t n) { /* the assembler's name for mov from a clock */
    static const char *const names[] = {"clock", "clock_hi", "globaltimer", "globaltimer_hi"};
    static const char *const aliases[] = {"clock64", "-", "globaltimer_lo"};
    int which = position(names, 4, d->part[1]);
    if (which < 0) which = position(aliases, 3, d->part[1]);
    if (which < 0) return refuse(why, n, "unknown clock");
    d->in->u[0] = (uint64_t)which;
    return done(d, do_clock, CLASS_MOVE, 1, why, n);
}

Decoded decode_control(Decode *d, char *why, size_t n) {
    const char *name = d->text;
    if (is(d, 0, "bra") || is(d, 0, "brx")) return decode_branch(d, why, n);
    if (!strcmp(name, "exit") || !strcmp(name, "ret") || !strcmp(name, "ret.uni"))
        return done(d, do_exit, CLASS_BRANCH, 0, why, n);
    if (!strcmp(name, "trap")) return done(d, do_trap, CLASS_OTHER, 0, why, n);
    if (!strcmp(name, "brkpt")) return done(d, do_nothing, CLASS_OTHER, 0, why, n);
    if (is(d, 0, "pmevent")) return done(d, do_nothing, CLASS_OTHER, 1, why, n);
    if (is(d, 0, "shfl")) return decode_shuffle(d, why, n);
    if (is(d, 0, "vote")) return decode_vote(d, why, n);
    if (is(d, 0, "match")) return decode_match(d, why, n);
    if (!strcmp(name, "activemask.b32")) return done(d, do_active_mask, CLASS_OTHER, 1, why, n);
    if (!strcmp(name, "elect.sync")) return done(d, do_elect, CLASS_SHUFFLE, 2, why, n);
    if (is(d, 0, "redux")) return decode_redux(d, why, n);
    if (!strcmp(name, "bar.warp.sync")) return done(d, do_warp_barrier, CLASS_BARRIER, 1, why, n);
    if (is(d, 0, "setmaxnreg")) return decode_set_registers(d, why, n);
    if (!strcmp(name, "nanosleep.u32")) return done(d, do_sleep, CLASS_OTHER, 1, why, n);
    if (is(d, 0, "read_clock")) return decode_clock(d, why, n);
    if (is(d, 0, "call")) return refuse(why, n, "calls of functions are not modelled");
    return NOT_MINE;
}
