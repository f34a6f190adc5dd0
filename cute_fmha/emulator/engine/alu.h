/* What the files of the arithmetic families (alu*.c, convert*.c) share: reading modifiers, checking
 * operands, loops over lanes. */
#pragma once
/* Nobody looks at the host's exception flags: conditional floating-point operations may be computed for all
 * lanes, which is what lets these loops vectorise. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math")
#endif
#include "machine.h"

/* ---------------------------------------------------------------- decoding
 * Every modifier must be taken by somebody: finish() refuses what is left over, so that no modifier
 * is ever ignored. The type is the last part; a trailing x2 is cut off and kept in `packed`. */
typedef struct {
    Decode *d;
    Instr *in;
    char *why;
    size_t size;
    uint32_t used;     /* parts that were taken */
    const char *op;
    char type[16];     /* without x2 */
    int bytes;         /* of one element; 0: not a type that ptx_type knows (pred) */
    char kind;
    int packed;        /* 1 or 2 elements in a register */
} Reader;

Reader reader_new(Decode *d, char *why, size_t size);
bool take(Reader *r, const char *modifier);
/* The index in the list (of n names) of the one modifier that is there, or -1. */
int take_one(Reader *r, const char *const *names, int n);
Decoded refuse(Reader *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Checks the operands against a signature, one letter an operand: '2', '4', '8', 'q' a register of 1 or 2,
 * 4, 8, 16 bytes (or an immediate, unless first); 'p' a predicate; 'w' a register of any width up to 8. */
Decoded finish(Reader *r, Exec exec, InstrClass class_, const char *signature);
char letter(const Reader *r); /* of the type's registers in a signature */

enum { ROUND_NEAREST, ROUND_ZERO, ROUND_DOWN, ROUND_UP, ROUND_AWAY, ROUND_STOCHASTIC };
int take_rounding(Reader *r); /* rn, rz, rm, rp; -1: none */
/* Execute in another rounding mode of the host: wraps the exec that finish() set. Uses u[2] and u[3]. */
void wrap_rounding(Instr *in, int rounding);

/* The parts, each NOT_MINE for what it does not know. */
Decoded decode_move(Reader *r);
Decoded decode_integer(Reader *r);
Decoded decode_bits(Reader *r);
Decoded decode_carry(Reader *r);
Decoded decode_compare(Reader *r);
Decoded decode_float(Reader *r);
Decoded decode_double(Reader *r);
Decoded decode_minmax(Reader *r);
Decoded decode_half(Reader *r);
Decoded decode_approx(Reader *r);
Decoded decode_packed_convert(Reader *r);

/* ---------------------------------------------------------------- lanes
 * Operands of one lane never overlap other lanes' (registers are 128-byte aligned and of one width), so
 * the loops vectorise without checks for aliasing. */
#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
#define EACH_LANE(mask, ...)                                            \
    do {                                                                \
        if ((mask) == FULL_MASK) {                                      \
            INDEPENDENT for (uint32_t i = 0; i < LANES; i++) { __VA_ARGS__; } \
        } else {                                                        \
            FOR_LANES(mask, i) { __VA_ARGS__; }                         \
        }                                                               \
    } while (0)

extern const uint32_t lane_bit[LANES];

/* An exec of 1, 2 or 3 sources. D, A, B, C: widths of the registers (32 or 64); T: types of the values. */
#define OP1(NAME, D, A, TA, ...)                                        \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {       \
        const uint##A##_t *pa = src##A(w, in, &in->args[1], mask);      \
        uint##D##_t *d = dst##D(w, &in->args[0], mask);                 \
        EACH_LANE(mask, TA a = (TA)pa[i]; d[i] = (uint##D##_t)(__VA_ARGS__)); \
        return NEXT;                                                    \
    }
#define OP2(NAME, D, A, TA, B, TB, ...)                                 \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {       \
        const uint##A##_t *pa = src##A(w, in, &in->args[1], mask);      \
        const uint##B##_t *pb = src##B(w, in, &in->args[2], mask);      \
        uint##D##_t *d = dst##D(w, &in->args[0], mask);                 \
        EACH_LANE(mask, TA a = (TA)pa[i]; TB b = (TB)pb[i]; d[i] = (uint##D##_t)(__VA_ARGS__)); \
        return NEXT;                                                    \
    }
#define OP3(NAME, D, A, TA, B, TB, C, TC, ...)                          \
    static Status NAME(Warp *w, const Instr *in, uint32_t mask) {       \
        const uint##A##_t *pa = src##A(w, in, &in->args[1], mask);      \
        const uint##B##_t *pb = src##B(w, in, &in->args[2], mask);      \
        const uint##C##_t *pc = src##C(w, in, &in->args[3], mask);      \
        uint##D##_t *d = dst##D(w, &in->args[0], mask);                 \
        EACH_LANE(mask, TA a = (TA)pa[i]; TB b = (TB)pb[i]; TC c = (TC)pc[i]; \
                  d[i] = (uint##D##_t)(__VA_ARGS__));                   \
        return NEXT;                                                    \
    }

/* ---------------------------------------------------------------- numbers */
#define NAN32 0x7fffffffu
static inline uint32_t flush32(uint32_t bits) { return bits & 0x7f800000u ? bits : bits & 0x80000000u; }
static inline uint32_t canonical32(float f) { return f != f ? NAN32 : as_bits(f); }
/* .sat: [0, 1], NaN and -0 become +0. */
static inline float saturate32(float f) { return f > 0.0f ? (f < 1.0f ? f : 1.0f) : 0.0f; }
static inline void count_fma(Warp *w, uint32_t mask, int width) {
    w->machine->counters.fma_ops += (uint64_t)__builtin_popcount(mask) * (uint64_t)width;
}
static inline void count_mufu(Warp *w, uint32_t mask, int width) {
    w->machine->counters.mufu_ops += (uint64_t)__builtin_popcount(mask) * (uint64_t)width;
}
