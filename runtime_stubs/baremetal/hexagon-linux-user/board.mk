# A static Hexagon program for QEMU's user mode, without a C library.
BOARD_SOURCES := hexagon_linux_user.c hexagon_runtime.c
# The functions here are the ones a compiler would call for such loops.
BOARD_CFLAGS := -ffreestanding -fno-builtin
BOARD_LDFLAGS := -nostdlib -static -fuse-ld=lld
CFLAGS += -ffreestanding -isystem .
