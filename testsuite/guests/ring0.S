# A small 64-bit kernel that looks at everything ring 0 and ring 3 can see of each other, and writes what it saw to port 0xe9.
#
# It is started in 64-bit mode at CPL 0 with an identity mapping, interrupts off, and a board of three ports:
#   0xe9  a character of the report
#   0xe8  raises the external interrupt whose vector is written
#   0xf4  the end, with a status
# Assembled and linked by `cc -nostdlib -static -no-pie -Wl,-N -Wl,-Ttext=0x100000`. No address is printed but those of the page table
# test, so that the report does not depend on the assembler.

.intel_syntax noprefix
.code64

.set KCODE, 0x08
.set KDATA, 0x10
.set UDATA, 0x20
.set UCODE, 0x28
.set TSSSEL, 0x30
.set LDTSEL, 0x40
.set GATESEL, 0x50
.set CONFSEL, 0x60
.set ABSENT, 0x68
.set READONLY, 0x70
.set EXECONLY, 0x78

.set TABLES, 0x200000            # level 4, 3, 2, 1
.set TABLES2, 0x204000           # level 4, 3, 2 of the second address space
.set PAGES, 0x800000             # read-only, absent, no-execute, supervisor
.set WINDOW, 0xc00000            # another physical page in the second address space
.set OTHER, 0xa00000

# ---------------------------------------------------------------- printing

.macro SAY text
    push rsi
    lea rsi, [rip + 901f]
    call puts
    pop rsi
    .pushsection .rodata
901: .asciz "\text"
    .popsection
.endm

.macro HEX reg
    push rax
    mov rax, \reg
    call puthex
    pop rax
.endm

# Runs an instruction that may fault and ends the line with what came of it. The stack pointer is put back; r15 is used.
.macro TRY text, insn:vararg
    SAY "\text"
    TRYQUIET \insn
    call report
.endm

.macro TRYQUIET insn:vararg
    lea r15, [rip + 902f]
    mov [recover], r15
    mov [recover_rsp], rsp
    mov qword ptr [last_vector], -1
    \insn
902:
    mov rsp, [recover_rsp]
    mov qword ptr [recover], 0
.endm

# What TRY takes as one instruction. r15 is the address behind it.
.macro PUSHPOP selector, register
    push \selector
    pop \register
.endm
.macro RETFQ
    .byte 0x48, 0xcb
.endm
.macro SYSRETQ
    .byte 0x48, 0x0f, 0x07
.endm
.macro RETFAR selector
    push \selector
    push r15
    RETFQ
.endm
.macro IRETINWARDS
    push KDATA
    push rsp
    push 0x202
    push KCODE
    push r15
    iretq
.endm

.text
.globl _start
_start:
    cld
    lea rsp, [rip + boot_stack_top]
    call make_tables
    call make_descriptors
    SAY "ring 0 guest\n"

    SAY "== the 18 instructions at CPL 0\n"
    call walk
    SAY "== faults at CPL 0\n"
    call faults
    SAY "== interrupts at CPL 0\n"
    call interrupts
    SAY "== address spaces\n"
    call spaces
    SAY "== to CPL 3 by IRETQ, IOPL 0, IF 1\n"
    lea rdi, [rip + user_main]
    mov esi, 0x202
    call enter_user
    SAY "== back at CPL 0 by SYSCALL\n"
    SAY "== to CPL 3 by SYSRETQ, IOPL 3, IF 0\n"
    lea rdi, [rip + user_iopl3]
    mov esi, 0x3002
    call enter_user_sysret
    SAY "== to CPL 3 with CR4.UMIP and CR4.TSD\n"
    call forbid
    SAY "end\n"
    xor eax, eax
finish:
    out 0xf4, al
9:  cli
    hlt
    jmp 9b

# rsi: a string. All registers but rsi are kept.
puts:
    push rax
1:  lodsb
    test al, al
    jz 2f
    out 0xe9, al
    jmp 1b
2:  pop rax
    ret

# rax: a number, printed as hexadecimal without leading zeros. All registers are kept.
puthex:
    push rax
    push rbx
    push rcx
    mov rbx, rax
    mov al, '0'
    out 0xe9, al
    mov al, 'x'
    out 0xe9, al
    mov ecx, 60
1:  test ecx, ecx
    jz 2f
    mov rax, rbx
    shr rax, cl
    jnz 2f
    sub ecx, 4
    jmp 1b
2:  mov rax, rbx
    shr rax, cl
    and eax, 15
    cmp al, 10
    jb 3f
    add al, 'a' - '0' - 10
3:  add al, '0'
    out 0xe9, al
    sub ecx, 4
    jns 2b
    pop rcx
    pop rbx
    pop rax
    ret

# Ends a line: " ok", or the exception with its error code, for a page fault with its address. All registers but r15 are kept.
report:
    push rax
    push rsi
    mov rax, [last_vector]
    cmp rax, 32
    jb 1f
    SAY " ok\n"
    jmp 3f
1:  SAY " "
    lea rsi, [rip + names]
    lea rsi, [rsi + rax * 4]
    call puts
    mov r15, 0x27d00             # 8, 10 to 14, 17 push an error code
    bt r15, rax
    jnc 2f
    SAY "("
    HEX [last_error]
    SAY ")"
    cmp eax, 14
    jne 2f
    SAY " at "
    HEX [last_cr2]
2:  SAY "\n"
3:  pop rsi
    pop rax
    ret

# ---------------------------------------------------------------- the 18 instructions of Robin and Irvine, at any level

# SGDT and SIDT: what they store must be what was loaded.
.macro TABLE_REGISTER insn, base, limit
    SAY "\insn:"
    mov qword ptr [scratch], 0
    mov qword ptr [scratch + 8], 0
    TRYQUIET \insn [scratch]
    cmp qword ptr [last_vector], -1
    jne 903f
    cmp word ptr [scratch], \limit
    jne 904f
    lea rax, [rip + \base]
    cmp [scratch + 2], rax
    jne 904f
    SAY " as loaded"
    jmp 903f
904: SAY " not as loaded"
903: call report
.endm

.macro STORE_REGISTER insn
    SAY "\insn:"
    mov ebx, 0x5a5a5a5a
    TRYQUIET \insn bx
    cmp qword ptr [last_vector], -1
    jne 903f
    SAY " "
    movzx ebx, bx
    HEX rbx
903: call report
.endm

walk:
    call walk_tables
    # PUSHF: IF, IOPL and the rest of the system flags
    SAY "pushf: "
    pushfq
    pop rbx
    mov rax, rbx
    and rax, 0x3ff700
    HEX rax
    # POPF: does it change IF?
    SAY "\npopf: IF "
    pushfq
    pop rbx
    mov rax, rbx
    xor rax, 0x200
    push rax
    popfq
    pushfq
    pop rcx
    push rbx
    popfq
    xor rcx, rbx
    test ecx, 0x200
    jz 1f
    SAY "changed\n"
    jmp 2f
1:  SAY "kept\n"
2:
    # LAR LSL VERR VERW
    lea rbp, [rip + selectors]
3:  movzx ecx, word ptr [rbp]
    cmp ecx, 0xffff
    je 4f
    call inspect
    add rbp, 2
    jmp 3b
4:
    # MOV and PUSH from segment registers show the level
    SAY "mov: cs "
    mov eax, cs
    HEX rax
    SAY " ss "
    mov eax, ss
    HEX rax
    mov eax, UDATA | 3
    mov fs, eax
    SAY "\npush: fs "
    push fs
    pop rax
    HEX rax
    SAY "\n"
    # MOV and POP to them check it
    mov ebx, KDATA
    TRY "mov: ds 0x10", mov ds, ebx
    mov ebx, 3
    mov ds, ebx
    TRY "pop: fs 0x10", PUSHPOP KDATA, fs
    TRY "pop: gs 0x23", PUSHPOP (UDATA | 3), gs
    call walk_far
    # INT n through gates of DPL 3 and DPL 0
    TRY "int: 0x80", int 0x80
    cmp qword ptr [last_vector], 0x80
    jne 6f
    SAY "int: handler entered from cs "
    HEX [last_cs]
    SAY "\n"
6:  TRY "int: 0x81", int 0x81
    ret

walk_tables:
    TABLE_REGISTER sgdt, gdt, (gdt_end-gdt-1)
    TABLE_REGISTER sidt, idt, 0xfff
    STORE_REGISTER sldt
    STORE_REGISTER str
    STORE_REGISTER smsw
    ret

# ecx: a selector.
inspect:
    SAY "selector "
    HEX rcx
    xor ebx, ebx
    xor eax, eax
    lar eax, ecx
    setz bl
    and eax, 0xf0ff00
    SAY ": lar "
    HEX rbx
    SAY " "
    HEX rax
    xor ebx, ebx
    xor eax, eax
    lsl eax, ecx
    setz bl
    SAY " lsl "
    HEX rbx
    SAY " "
    HEX rax
    xor ebx, ebx
    verr cx
    setz bl
    SAY " verr "
    HEX rbx
    xor ebx, ebx
    verw cx
    setz bl
    SAY " verw "
    HEX rbx
    SAY "\n"
    ret

# Far pointers with 32-bit offsets, which Intel's and AMD's processors agree on: CALL FAR [far_pointer], JMP FAR [far_pointer].
.macro CALLFAR
    .byte 0xff, 0x1c, 0x25
    .long far_pointer
.endm
.macro JMPFAR selector           # to the address behind it
    mov [far_pointer], r15d
    mov word ptr [far_pointer + 4], \selector
    .byte 0xff, 0x2c, 0x25
    .long far_pointer
.endm
.macro POINTER selector, target
    lea rax, [rip + \target]
    mov [far_pointer], eax
    mov word ptr [far_pointer + 4], \selector
.endm

