/* A Linux process in place of a board: for chips whose emulator here runs programs, not machines. */
#include <stdlib.h>
#include <unistd.h>

#include "board.h"

enum { STACK_WATCHED = 64 * 1024 };

void board_print(const char *text) {
    size_t length = 0;
    while (text[length] != 0) length++;
    if (write(STDOUT_FILENO, text, length) < 0) _exit(2);
}

void board_exit(int status) { exit(status); }

/* User-mode emulation offers no count that code could read. */
uint64_t board_ticks(void) { return 0; }
uint64_t board_tick_numerator(void) { return 1; }
uint64_t board_tick_denominator(void) { return 0; }
const char *board_tick_unit(void) { return "instructions"; }

uint8_t *board_stack_bottom(void) { return (uint8_t *)__builtin_frame_address(0) - STACK_WATCHED; }
