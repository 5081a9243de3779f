# A 64-bit kernel that changes under its own feet: code whose page is mapped elsewhere, by INVLPG and by CR3; code that is overwritten;
# string instructions across pages; interrupts that wait for IF. For each part it writes a line to port 0xe9.
#
# Started and linked as ring0.S; port 0xe8 raises the interrupt whose vector is written, port 0xf4 is the end.

.intel_syntax noprefix
.code64
.set V, 0x40000000              # a page of code, through the table at PT or PT2
.set PT, 0x800000               # level 1; level 2 at PT + 0x1000
.set TOP2, 0x810000             # levels 4, 3, 2, 1 of the second address space
.set P1, 0x820000
.set P2, 0x821000
.set P3, 0x822000
.set P4, 0x823000
.set ROUNDS, 3000

.macro LINE text
    lea rsi, [rip + 901f]
    call puts
    .pushsection .rodata
901: .asciz "\text"
    .popsection
.endm
# Writes the line if equal, else ends with status 1.
.macro EXPECT a, b, text
    mov rax, \b
    cmp \a, rax
    jne failed
    LINE "\text\n"
.endm

.text
.globl _start
_start:
    cld
    lea rsp, [rip + stack_top]
    lgdt [rip + gdtr]
    push 8
    lea rax, [rip + 1f]
    push rax
    .byte 0x48, 0xcb
1:  lea rax, [rip + handler]
    lea rdi, [rip + idt + 0x40 * 16]
    mov [rdi], ax
    mov dword ptr [rdi + 2], 0x8e000008
    mov word ptr [rdi + 4], 0x8e00
    shr rax, 16
    mov [rdi + 6], ax
    lidt [rip + idtr]
    # The level 3 table is at 0x2000: its second entry maps V.
    mov qword ptr [0x2008], PT + 0x1007
    mov qword ptr [PT + 0x1000], PT + 7
    mov qword ptr [PT], P1 + 7
    # The second address space: the same but for V.
    mov qword ptr [TOP2], TOP2 + 0x1007
    mov rax, [0x2000]
    mov [TOP2 + 0x1000], rax
    mov qword ptr [TOP2 + 0x1008], TOP2 + 0x2007
    mov qword ptr [TOP2 + 0x2000], TOP2 + 0x3007
    mov qword ptr [TOP2 + 0x3000], P2 + 7
    # mov eax, 1 (or 2); ret
    mov dword ptr [P1], 0x000001b8
    mov dword ptr [P1 + 4], 0x0000c300
    mov dword ptr [P2], 0x000002b8
    mov dword ptr [P2 + 4], 0x0000c300

    # Remapped by INVLPG, called directly and through a register.
    xor ebx, ebx
    mov ebp, ROUNDS
1:  mov qword ptr [PT], P1 + 7
    invlpg [V]
    mov r8d, V
    call r8
    add rbx, rax
    call direct
    add rbx, rax
    mov qword ptr [PT], P2 + 7
    invlpg [V]
    call r8
    add rbx, rax
    call direct
    add rbx, rax
    dec ebp
    jnz 1b
    EXPECT rbx, ROUNDS * 6, "remapped by INVLPG"

    # An instruction whose last bytes are on another page, which is remapped: mov eax, 0x00001 or 0x10001; ret.
    mov word ptr [P1 + 0xffd], 0x01b8
    mov byte ptr [P1 + 0xfff], 0
    mov dword ptr [P3], 0x00c30000
    mov dword ptr [P4], 0x00c30001
    mov qword ptr [PT], P1 + 7
    invlpg [V]
    xor ebx, ebx
    mov ebp, ROUNDS
    mov r8d, V + 0xffd
1:  mov qword ptr [PT + 8], P3 + 7
    invlpg [V + 0x1000]
    call r8
    add rbx, rax
    call crossing
    add rbx, rax
    mov qword ptr [PT + 8], P4 + 7
    invlpg [V + 0x1000]
    call r8
    add rbx, rax
    call crossing
    add rbx, rax
    dec ebp
    jnz 1b
    EXPECT rbx, ROUNDS * 0x20004, "remapped in an instruction"

    # Remapped by CR3.
    mov qword ptr [PT], P1 + 7
    invlpg [V]
    xor ebx, ebx
    mov ebp, ROUNDS
    mov r9, cr3
    mov r10d, TOP2
1:  mov cr3, r9
    call direct
    add rbx, rax
    mov cr3, r10
    call direct
    add rbx, rax
    dec ebp
    jnz 1b
    mov cr3, r9
    EXPECT rbx, ROUNDS * 3, "remapped by CR3"

    # Overwritten through another mapping, and in the loop that runs.
    xor ebx, ebx
    mov ebp, ROUNDS
1:  mov [P1 + 1], ebp
    call direct
    add rbx, rax
    mov dword ptr [rip + patched + 1], ebp
patched: mov eax, 0x12345678
    add rbx, rax
    dec ebp
    jnz 1b
    EXPECT rbx, ROUNDS * (ROUNDS + 1), "overwritten"

    # Strings over the ends of pages.
    mov edi, 0x900ff0
    mov ecx, 0x2345
    mov al, 0x5a
    rep stosb
    mov esi, 0x900fe8
    mov edi, 0xa00ffc
    mov ecx, 0x480
    rep movsq
    lea rbx, [rdi + rsi]
    mov esi, 0xa00ffc
    mov ecx, 0x2400
    xor edx, edx
1:  lodsb
    movzx eax, al
    add edx, eax
    dec ecx
    jnz 1b
    EXPECT rbx, 0xa00ffc + 0x900fe8 + 2 * 0x2400, "string ends"
    EXPECT rdx, 0x5a * 0x2345, "string bytes"

    # An interrupt that waits for STI, then one that waits for POPF.
    mov qword ptr [rip + taken], 0
    mov al, 0x40
    out 0xe8, al
    mov ebp, ROUNDS
1:  sti
    cli
    dec ebp
    jnz 1b
    sti
    nop
    cli
    EXPECT [rip + taken], 1, "waited for STI"
    sti
    pushfq
    cli
    out 0xe8, al
    mov rbx, [rip + taken]
    popfq
    mov rdx, [rip + taken]
    cli
    EXPECT rbx, 1, "held by CLI"
    EXPECT rdx, 2, "taken at POPF"
    # Held for one instruction after STI.
    mov al, 0x40
    out 0xe8, al
    sti
    mov rbx, [rip + taken]
    mov rdx, [rip + taken]
    cli
    EXPECT rbx, 2, "held after STI"
    EXPECT rdx, 3, "and taken"

    # A long loop without memory, flags carried round: somebody may look, and nothing may be lost.
    mov ecx, 30000000
    xor edx, edx
    stc
1:  adc edx, 0
    lea ecx, [rcx - 1]
    jrcxz 2f
    stc
    jmp 1b
2:  EXPECT rdx, 30000000, "carried"
    LINE "end\n"
    xor eax, eax
9:  out 0xf4, al
    cli
    hlt
    jmp 9b
failed:
    LINE "wrong\n"
    mov al, 1
    jmp 9b

handler:
    inc qword ptr [rip + taken]
    iretq

direct:
    mov r11d, V
    jmp r11

crossing:
    mov r11d, V + 0xffd
    jmp r11

puts:
1:  lodsb
    test al, al
    jz 2f
    out 0xe9, al
    jmp 1b
2:  ret

.data
.balign 16
gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdtr: .word 23
    .quad gdt
idtr: .word 0x41 * 16 - 1
    .quad idt
taken: .quad 0
.bss
.balign 16
idt: .skip 0x41 * 16
    .skip 4096
stack_top:
