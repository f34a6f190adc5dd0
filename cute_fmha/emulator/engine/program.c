/* Programs: built from the assembler's records, decoded by the instruction families. */
#include "core.h"

#define FAMILY(name) Decoded decode_##name(Decode *d, char *why, size_t why_size);
#include "families.h"
#undef FAMILY

static const struct { const char *name; DecodeFamily decode; } families[] = {
#define FAMILY(name) {#name, decode_##name},
#include "families.h"
#undef FAMILY
};

/* ---------------------------------------------------------------- memory of a program */
typedef struct Chunk { struct Chunk *next; size_t used, size; } Chunk;
enum { CHUNK_BYTES = 1 << 18, ARENA_ALIGNMENT = 64 };

void *arena(Program *program, size_t bytes) {
    bytes = (bytes + ARENA_ALIGNMENT - 1) & ~(size_t)(ARENA_ALIGNMENT - 1);
    Chunk *chunk = program->arena;
    if (!chunk || chunk->used + bytes > chunk->size) {
        size_t size = bytes + ARENA_ALIGNMENT > CHUNK_BYTES ? bytes + ARENA_ALIGNMENT : CHUNK_BYTES;
        void *raw = NULL;
        if (posix_memalign(&raw, ARENA_ALIGNMENT, size)) abort();
        memset(raw, 0, size);
        chunk = raw;
        *chunk = (Chunk){program->arena, ARENA_ALIGNMENT, size};
        program->arena = chunk;
    }
    void *place = (char *)chunk + chunk->used;
    chunk->used += bytes;
    return place;
}

static char *keep(Program *program, const char *text) {
    size_t n = strlen(text) + 1;
    return memcpy(arena(program, n), text, n);
}

void program_free(Program *program) {
    for (Chunk *chunk = program->arena, *next; chunk; chunk = next) {
        next = chunk->next;
        free(chunk);
    }
    free(program);
}

