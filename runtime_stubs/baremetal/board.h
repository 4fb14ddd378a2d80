/* What the example program asks of a board. A folder beside this file implements it for one board. */
#ifndef BOARD_H
#define BOARD_H

#include <stdint.h>

/* Write a line's worth of text to whatever console there is. */
void board_print(const char *text);

/* End the program; 0 is success. On a board without an emulator or a debugger: stop. */
void board_exit(int status);

/* A counter that goes up while code runs, and how much of it makes board_tick_unit() ("instructions", "cycles").
 * units = ticks * board_tick_numerator() / board_tick_denominator(). */
uint64_t board_ticks(void);
uint64_t board_tick_numerator(void);
uint64_t board_tick_denominator(void);
const char *board_tick_unit(void);

/* The unused part of the stack, lowest byte first: the example fills it to see how deep the stack grew. */
uint8_t *board_stack_bottom(void);

#endif
