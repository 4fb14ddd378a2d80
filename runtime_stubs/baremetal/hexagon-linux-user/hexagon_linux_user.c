/* A Linux process in place of a board, with nothing beneath it: QEMU runs Hexagon programs, not machines, and no
 * distribution ships a C library for Hexagon. */
#include "board.h"

enum { SYSCALL_WRITE = 64, SYSCALL_EXIT_GROUP = 94, STDOUT = 1, STACK_WATCHED = 64 * 1024 };

int main(void);

static int32_t system_call(int32_t number, int32_t first, int32_t second, int32_t third) {
    register int32_t r0 __asm__("r0") = first;
    register int32_t r1 __asm__("r1") = second;
    register int32_t r2 __asm__("r2") = third;
    register int32_t r6 __asm__("r6") = number;
    __asm__ volatile("trap0(#1)" : "+r"(r0) : "r"(r1), "r"(r2), "r"(r6) : "memory");
    return r0;
}

__attribute__((used, noreturn)) static void start(void) {
    board_exit(main());
    for (;;) {}
}

/* Vectors are spilled to the stack whole: align it to one. */
__attribute__((naked, used)) void _start(void) { __asm__ volatile("r29 = and(r29, #-128)\n jump start"); }

void board_print(const char *text) {
    uint32_t length = 0;
    while (text[length] != 0) length++;
    if (system_call(SYSCALL_WRITE, STDOUT, (int32_t)(uintptr_t)text, (int32_t)length) < 0) board_exit(2);
}

void board_exit(int status) { (void)system_call(SYSCALL_EXIT_GROUP, status, 0, 0); }

/* QEMU's own control register c21, "r0 = c21", counts instructions; silicon has none there. 32 bits wide, it must be
 * read at least once every 2^32 instructions. */
uint64_t board_ticks(void) {
    static uint64_t ticks;
    register uint32_t now __asm__("r0");
    __asm__ volatile(".word 0x6a15c000" : "=r"(now));
    ticks += now - (uint32_t)ticks;
    return ticks;
}

uint64_t board_tick_numerator(void) { return 1; }
uint64_t board_tick_denominator(void) { return 1; }
const char *board_tick_unit(void) { return "instructions"; }

uint8_t *board_stack_bottom(void) { return (uint8_t *)__builtin_frame_address(0) - STACK_WATCHED; }
