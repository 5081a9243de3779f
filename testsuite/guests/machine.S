# A multiboot kernel (version 2 with MULTIBOOT2 defined) for the whole machine: 32-bit mode with the 8259 and the 8254, then long mode with
# the local APIC's timer, an edit of page tables, code that changes itself; it reports on the serial port and turns the machine off by ACPI.
#include "timer.inc"
    .set COM1, 0x3f8
    .set PIT_VECTOR, 0x20
    .set APIC_VECTOR, 0x40
    .set TABLES, 0x300000
    .set STACK, 0x200000
    .set PM1_CONTROL, 0x604
    .text
    .code32
    .align 8
    .ifdef MULTIBOOT2
    .set MAGIC, 0x36d76289
    .long 0xe85250d6, 0, 24, -(0xe85250d6 + 24), 0, 8
    .else
    .set MAGIC, 0x2badb002
    .long 0x1badb002, 3, -(0x1badb002 + 3)
    .endif

    .globl _start
_start:
    mov $STACK, %esp
    cmp $MAGIC, %eax
    jne failed
    mov $text_32, %esi
    call print
    .ifdef MULTIBOOT2
    # The first tag is the command line.
    cmpl $1, 8(%ebx)
    jne failed
    lea 16(%ebx), %esi
    .else
    # The command line, behind the file's name.
    mov 16(%ebx), %esi
1:  lodsb
    test %al, %al
    jz failed
    cmp $' ', %al
    jne 1b
    .endif
    call print
    call newline

    timer_at PIT_VECTOR
    lgdt gdt_pointer
    ljmp $8, $1f
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $tick_32, %eax
    mov %ax, idt + 8 * PIT_VECTOR
    movw $8, idt + 8 * PIT_VECTOR + 2
    movw $0x8e00, idt + 8 * PIT_VECTOR + 4
    shr $16, %eax
    mov %ax, idt + 8 * PIT_VECTOR + 6
    lidt idt_pointer
1:  sti
    hlt
    cli
    cmpl $5, ticks
    jb 1b
    mov $0xff, %al
    out %al, $0x21
    mov $text_pit, %esi
    call print

    # Long mode: the first 4 MiB mapped to themselves, and 0xC00000 on 0x400000.
    mov $TABLES, %edi
    xor %eax, %eax
    mov $0x1000, %ecx
    rep stosl
    movl $TABLES + 0x1003, TABLES
    movl $TABLES + 0x2003, TABLES + 0x1000
    movl $0x83, TABLES + 0x2000
    movl $0x200083, TABLES + 0x2008
    movl $0x400083, TABLES + 0x2030
    # The local APIC's page.
    movl $TABLES + 0x3003, TABLES + 0x1018
    movl $0xfee0009b, TABLES + 0x3fb8
    movl $TABLES, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    ljmp $0x18, $long_mode

tick_32:
    push %eax
    incl ticks
    mov $0x20, %al
    out %al, $0x20
    pop %eax
    iret

    # Prints the text at ESI.
print:
    push %eax
    push %edx
1:  mov $COM1 + 5, %edx
    in %dx, %al
    test $0x20, %al
    jz 1b
    lodsb
    test %al, %al
    jz 2f
    mov $COM1, %edx
    out %al, %dx
    jmp 1b
2:  pop %edx
    pop %eax
    ret
newline:
    mov $text_newline, %esi
    jmp print
failed:
    mov $text_failed, %esi
    call print
    mov $1, %al
    out %al, $0xf4
    hlt

    .code64
long_mode:
    mov $STACK, %rsp
    mov $text_long, %esi
    call print_64
    # A gate of the interrupt table, now with 16 bytes.
    mov $tick_64, %eax
    mov %ax, idt + 16 * APIC_VECTOR
    movl $0x8e000018, idt + 16 * APIC_VECTOR + 2
    shr $16, %eax
    mov %ax, idt + 16 * APIC_VECTOR + 6
    movl $0, idt + 16 * APIC_VECTOR + 8
    lidt idt_pointer
    # The local APIC: on, periodic, by 16, 100,000 counts.
    mov $0xfee00000, %ebx
    movl $0x1ff, 0xf0(%rbx)
    movl $3, 0x3e0(%rbx)
    movl $0x20000 + APIC_VECTOR, 0x320(%rbx)
    movl $0, ticks
    movl $50000, 0x380(%rbx)
1:  sti
    hlt
    cli
    cmpl $5, ticks
    jb 1b
    movl $0x10000, 0x320(%rbx)
    mov $text_apic, %esi
    call print_64

    # 0xC00000 shows 0x400000, then, after an edit and INVLPG, 0x600000.
    movl $0x600083, TABLES + 0x2018
    movl $1111, 0xc00000
    mov 0xc00000, %eax
    movl $0x600083, TABLES + 0x2030
    invlpg 0xc00000
    movl $2222, 0xc00000
    mov 0x600000, %ecx
    cmp $1111, %eax
    jne failed_64
    cmp $2222, %ecx
    jne failed_64
    movl $0x400083, TABLES + 0x2030
    invlpg 0xc00000
    cmpl $1111, 0xc00000
    jne failed_64
    mov $text_pages, %esi
    call print_64

    # A loop whose immediate counts: each turn rewrites the instruction it comes to next.
    xor %ebx, %ebx
    mov $100, %ecx
1:  mov %ecx, changed + 1
changed:
    mov $0, %eax
    add %eax, %ebx
    dec %ecx
    jnz 1b
    cmp $5050, %ebx
    jne failed_64
    mov $text_code, %esi
    call print_64
    # SLP_TYP 5 with SLP_EN.
    mov $PM1_CONTROL, %edx
    mov $0x3400, %eax
    out %ax, %dx
1:  hlt
    jmp 1b

tick_64:
    incl ticks
    movl $0, 0xb0(%rbx)
    iretq
failed_64:
    mov $text_failed, %esi
    call print_64
    mov $1, %al
    out %al, $0xf4
    hlt
print_64:
    mov $COM1, %edx
1:  lodsb
    test %al, %al
    jz 2f
    out %al, %dx
    jmp 1b
2:  ret

    .align 16
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
gdt_pointer:
    .word 31
    .long gdt
    .align 8
idt_pointer:
    .word 0x7ff
    .quad idt
ticks:
    .long 0
text_32: .asciz "multiboot in protected mode: "
text_pit: .asciz "five ticks of the 8254\n"
text_long: .asciz "long mode\n"
text_apic: .asciz "five ticks of the local APIC\n"
text_pages: .asciz "page tables edited\n"
text_code: .asciz "code changed itself\n"
text_newline: .asciz "\n"
text_failed: .asciz "FAILED\n"
    .align 16
idt:
    .skip 0x800
