# A 16-bit program at 0000:7C00: prints on the serial port from real mode, counts interrupts of the 8254 through the vector table, uses
# the far corner of a segment, and writes its verdict to the debug-exit port.
#include "real.inc"
#include "timer.inc"
    .code16
    .globl _start
_start:
    real_mode
    mov $text, %si
    call print
    movw $tick, 0x20
    movw $0, 0x22
    timer_at 8
1:  sti
    hlt
    cli
    cmpb $3, ticks
    jb 1b
    # Segment FFFF reaches beyond 1 MiB: FFFF:0010 is 100000.
    mov $0xffff, %ax
    mov %ax, %es
    movw $0x1234, %es:0x10
    mov $0x1000, %ax
    mov %ax, %es
    movw %es:0xfffe, %bx
    mov $0xffff, %ax
    mov %ax, %es
    cmpw $0x1234, %es:0x10
    jne 2f
    mov $done, %si
    call print
    mov $21, %al
    out %al, $0xf4
2:  mov $1, %al
    out %al, $0xf4
    hlt
tick:
    push %ax
    incb ticks
    mov $0x20, %al
    out %al, $0x20
    pop %ax
    iret
print:
    mov $0x3f8, %dx
1:  lodsb
    test %al, %al
    jz 2f
    out %al, %dx
    jmp 1b
2:  ret
ticks: .byte 0
text: .asciz "real mode\n"
done: .asciz "three ticks\n"