bool ptx_type(const char *name, int *bytes, char *kind) {
    static const struct { const char *name; int bytes; char kind; } types[] = {
        {"b8", 1, 'b'}, {"b16", 2, 'b'}, {"b32", 4, 'b'}, {"b64", 8, 'b'}, {"b128", 16, 'b'},
        {"u8", 1, 'u'}, {"u16", 2, 'u'}, {"u32", 4, 'u'}, {"u64", 8, 'u'},
        {"s8", 1, 's'}, {"s16", 2, 's'}, {"s32", 4, 's'}, {"s64", 8, 's'},
        {"f16", 2, 'f'}, {"f32", 4, 'f'}, {"f64", 8, 'f'}, {"bf16", 2, 'h'},
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (!strcmp(types[i].name, name)) {
            *bytes = types[i].bytes;
            *kind = types[i].kind;
            return true;
        }
    return false;
}

/* ---------------------------------------------------------------- records
 * Written by assemble.py, all 64-bit integers. An instruction: offset of its mnemonic in the strings,
 * line, Python line, guard's byte offset (or -1), its index, negated, number of operands. An operand:
 * kind, width, negated, count, index, byte offset, immediate; then its parts. */
typedef struct { Program *program; const int64_t *at; uint8_t *broadcasts; Operand *pool; size_t free; } Reader;
enum { OPERAND_WORDS = 7, SYMBOL_WORDS = 6, BROADCAST_BYTES = LANES * (4 + 8) };

static void read_operand(Reader *reader, Operand *operand) {
    const int64_t *word = reader->at;
    reader->at += OPERAND_WORDS;
    operand->kind = (uint8_t)word[0];
    operand->width = (uint8_t)word[1];
    operand->negate = (uint8_t)word[2];
    operand->count = (uint16_t)word[3];
    operand->index = (uint32_t)word[4];
    operand->offset = (uint32_t)word[5];
    operand->immediate = word[6];
    if (operand->kind == OPERAND_IMMEDIATE) {
        uint8_t *place = reader->broadcasts + (size_t)operand->index * BROADCAST_BYTES;
        operand->broadcast64 = (uint64_t *)place;
        operand->broadcast32 = (uint32_t *)(place + LANES * 8);
    }
    if (operand->count) {
        operand->parts = reader->pool + reader->free;
        reader->free += operand->count;
        for (int i = 0; i < operand->count; i++) read_operand(reader, &operand->parts[i]);
    }
}

static void read_instruction(Reader *reader, Instr *in, const char *strings) {
    const int64_t *word = reader->at;
    reader->at += 7;
    in->name = strings + word[0];
    in->line = (uint32_t)word[1];
    in->source_line = (uint32_t)word[2];
    in->guard = (int32_t)word[3];
    in->guard_index = (uint32_t)word[4];
    in->guard_negate = (uint8_t)word[5];
    in->n = (uint8_t)word[6];
    in->program = reader->program;
    in->class_ = CLASS_OTHER;
    in->args = reader->pool + reader->free;
    reader->free += in->n;
    for (int i = 0; i < in->n; i++) read_operand(reader, &in->args[i]);
}

/* sizes: register bytes, registers, shared bytes before the dynamic part, parameter bytes, local bytes,
 * registers at launch, symbols, instructions, operands, immediates, bytes of strings. A symbol: offset
 * of its name, kind, value, byte offset, width, index. names: of the registers, as offsets. */
Program *program_build(const char *kernel, const int64_t *sizes, const char *strings, const int64_t *names,
                       const int64_t *symbols, const int64_t *records, const int64_t *immediates) {
    Program *program = calloc(1, sizeof *program);
    program->kernel = keep(program, kernel);
    program->register_bytes = (uint32_t)sizes[0];
    program->register_count = (uint32_t)sizes[1];
    program->static_shared = (uint32_t)sizes[2];
    program->param_bytes = (uint32_t)sizes[3];
    program->local_bytes = (uint32_t)sizes[4];
    program->launch_registers = (uint32_t)sizes[5];
    program->n_symbols = (int)sizes[6];
    program->n = program->capacity = (int)sizes[7];
    char *text = memcpy(arena(program, (size_t)sizes[10]), strings, (size_t)sizes[10]);

    program->register_names = arena(program, (size_t)sizes[1] * sizeof *program->register_names);
    for (int64_t i = 0; i < sizes[1]; i++) program->register_names[i] = text + names[i];

    program->symbols = arena(program, (size_t)program->n_symbols * sizeof *program->symbols);
    for (int i = 0; i < program->n_symbols; i++) {
        const int64_t *word = symbols + i * SYMBOL_WORDS;
        program->symbols[i] = (Symbol){.name = text + word[0], .kind = (uint8_t)word[1], .value = (uint64_t)word[2],
                                       .offset = (uint32_t)word[3], .width = (uint8_t)word[4],
                                       .index = (uint32_t)word[5]};
        if (word[1] != 3) continue;
        int special = special_by_name(text + word[0]);
        if (special < 0 && !*program->error)
            snprintf(program->error, sizeof program->error, "%s is not modelled", text + word[0]);
        program->symbols[i].value = (uint64_t)special;
    }

    Reader reader = {.program = program, .at = records};
    reader.broadcasts = arena(program, (size_t)sizes[9] * BROADCAST_BYTES);
    for (int64_t i = 0; i < sizes[9]; i++) {
        uint64_t *wide = (uint64_t *)(reader.broadcasts + i * BROADCAST_BYTES);
        uint32_t *narrow = (uint32_t *)(wide + LANES);
        for (int lane = 0; lane < LANES; lane++) {
            wide[lane] = (uint64_t)immediates[i];
            narrow[lane] = (uint32_t)immediates[i];
        }
    }
    reader.pool = arena(program, (size_t)sizes[8] * sizeof *reader.pool);
    program->instrs = arena(program, (size_t)program->n * sizeof *program->instrs);
    for (int i = 0; i < program->n; i++) {
        program->instrs[i].pc = (uint32_t)i;
        read_instruction(&reader, &program->instrs[i], text);
    }
    return program;
}

const char *program_error(const Program *program) { return program->error; }

/* ---------------------------------------------------------------- decode */
static bool cut(Decode *d, Program *program, const char *name) {
    char *text = keep(program, name);
    d->text = name;
    d->n = 0;
    for (char *part = text; part;) {
        if (d->n == (int)(sizeof d->part / sizeof *d->part)) return false;
        char *dot = strchr(part, '.');
        if (dot) *dot++ = 0;
        d->part[d->n++] = part;
        part = dot;
    }
    return true;
}

bool decode_instruction(Program *program, Instr *in, char *why, size_t why_size) {
    Decode d = {.in = in, .program = program};
    if (!cut(&d, program, in->name)) {
        snprintf(why, why_size, "too many modifiers");
        return false;
    }
    for (size_t i = 0; i < sizeof families / sizeof *families; i++) {
        *why = 0;
        switch (families[i].decode(&d, why, why_size)) {
        case NOT_MINE: continue;
        case DECODED:
            if (in->exec) return true;
            snprintf(why, why_size, "the family %s claimed it without a function", families[i].name);
            return false;
        case REFUSED:
            if (!*why) snprintf(why, why_size, "refused by the family %s", families[i].name);
            return false;
        }
    }
    snprintf(why, why_size, "no instruction family models it");
    return false;
}

/* Decodes all instructions; returns how many were refused and writes "line\tmnemonic\treason\n" of
 * each one, as far as there is room. */
int program_decode(Program *program, char *text, size_t size) {
    int refused = 0;
    size_t used = 0;
    if (size) *text = 0;
    for (int i = 0; i < program->n; i++) {
        Instr *in = &program->instrs[i];
        char why[256] = "";
        if (decode_instruction(program, in, why, sizeof why)) continue;
        refused++;
        int n = snprintf(text + used, size - used, "%u\t%s\t%s\n", in->line, in->name, why);
        if (n > 0 && used + (size_t)n < size) used += (size_t)n;
        else if (used < size) text[used] = 0;
    }
    return refused;
}

/* For the counters: the class of every instruction. */
void program_classes(const Program *program, uint8_t *classes) {
    for (int i = 0; i < program->n; i++) classes[i] = program->instrs[i].class_;
}
