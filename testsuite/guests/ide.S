# A program of real mode: reads sector 1 of the first IDE disk and block 1 of the CD that is first on the second channel, both by PIO, sends
# what is there up to a newline to the debug console, writes sector 2 of the disk, and ends by the debug-exit port.
#include "real.inc"
    .set DEBUG, 0xe9
    .set EXIT, 0xf4
    .text
    .code16
    .globl _start
_start:
    real_mode

    # READ SECTORS, one, block address 1.
    mov $0x1f0, %bx
    mov $1, %cl
    mov $0x20, %ch
    call command
    call wait_data
    mov $buffer, %di
    mov $256, %cx
    mov $0x1f0, %dx
    rep insw
    call show

    # WRITE SECTORS, one, block address 2: what was read, backwards.
    mov $2, %cl
    mov $0x30, %ch
    call command
    call wait_data
    mov $buffer + 511, %si
    mov $256, %cx
1:  std
    lodsb
    mov %al, %ah
    lodsb
    cld
    xchg %al, %ah
    out %ax, %dx
    loop 1b
    call wait_ready

    # PACKET on the second channel: READ(10) of block 1, at most 2048 bytes a time.
    mov $0x170, %bx
    lea 6(%bx), %dx
    xor %al, %al
    out %al, %dx
    lea 1(%bx), %dx
    out %al, %dx
    lea 4(%bx), %dx
    out %al, %dx
    inc %dx
    mov $8, %al
    out %al, %dx
    lea 7(%bx), %dx
    mov $0xa0, %al
    out %al, %dx
    call wait_data
    mov $packet, %si
    mov $6, %cx
    rep outsw
    call wait_data
    mov $buffer, %di
    mov $1024, %cx
    rep insw
    call show
    mov $1, %al
    out %al, $EXIT
1:  hlt
    jmp 1b

# Command CH on one sector at block address CL of the first drive of the channel at BX.
command:
    lea 6(%bx), %dx
    mov $0xe0, %al
    out %al, %dx
    lea 2(%bx), %dx
    mov $1, %al
    out %al, %dx
    inc %dx
    mov %cl, %al
    out %al, %dx
    inc %dx
    xor %al, %al
    out %al, %dx
    inc %dx
    out %al, %dx
    lea 7(%bx), %dx
    mov %ch, %al
    out %al, %dx
    ret

# Until the drive is not busy and wants data moved; DX becomes the data port.
wait_data:
    call wait_ready
    test $8, %al
    jz wait_data
    mov %bx, %dx
    ret

# Until the drive is not busy; an error ends the program.
wait_ready:
    lea 7(%bx), %dx
1:  in %dx, %al
    test $0x80, %al
    jnz 1b
    test $1, %al
    jz 2f
    mov $9, %al
    out %al, $EXIT
2:  ret

# The buffer up to a newline.
show:
    mov $buffer, %si
1:  lodsb
    out %al, $DEBUG
    cmp $'\n', %al
    jne 1b
    ret

packet:
    .byte 0x28, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0
    .set buffer, 0x8000