walk_far:
    mov ebx, cs
    POINTER bx, far_target
    TRY "call far: own cs", CALLFAR
    POINTER KCODE, far_target
    TRY "call far: 0x8", CALLFAR
    POINTER CONFSEL, far_target
    mov qword ptr [seen_cs], 0
    TRY "call far: conforming 0x60", CALLFAR
    SAY "call far: cs there "
    HEX [seen_cs]
    POINTER GATESEL | 3, no_target
    mov qword ptr [seen_cs], 0
    TRY "\ncall far: gate 0x53", CALLFAR
    SAY "call far: cs behind the gate "
    HEX [seen_cs]
    SAY "\n"
    POINTER ABSENT, far_target
    TRY "call far: 0x68", CALLFAR
    TRY "jmp far: own cs", JMPFAR bx
    TRY "jmp far: 0x8", JMPFAR KCODE
    TRY "ret far: own cs", RETFAR rbx
    TRY "ret far: 0x8", RETFAR KCODE
    ret

# Reached by CALL FAR with a 32-bit frame.
far_target:
    mov eax, cs
    mov [seen_cs], rax
    .byte 0xcb                   # retf

# Reached through the call gate, with a 64-bit frame.
gate_target:
    mov eax, cs
    mov [seen_cs], rax
    RETFQ

no_target:
    ud2

# ---------------------------------------------------------------- faults

faults:
    xor ecx, ecx
    mov eax, 1
    cdq
    TRY "div by zero:", div ecx
    TRY "ud2:", ud2
    TRY "int3:", int3
    TRY "icebp:", .byte 0xf1
    mov rax, 0x800000000000
    TRY "load from 0x800000000000:", mov ebx, [rax]
    mov rbp, rax
    TRY "load through rbp:", mov ebx, [rbp]
    mov ebx, ABSENT
    TRY "mov ds 0x68:", mov ds, ebx
    TRY "mov ss 0x68:", mov ss, ebx
    mov ebx, 0xfff8
    TRY "mov ds 0xfff8:", mov ds, ebx
    mov ebx, EXECONLY
    TRY "mov ds 0x78:", mov ds, ebx
    mov ebx, 0x0c
    TRY "mov fs 0xc, from the LDT:", mov fs, ebx
    mov ebx, 0x14
    TRY "mov fs 0x14, beyond the LDT:", mov fs, ebx
    mov ebx, UDATA | 3
    TRY "mov ss 0x23:", mov ss, ebx
    mov ecx, 0x12345
    TRY "rdmsr 0x12345:", rdmsr
    mov rax, cr0
    mov rbx, rax
    btr rax, 31
    TRY "cr0.pg off in 64-bit mode:", mov cr0, rax
    mov rax, cr4
    btr rax, 5
    TRY "cr4.pae off:", mov cr4, rax
    mov rax, rbx
    or rax, 8
    mov cr0, rax
    TRY "fld1 with cr0.ts:", fld1
    clts
    TRY "fld1 after clts:", fld1
    fninit
    call registers
    call page_faults
    call frames
    call double_fault
    call single_step
    ret

# The table makes four pages at PAGES: read-only, absent, no-execute, supervisor.
page_faults:
    TRY "read a read-only page:", mov eax, [PAGES]
    TRY "write it:", mov [PAGES], eax
    mov rax, cr0
    btr rax, 16
    mov cr0, rax
    TRY "write it with cr0.wp off:", mov [PAGES], eax
    bts rax, 16
    mov cr0, rax
    TRY "read an absent page:", mov eax, [PAGES + 0x1000]
    TRY "write it:", mov [PAGES + 0x1008], eax
    TRY "read across into it:", mov rax, [PAGES + 0xffc]
    mov eax, PAGES + 0x2000
    TRY "run a no-execute page:", call rax
    TRY "read a supervisor page:", mov eax, [PAGES + 0x3000]
    SAY "accessed and dirty: read-only page "
    mov rax, [TABLES + 0x3000]
    and eax, 0x60
    HEX rax
    SAY ", absent page "
    mov rax, [TABLES + 0x3008]
    and eax, 0x60
    HEX rax
    SAY ", supervisor page "
    mov rax, [TABLES + 0x3018]
    and eax, 0x60
    HEX rax
    SAY "\n"
    ret

# Writes a model-specific register that the code names, reads it back, and puts the old value back.
.macro MSR number, high
    SAY "msr \number:"
    mov ecx, \number
    rdmsr
    push rdx
    push rax
    mov eax, \number & 0xffff | 0x12340000
    mov edx, \high
    mov ecx, \number
    TRYQUIET wrmsr
    mov ecx, \number
    rdmsr
    shl rdx, 32
    add rax, rdx
    SAY " "
    HEX rax
    call report
    pop rax
    pop rdx
    mov ecx, \number
    wrmsr
.endm

.macro DIVIDE operand:vararg
    xor ebx, ebx
    mov dword ptr [scratch], 0
    mov eax, 7
    cdq
    TRY "div by zero after a comparison:", COMPAREDIV \operand
    mov eax, 7
    cdq
    TRY "again:", COMPAREDIV \operand
    SAY "and by two:"
    mov ebx, 2
    mov [scratch], ebx
    mov eax, 7
    cdq
    COMPAREDIV \operand
    HEX rax
    call report_pass
    mov dword ptr [scratch], 0
.endm
.macro COMPAREDIV operand:vararg
    cmp eax, 1
    div \operand
.endm
report_pass:
    SAY "\n"
    ret

registers:
    MSR 0xc0000081, 0x80001234
    MSR 0xc0000082, 0xffff8000
    MSR 0xc0000083, 0x00001234
    MSR 0xc0000083, 0x00008000
    MSR 0xc0000084, 0
    MSR 0xc0000103, 0
    MSR 0x174, 0
    MSR 0x175, 0x00001234
    MSR 0x176, 0x00001234
    MSR 0xc0000100, 0x00001234
    MSR 0xc0000100, 0x00008000
    MSR 0xc0000101, 0xffffabcd
    MSR 0xc0000101, 0x00010000
    MSR 0xc0000102, 0x00001234
    MSR 0xc0000102, 0xffff0000
    SAY "cpuid by a constant and by a variable:"
    mov ebp, 0x80000003
    call identify_variable
    mov rsi, rax
    xor edi, edi
    mov eax, 0x80000003
    cpuid
    call mix
    cmp rax, rsi
    setne dil
    HEX rdi
    mov ebp, 0
    call identify_variable
    mov rsi, rax
    xor eax, eax
    cpuid
    call mix
    cmp rax, rsi
    setne dil
    HEX rdi
    SAY "\ncr8:"
    mov edi, 5
    mov cr8, rdi
    mov rax, cr8
    HEX rax
    SAY " "
    mov edi, 9
    mov cr8, rdi
    mov rax, cr8
    HEX rax
    SAY " "
    mov rax, cr8
    mov edi, 3
    mov cr8, rdi
    mov rax, cr8
    HEX rax
    mov edi, 16
    TRY " cr8 of 16:", mov cr8, rdi
    mov rax, cr8
    HEX rax
    SAY "\n"
    xor edi, edi
    mov cr8, rdi
    DIVIDE ebx
    DIVIDE dword ptr [scratch]
    ret

identify_variable:
    mov eax, ebp
    cpuid
mix:
    shl rbx, 7
    shl rcx, 13
    shl rdx, 21
    add rax, rbx
    xor rax, rcx
    add rax, rdx
    ret

# Status flags in the frame of a page fault, where the code overwrites them later. rsi: where the loads are, which end in the absent
# page; rbx: a present place.
.macro FRAME text, code
    SAY "flags of \text in the frame:"
    mov esi, PAGES + 0xf00
    mov edi, 0x12345678
    mov ebp, 0x80000003
    lea rbx, [rip + scratch]
    mov dword ptr [rbx], 0x90000001
    xor edx, edx
    xor ecx, ecx
    mov r8d, 0x7fffffff
    TRYQUIET \code
    call report_frame
.endm

report_frame:
    mov rax, [last_flags]
    and eax, 0x8d5
    SAY " "
    HEX rax
    call report
    ret

.macro COMPAREBEFORE               # by the block before, in registers that stay
1:  mov eax, [rsi]
    imul eax, [rbx]
    add rsi, 4
    add ecx, eax
    cmp esi, edi
    jne 1b
.endm
.macro COMPAREGONE                 # by the block before, in a register that changes
    jmp 1f
1:  mov r9d, [rbx]
    mov r8d, [rsi]
    add rsi, 4
    cmp r8d, r9d
    jno 1b
    jmp 1b
.endm
.macro ADDHERE
1:  add rsi, 4
    add ebp, r8d
    mov ecx, [rsi]
    mov edx, [rsi]
    cmp ecx, edx
    je 1b
.endm
.macro ADDDOUBLE                   # cannot be told from the sum
1:  add rsi, 4
    lea eax, [esi + 0x7ffff000]
    add eax, eax
    mov ecx, [rsi]
    cmp ecx, edx
    jmp 1b
.endm
.macro INCKEEPS                    # CF of one, the rest of another
1:  add rsi, 4
    sub edx, 1
    inc edx
    mov ecx, [rsi]
    xor ecx, ecx
    jmp 1b
.endm
.macro MEMORYSUM
1:  add rsi, 4
    mov r9d, ebp
    add r9d, [rbx]
    mov ecx, [rsi]
    xor ecx, ecx
    jmp 1b
.endm
.macro SUBMOVED                    # its operand changes between two loads
1:  add rsi, 4
    sub ebp, edi
    mov ecx, [rbx]
    mov edi, [rbx]
    mov eax, [rsi]
    or eax, 1
    jmp 1b
.endm
.macro FARTARGET
1:  add rsi, 4
    cmp edi, ebp
    jmp load_far
.endm
.macro CALLED
1:  add rsi, 4
    cmp ebp, edi
    call load_called
    jmp 1b
.endm

