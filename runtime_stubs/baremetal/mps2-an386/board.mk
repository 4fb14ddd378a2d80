# QEMU clocks the Cortex-M4 of mps2-an386 at 25 MHz.
BOARD_SOURCES := cortex_m.c
BOARD_CFLAGS := -DCLOCK_HZ=25000000
BOARD_LDFLAGS := -nostartfiles -T board.ld --specs=nano.specs
