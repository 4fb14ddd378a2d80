/* Prints the int8 multiply-accumulates one core can do in a second, in billions: vpdpbusd on registers, nothing else.

   Assembly, for a compiler may keep the sums in memory. */

#include <stdio.h>
#include <time.h>

enum { CHAINS = 16, STEPS = 20000, REPEATS = 400, MACS = 64 };

#define DOT(n) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #n "\n"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(void) {
    double best = 0;
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        long steps = STEPS;
        double start = now();
        __asm__ volatile("1:\n" DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10) DOT(11)
                         DOT(12) DOT(13) DOT(14) DOT(15) "dec %0\njnz 1b\n"
                         : "+r"(steps)::"zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9",
                           "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "cc");
        double rate = (double)STEPS * CHAINS * MACS / (now() - start) * 1e-9;
        if (rate > best) best = rate;
    }
    printf("%.1f\n", best);
    return 0;
}