frames:
    FRAME "cmp before a loop's load", COMPAREBEFORE
    FRAME "cmp of what was loaded over", COMPAREGONE
    FRAME "add", ADDHERE
    FRAME "add to itself", ADDDOUBLE
    FRAME "inc after sub", INCKEEPS
    FRAME "add of memory", MEMORYSUM
    FRAME "sub whose operand changes", SUBMOVED
    FRAME "cmp before a jump to another page", FARTARGET
    FRAME "cmp before a call", CALLED
    ret

# A stack that cannot be pushed to: #SS cannot be delivered, #DF comes on the stack of IST 1.
double_fault:
    SAY "push to a stack that is not canonical:"
    lea r15, [rip + 1f]
    mov [recover], r15
    mov [recover_rsp], rsp
    mov rsp, 0x800000000000
    push rax
1:  mov qword ptr [recover], 0
    call report
    mov rax, [handler_rsp]
    lea rbx, [rip + ist_stack]
    sub rax, rbx
    cmp rax, 4096
    SAY "double fault on the stack of ist 1:"
    ja 2f
    SAY " yes\n"
    ret
2:  SAY " no\n"
    ret

# TF by POPF traps after the instruction that follows.
single_step:
    mov qword ptr [count], 0
    pushfq
    pop rbx
    mov rax, rbx
    or rax, 0x100
    push rax
    popfq
    nop
1:  nop
    SAY "single steps: "
    HEX [count]
    SAY ", stopped after the instruction that follows popf:"
    lea rax, [rip + 1b]
    call same_place
    mov rax, dr6
    SAY "dr6: "
    and eax, 0xe00f
    HEX rax
    SAY "\n"
    mov eax, 0xffff0ff0
    mov dr6, rax
    ret

# rax: an address. Was the last handler to return there?
same_place:
    cmp rax, [last_rip]
    jne 1f
    SAY " yes\n"
    ret
1:  SAY " no\n"
    ret

# ---------------------------------------------------------------- interrupts

.macro RAISE
    mov al, 0x40
    out 0xe8, al
.endm

interrupts:
    # IF by POPF: held while it is clear, delivered when it is set
    cli
    mov qword ptr [count], 0
    RAISE
    nop
    nop
    SAY "IF 0: interrupts taken "
    HEX [count]
    pushfq
    pop rbx
    or rbx, 0x200
    push rbx
    popfq
1:  nop
    cli
    SAY "\nIF 1 by popf: interrupts taken "
    HEX [count]
    SAY ", at once:"
    lea rax, [rip + 1b]
    call same_place
    SAY "IF in its handler: "
    mov rax, [handler_flags]
    and eax, 0x200
    HEX rax
    SAY "\n"
    # STI holds them for one instruction more
    mov qword ptr [count], 0
    RAISE
    sti
    nop
2:  nop
    cli
    SAY "IF 1 by sti: interrupts taken "
    HEX [count]
    SAY ", after the next instruction:"
    lea rax, [rip + 2b]
    call same_place
    # STI and HLT: no interrupt is lost between them
    mov qword ptr [count], 0
    RAISE
    sti
    hlt
3:  cli
    SAY "sti hlt: interrupts taken "
    HEX [count]
    SAY ", behind hlt:"
    lea rax, [rip + 3b]
    call same_place
    # CLI in the shadow of STI: it stays pending
    mov qword ptr [count], 0
    RAISE
    sti
    cli
    nop
    SAY "sti cli: interrupts taken "
    HEX [count]
    sti
    nop
    cli
    SAY ", after another sti "
    HEX [count]
    SAY "\n"
    ret

# ---------------------------------------------------------------- address spaces

spaces:
    mov dword ptr [WINDOW], 0x1111
    mov dword ptr [OTHER], 0x2222
    mov rbx, cr3
    mov eax, TABLES2
    mov cr3, rax
    mov ecx, [WINDOW]
    mov dword ptr [WINDOW], 0x3333
    mov rdx, cr3
    mov cr3, rbx
    SAY "first space: "
    mov eax, [WINDOW]
    HEX rax
    SAY ", second space: "
    HEX rcx
    SAY ", cr3 there "
    HEX rdx
    SAY ", written there: "
    mov eax, [OTHER]
    HEX rax
    # a page table changed under a cached translation
    mov rdi, [TABLES2 + 0x2000 + 6 * 8]
    xchg rdi, [TABLES + 0x2000 + 6 * 8]
    invlpg [WINDOW]
    SAY "\nafter a new entry and invlpg: "
    mov eax, [WINDOW]
    HEX rax
    mov [TABLES + 0x2000 + 6 * 8], rdi
    invlpg [WINDOW]
    SAY ", and back: "
    mov eax, [WINDOW]
    HEX rax
    SAY "\n"
    # reserved bits of CR3
    mov rax, rbx
    bts rax, 62
    TRY "cr3 with bit 62:", mov cr3, rax
    ret

# ---------------------------------------------------------------- user mode

# rdi: where, rsi: flags. Returns when the user calls SYSCALL with rax = 0.
enter_user:
    call save_kernel
    lea rax, [rip + user_stack_top]
    push UDATA | 3
    push rax
    push rsi
    push UCODE | 3
    push rdi
    iretq

