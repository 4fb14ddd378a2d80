/* The example: run the model on the test vectors it was compiled with, compare, and report.
 *
 * Replace this file by your application. It needs no library beyond what board.h and model.h declare. */
#include <stdint.h>

#include "board.h"
#include "model.h"
#include "test_vectors.h"

enum { STACK_PATTERN = 0xA5, STACK_MARGIN = 256 };

static void print_number(uint64_t number) {
    char text[21];
    char *digit = text + sizeof text - 1;
    *digit = 0;
    do {
        *--digit = (char)('0' + number % 10);
        number /= 10;
    } while (number != 0);
    board_print(digit);
}

static void print_fact(const char *name, uint64_t number) {
    board_print(name);
    board_print(" ");
    print_number(number);
    board_print("\n");
}

/* Fill the stack below this call, so that what the model wrote over can be counted afterwards. */
static __attribute__((noinline)) uint8_t *paint_stack(void) {
    uint8_t *bottom = board_stack_bottom();
    volatile uint8_t *end = (volatile uint8_t *)__builtin_frame_address(0) - STACK_MARGIN;
    for (volatile uint8_t *byte = bottom; byte < end; byte++) *byte = STACK_PATTERN;
    return bottom;
}

static uint32_t stack_used(const uint8_t *bottom, const uint8_t *top) {
    const volatile uint8_t *byte = bottom;
    while (byte < top && *byte == STACK_PATTERN) byte++;
    return (uint32_t)(top - byte);
}

static uint64_t units(uint64_t ticks) { return ticks * board_tick_numerator() / board_tick_denominator(); }

#ifdef MODEL_PROFILE
static uint64_t step_start;

void model_step(const char *kernel) {
    const uint64_t ticks = board_ticks() - step_start;
    if (board_tick_denominator() > 0) print_fact(kernel, units(ticks));
    step_start = board_ticks();
}
#endif

int main(void) {
    uint32_t equal = 0;
    uint64_t ticks = 0;
    uint8_t *top = __builtin_frame_address(0);
    uint8_t *bottom = paint_stack();
    for (uint32_t sample = 0; sample < TEST_VECTORS; sample++) {
        const uint64_t start = board_ticks();
#ifdef MODEL_PROFILE
        step_start = start;
#endif
        test_vector_run(sample);
        ticks += board_ticks() - start;
        if (test_vector_equal(sample)) equal++;
    }
    print_fact("samples", TEST_VECTORS);
    print_fact("equal", equal);
    print_fact("stack_bytes", stack_used(bottom, top));
    print_fact("arena_bytes", MODEL_ARENA_BYTES);
    if (TEST_VECTORS > 0 && board_tick_denominator() > 0) {
        print_fact(board_tick_unit(), units(ticks) / TEST_VECTORS);
    }
    board_print(equal == TEST_VECTORS ? "PASS\n" : "FAIL\n");
    board_exit(equal == TEST_VECTORS ? 0 : 1);
    return 0;
}
