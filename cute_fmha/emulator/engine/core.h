/* What run.c, launch.c, program.c, report.c and control.c share among themselves. */
#pragma once
#include "machine.h"

/* launch.c */
bool launch_next_cluster(Machine *machine);      /* false: none is left */
bool retire_clusters(Machine *machine);          /* frees finished ones; true: some were */
void free_clusters(Machine *machine);
void fill_symbols(Warp *warp);
int special_by_name(const char *name);           /* -1: unknown */
void warp_exited(Warp *warp);                    /* its last lane is gone */

/* run.c: fragments of the warp that runs */
void fragments_jump(Warp *warp, uint32_t lanes, uint32_t target, uint32_t next); /* the others go to `next` */
void fragments_exit(Warp *warp, uint32_t lanes, uint32_t next);
void fragments_retry(Warp *warp);                /* those that wait for lanes look again */

/* report.c */
void report_deadlock(Machine *machine);
void report_split_warp(Warp *warp);              /* every fragment waits for lanes of another one */
void describe_fragment(char *text, size_t size, const Warp *warp, int fragment);

/* program.c */
bool decode_instruction(Program *program, Instr *in, char *why, size_t why_size); /* false: refused */