# The same by SYSRETQ.
enter_user_sysret:
    call save_kernel
    lea rsp, [rip + user_stack_top]
    mov rcx, rdi
    mov r11, rsi
    swapgs
    SYSRETQ

# Keeps rbx, rbp and the return address of its caller's caller.
save_kernel:
    mov [kernel_rbx], rbx
    mov [kernel_rbp], rbp
    lea rax, [rsp + 8]
    mov [kernel_rsp], rax
    # GS as an operating system has it: the kernel's in IA32_KERNEL_GS_BASE while the user runs. IRETQ needs SWAPGS before; here the
    # base is set as it would leave it.
    mov ecx, 0xc0000101
    mov eax, 0x1000
    xor edx, edx
    wrmsr
    mov ecx, 0xc0000102
    mov eax, 0x2000
    wrmsr
    ret

# SYSCALL: rax = 0 ends user mode, else the call comes back with the level it ran at in rax and the flags in rdx.
syscall_entry:
    swapgs
    test rax, rax
    jz 1f
    mov [user_rsp], rsp
    lea rsp, [rip + syscall_stack_top]
    pushfq
    pop rdx
    mov eax, cs
    and eax, 3
    mov r8, rcx
    mov ecx, 0xc0000101
    push rax
    push rdx
    rdmsr
    mov r9d, eax
    pop rdx
    pop rax
    mov rcx, r8
    mov rsp, [user_rsp]
    swapgs
    SYSRETQ
1:  mov rsp, [kernel_rsp]
    mov rbx, [kernel_rbx]
    mov rbp, [kernel_rbp]
    ret

user_main:
    call walk
    SAY "== privileged instructions at CPL 3\n"
    TRY "hlt:", hlt
    TRY "cli:", cli
    TRY "sti:", sti
    TRY "mov from cr0:", mov rax, cr0
    TRY "mov to cr3:", mov cr3, rax
    TRY "mov from dr7:", mov rax, dr7
    TRY "lgdt:", lgdt [scratch]
    TRY "lidt:", lidt [scratch]
    TRY "ltr:", ltr ax
    TRY "clts:", clts
    TRY "invlpg:", invlpg [scratch]
    TRY "wbinvd:", wbinvd
    TRY "rdmsr:", rdmsr
    TRY "wrmsr:", wrmsr
    TRY "swapgs:", swapgs
    TRY "sysretq:", SYSRETQ
    TRY "in from port 0xf4:", in al, 0xf4
    TRY "in from port 0xe8, allowed by the map:", in al, 0xe8
    TRY "in of four ports from 0xe8:", in eax, 0xe8
    mov ebx, KDATA | 3
    TRY "mov ds 0x13:", mov ds, ebx
    mov ebx, KDATA
    TRY "mov ss 0x10:", mov ss, ebx
    xor ebx, ebx
    TRY "mov ss 0:", mov ss, ebx
    call user_iret
    SAY "== faults at CPL 3\n"
    TRY "ud2:", ud2
    TRY "int3:", int3
    TRY "read an absent page:", mov eax, [PAGES + 0x1000]
    TRY "write a read-only page:", mov [PAGES], eax
    TRY "read a supervisor page:", mov eax, [PAGES + 0x3000]
    mov eax, PAGES + 0x2000
    TRY "run a no-execute page:", call rax
    pushfq
    or dword ptr [rsp], 0x40000
    popfq
    lea rax, [rip + scratch]
    SAY "misaligned with RFLAGS.AC:"
    TRYQUIET mov ebx, [rax + 1]
    pushfq
    and dword ptr [rsp], ~0x40000
    popfq
    call report
    SAY "== interrupts at CPL 3, IOPL 0\n"
    # POPF cannot clear IF
    mov qword ptr [count], 0
    pushfq
    and dword ptr [rsp], ~0x200
    popfq
    RAISE
1:  nop
    SAY "after popf with IF 0: interrupts taken "
    HEX [count]
    SAY ", at once:"
    lea rax, [rip + 1b]
    call same_place
    SAY "interrupted cs "
    HEX [last_cs]
    SAY "\n== SYSCALL and SYSRETQ\n"
    mov eax, 1
    syscall
2:  SAY "level in the kernel "
    HEX rax
    SAY ", IF there "
    and edx, 0x200
    HEX rdx
    SAY ", rcx the return address:"
    lea rax, [rip + 2b]
    mov [last_rip], rcx
    call same_place
    SAY "gs base there "
    HEX r9
    SAY ", here "
    rdgsbase rax
    HEX rax
    SAY ", cs "
    mov eax, cs
    HEX rax
    SAY " ss "
    mov eax, ss
    HEX rax
    SAY "\n"
    xor eax, eax
    syscall
    ud2

# IRETQ at CPL 3 keeps IF and IOPL, and cannot go inwards.
user_iret:
    TRY "iretq to cs 0x8:", IRETINWARDS
    mov rbx, rsp
    lea rax, [rip + 2f]
    push UDATA | 3
    push rbx
    push 0x3002
    push UCODE | 3
    push rax
    iretq
