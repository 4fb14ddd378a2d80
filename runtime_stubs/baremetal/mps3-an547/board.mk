# QEMU clocks the Cortex-M55 of mps3-an547 at 32 MHz.
BOARD_SOURCES := cortex_m.c
BOARD_CFLAGS := -DCLOCK_HZ=32000000
BOARD_LDFLAGS := -nostartfiles -T board.ld --specs=nano.specs
