# A program of real mode with CR0.NE clear: x87 exceptions come as interrupt 13 of the 8259 pair, vector 0x75. Twice its handler clears the
# exception (E), and the third time it only writes port 0xF0, after which the instruction that waits ignores it (I). After each, K is sent
# by the instruction behind WAIT. Ends by the debug-exit port with status 5.
#include "real.inc"
    .set DEBUG, 0xe9
    .set EXIT, 0xf4
    .text
    .code16
    .globl _start
_start:
    real_mode
    movw $handler, 0x75 * 4
    movw %ax, 0x75 * 4 + 2
    # Vectors 0x08 and 0x70, the second 8259 on line 2 of the first; all masked but that and 13.
    mov $tables, %si
    mov $10, %cx
1:  lodsb
    mov %al, %dl
    xor %dh, %dh
    lodsb
    out %al, %dx
    loop 1b
    mov %cr0, %eax
    and $~0x2e, %al
    mov %eax, %cr0
    mov $3, %bl
again:
    fninit
    # Division by zero unmasked.
    fldcw control
    fld1
    fldz
    fdivrp
    cli
    # No instruction of these waits, nor does the interrupt come.
    fnstsw %ax
    sti
    fwait
    mov $'K', %al
    out %al, $DEBUG
    dec %bl
    jnz again
    mov $2, %al
    out %al, $EXIT
1:  hlt
    jmp 1b

handler:
    push %ax
    xor %al, %al
    out %al, $0xf0
    cmp $1, %bl
    mov $'I', %al
    je 1f
    fnclex
    mov $'E', %al
1:  out %al, $DEBUG
    mov $0x20, %al
    out %al, $0xa0
    out %al, $0x20
    pop %ax
    iret

control: .word 0x037b
tables:
    .byte 0x20, 0x11, 0x21, 0x08, 0x21, 4, 0x21, 1, 0x21, 0xfb
    .byte 0xa0, 0x11, 0xa1, 0x70, 0xa1, 2, 0xa1, 1, 0xa1, 0xdf