2:  SAY "iretq with IF 0, IOPL 3: flags "
    pushfq
    pop rax
    and eax, 0x3200
    HEX rax
    SAY "\n"
    ret

# With IOPL 3 CLI, STI, POPF and all ports work; IOPL itself stays out of reach.
user_iopl3:
    TRY "cli:", cli
    TRY "in from port 0xf4:", in al, 0xf4
    mov qword ptr [count], 0
    RAISE
    nop
    SAY "IF 0: interrupts taken "
    HEX [count]
    pushfq
    pop rbx
    or ebx, 0x200
    and ebx, ~0x3000
    push rbx
    popfq
1:  nop
    SAY "\nIF 1 by popf: interrupts taken "
    HEX [count]
    SAY ", at once:"
    lea rax, [rip + 1b]
    call same_place
    SAY "flags after popf with IOPL 0: "
    pushfq
    pop rax
    and eax, 0x3200
    HEX rax
    SAY "\n"
    TRY "hlt:", hlt
    xor eax, eax
    syscall
    ud2

# UMIP makes five of the eighteen privileged.
forbid:
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ecx, 2
    jc 1f
    SAY "umip: not offered\n"
    ret
1:  mov rax, cr4
    push rax
    or eax, 0x804
    mov cr4, rax
    TRY "rdtsc at CPL 0:", rdtsc
    lea rdi, [rip + user_forbidden]
    mov esi, 0x2
    call enter_user
    pop rax
    mov cr4, rax
    ret

user_forbidden:
    call walk_tables
    TRY "rdtsc:", rdtsc
    xor eax, eax
    syscall
    ud2

    .p2align 12
load_far:
    mov eax, [rsi]
    add rsi, 4
    xor eax, edi
    cmp edi, ebp
    jmp load_far
load_called:
    mov rax, [rsi]
    xor eax, eax
    ret

# ---------------------------------------------------------------- handlers

.macro STUB vector
stub_\vector:
    .if (\vector == 8) || ((\vector >= 10) && (\vector <= 14)) || (\vector == 17)
    .else
    push 0
    .endif
    push \vector
    jmp common
    .pushsection .rodata.stubs, "a"
    .quad \vector, stub_\vector
    .popsection
.endm

.pushsection .rodata.stubs, "a"
stubs:
.popsection
.irp vector, 0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 19, 0x40, 0x80, 0x81
STUB \vector
.endr
.pushsection .rodata.stubs, "a"
.quad -1, 0
.popsection

# Stack: rax, vector, error code, RIP, CS, RFLAGS, RSP, SS. A fault goes on where [recover] says; interrupts and traps go back.
common:
    push rax
    mov rax, [rsp + 8]
    mov [last_vector], rax
    mov eax, [rsp + 16]
    mov [last_error], rax
    mov rax, [rsp + 24]
    mov [last_rip], rax
    mov rax, [rsp + 32]
    mov [last_cs], rax
    mov rax, [rsp + 40]
    mov [last_flags], rax
    mov rax, cr2
    mov [last_cr2], rax
    mov [handler_rsp], rsp
    pushfq
    pop rax
    mov [handler_flags], rax
    inc qword ptr [count]
    mov rax, [rsp + 8]
    cmp rax, 0x20
    jae 2f
    cmp rax, 3
    je 2f
    cmp rax, 1
    je 1f
    mov rax, [recover]
    test rax, rax
    jz unexpected
    mov [rsp + 24], rax
    mov rax, [recover_rsp]
    mov [rsp + 48], rax
    jmp 2f
1:  and dword ptr [rsp + 40], ~0x100
2:  pop rax
    add rsp, 16
    iretq

unexpected:
    SAY "unexpected:"
    call report
    mov al, 1
    jmp finish

# ---------------------------------------------------------------- setup

make_tables:
    mov edi, TABLES
    mov ecx, 0x8000 / 8
    xor eax, eax
    rep stosq
    mov dword ptr [TABLES], TABLES + 0x1007
    mov dword ptr [TABLES + 0x1000], TABLES + 0x2007
    mov dword ptr [TABLES2], TABLES2 + 0x1007
    mov dword ptr [TABLES2 + 0x1000], TABLES2 + 0x2007
    mov eax, 0x87                # 2 MiB, user, writable
    xor ecx, ecx
1:  mov [TABLES + 0x2000 + rcx * 8], rax
    mov [TABLES2 + 0x2000 + rcx * 8], rax
    add eax, 0x200000
    inc ecx
    cmp ecx, 8
    jb 1b
    mov dword ptr [TABLES + 0x2000 + 4 * 8], TABLES + 0x3007
    mov dword ptr [TABLES2 + 0x2000 + 6 * 8], OTHER | 0x87
    mov dword ptr [TABLES + 0x3000], PAGES | 5
    mov rax, 0x8000000000802007
    mov [TABLES + 0x3010], rax
    mov dword ptr [TABLES + 0x3018], PAGES + 0x3000 | 3
    mov eax, TABLES
    mov cr3, rax
    ret

