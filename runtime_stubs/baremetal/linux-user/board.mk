# A static program for QEMU's user mode.
BOARD_SOURCES := linux_user.c
BOARD_CFLAGS :=
BOARD_LDFLAGS := -static
