/* Start-up of a Cortex-M under QEMU or a debugger with semihosting: vectors, FPU, memory, console.
 *
 * On silicon, keep the reset handler and replace the semihosting calls: a breakpoint without a debugger is a fault. */
#include <stdint.h>

#include "board.h"

extern uint32_t __stack_top, __stack_bottom, __data_start, __data_end, __bss_start, __bss_end;
extern const uint32_t __data_load;
int main(void);

/* --- semihosting: Arm "Semihosting for AArch32 and AArch64", operations 0x04 SYS_WRITE0 and 0x18 SYS_EXIT --- */

static int semihost(int operation, const void *argument) {
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

void board_print(const char *text) { semihost(0x04, text); }

void board_exit(int status) {
    const void *reason = (const void *)(status == 0 ? 0x20026u /* application exit */ : 0x20023u /* run-time error */);
    semihost(0x18, reason);
    for (;;) {
    }
}

/* --- counting: SysTick, extended past its 24 bits by its interrupt ---------------------------------------- */

static volatile uint32_t *const systick = (volatile uint32_t *)0xE000E010; /* CSR, RVR, CVR */
static volatile uint32_t *const icsr = (volatile uint32_t *)0xE000ED04;
enum { SYSTICK_WRAP = 1 << 24, SYSTICK_PENDING = 1 << 26 };
static volatile uint32_t wraps;

static void on_systick(void) { wraps++; }

static void start_systick(void) {
    systick[1] = SYSTICK_WRAP - 1;
    systick[2] = 0;
    systick[0] = 7; /* the processor's clock, interrupt, run */
}

uint64_t board_ticks(void) {
    uint32_t before, now;
    do { /* again if it wrapped in between */
        before = wraps;
        now = systick[2];
    } while (before != wraps || (*icsr & SYSTICK_PENDING) != 0);
    return (uint64_t)before * SYSTICK_WRAP + (SYSTICK_WRAP - 1 - now);
}

/* QEMU with -icount shift=0 lets one instruction take 1 ns, so a tick of the clock is 10^9 / CLOCK_HZ instructions.
 * On silicon a tick is a cycle: return 1 for both, and "cycles". */
uint64_t board_tick_numerator(void) { return 1000000000; }
uint64_t board_tick_denominator(void) { return CLOCK_HZ; }
const char *board_tick_unit(void) { return "instructions"; }

uint8_t *board_stack_bottom(void) { return (uint8_t *)&__stack_bottom; }

/* --- start-up ---------------------------------------------------------------------------------------------- */

static void on_fault(void) {
    board_print("FAULT\n");
    board_exit(1);
}

static void on_reset(void) {
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* CPACR: FPU and MVE */
    __asm__ volatile("dsb\n isb");
    const uint32_t *load = &__data_load;
    for (uint32_t *word = &__data_start; word < &__data_end; word++) *word = *load++;
    for (uint32_t *word = &__bss_start; word < &__bss_end; word++) *word = 0;
    start_systick();
    board_exit(main());
}

typedef union {
    uint32_t *stack;
    void (*handler)(void);
} Vector;

__attribute__((section(".vectors"), used)) static const Vector vectors[16] = {
    {.stack = &__stack_top},
    {.handler = on_reset},
    {.handler = on_fault}, /* NMI */
    {.handler = on_fault}, /* HardFault */
    {.handler = on_fault}, /* MemManage */
    {.handler = on_fault}, /* BusFault */
    {.handler = on_fault}, /* UsageFault */
    {.handler = on_fault}, /* SecureFault */
    {0}, {0}, {0},
    {.handler = on_fault}, /* SVCall */
    {.handler = on_fault}, /* DebugMonitor */
    {0},
    {.handler = on_fault}, /* PendSV */
    {.handler = on_systick},
};