# Base of a system descriptor at `at`.
.macro SETBASE at, target
    lea rax, [rip + \target]
    mov [\at + 2], ax
    shr eax, 16
    mov [\at + 4], al
    mov [\at + 7], ah
.endm

make_descriptors:
    SETBASE gdt + TSSSEL, tss
    SETBASE gdt + LDTSEL, ldt
    lea rax, [rip + gate_target]
    mov [gdt + GATESEL], ax
    shr eax, 16
    mov [gdt + GATESEL + 6], ax
    lea rax, [rip + interrupt_stack_top]
    mov [tss + 4], rax
    lea rax, [rip + ist_stack_top]
    mov [tss + 0x24], rax
    lea rax, [rip + gdt]
    mov [scratch + 2], rax
    mov word ptr [scratch], gdt_end - gdt - 1
    lgdt [scratch]
    lea rax, [rip + idt]
    mov [scratch + 2], rax
    mov word ptr [scratch], 0xfff
    lidt [scratch]
    lea rsi, [rip + stubs]
1:  lodsq
    mov rdx, rax
    lodsq
    cmp rdx, -1
    je 3f
    mov ecx, edx
    shl ecx, 4
    lea rdi, [rip + idt]
    add rdi, rcx
    mov [rdi], ax
    mov word ptr [rdi + 2], KCODE
    mov word ptr [rdi + 4], 0x8e00
    cmp edx, 0x80                # INT 0x80 and INT3 may be called from CPL 3
    je 2f
    cmp edx, 3
    jne 4f
2:  mov word ptr [rdi + 4], 0xee00
4:  shr eax, 16
    mov [rdi + 6], ax
    mov dword ptr [rdi + 8], 0
    jmp 1b
3:  mov byte ptr [idt + 8 * 16 + 4], 1
    mov eax, KDATA
    mov ss, eax
    xor eax, eax
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    push KCODE
    lea rax, [rip + 5f]
    push rax
    RETFQ
5:  mov eax, LDTSEL
    lldt ax
    mov eax, TSSSEL
    ltr ax
    mov ecx, 0xc0000081          # STAR
    xor eax, eax
    mov edx, 0x00180008
    wrmsr
    mov ecx, 0xc0000082          # LSTAR
    lea rax, [rip + syscall_entry]
    xor edx, edx
    wrmsr
    mov ecx, 0xc0000084          # FMASK: IF, DF, TF
    mov eax, 0x700
    wrmsr
    ret

# ---------------------------------------------------------------- data

.section .rodata
names: .asciz "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "#09", "#TS", "#NP", "#SS", "#GP", "#PF", "#15"
    .asciz "#MF", "#AC", "#18", "#XM"
    .fill 12, 4, 0x3f3f
.balign 2
selectors: .short 0, KCODE, KDATA, UDATA, UDATA | 3, UCODE | 3, TSSSEL, LDTSEL, GATESEL, CONFSEL, ABSENT, READONLY, EXECONLY, 0x0c, 0xfff8, 0xffff

.data
.balign 16
gdt:
    .quad 0
    .quad 0x00af9b000000ffff     # kernel code
    .quad 0x00cf93000000ffff     # kernel data
    .quad 0x00cffb000000ffff     # 32-bit user code
    .quad 0x00cff3000000ffff     # user data
    .quad 0x00affb000000ffff     # user code
    .quad 0x0000890000000000 + (tss_end - tss - 1), 0
    .quad 0x0000820000000000 + (ldt_end - ldt - 1), 0
    .quad 0x0000ec0000000000 + (KCODE << 16), 0
    .quad 0x00af9f000000ffff     # conforming code
    .quad 0x00cf13000000ffff     # not present
    .quad 0x00cff1000000ffff     # read-only data, DPL 3
    .quad 0x00aff9000000ffff     # execute-only code, DPL 3
gdt_end:
.balign 16
ldt:
    .quad 0, 0x0040f30000000fff
ldt_end:
.balign 16
tss:
    .fill 0x66, 1, 0
    .short tss_map - tss
tss_map:
    .fill 0xe8 / 8, 1, 0xff
    .byte 0xfc                   # ports 0xe8 and 0xe9
    .fill 3, 1, 0xff
tss_end:

.bss
.balign 16
idt: .skip 4096
scratch: .skip 16
far_pointer: .skip 8
recover: .skip 8
recover_rsp: .skip 8
last_vector: .skip 8
last_error: .skip 8
last_rip: .skip 8
last_cs: .skip 8
last_cr2: .skip 8
handler_rsp: .skip 8
handler_flags: .skip 8
last_flags: .skip 8
count: .skip 8
seen_cs: .skip 8
kernel_rsp: .skip 8
kernel_rbx: .skip 8
kernel_rbp: .skip 8
user_rsp: .skip 8
.balign 16
.skip 4096
boot_stack_top:
.skip 4096
user_stack_top:
.skip 4096
interrupt_stack_top:
.skip 4096
syscall_stack_top:
ist_stack: .skip 4096
ist_stack_top:

.section .note.GNU-stack, "", @progbits
