/* Instruction families, asked in this order who decodes an instruction. A new family is one file with
 * a decode function, and its line here. */
FAMILY(alu)      /* integer, float, packed, predicate and move instructions */
FAMILY(convert)  /* cvt, with the FP8, FP6 and FP4 formats */
FAMILY(control)  /* branches, exit, shuffles, votes, elect, warp barriers, setmaxnreg */
FAMILY(memory)   /* ld, st, atom, red, cvta, mapa, ldmatrix, stmatrix, prefetch */
FAMILY(barrier)  /* mbarrier, bar, barrier.cluster, fences, clusterlaunchcontrol, griddepcontrol */
FAMILY(copy)     /* cp.async, cp.async.bulk without tensor maps, groups */
FAMILY(tma)      /* cp.async.bulk.tensor, cp.reduce.async.bulk.tensor */
FAMILY(tmem)     /* tcgen05.alloc, dealloc, ld, st, cp, wait, fence, commit */
FAMILY(mma)      /* tcgen05.mma */
