# What a loader hands to a kernel, said on port 0xe9: its command line, its RAM disk or module, eight bytes of the ACPI root pointer, and
# an M if the memory map has RAM from 1 MiB on. With PVH (Xen's public/arch-x86/hvm/start_info.h), as a multiboot image by the addresses in its
# header (ADDRESSES), or as Linux's vmlinux by the 64-bit (LONG) or 32-bit (SHORT) boot protocol (Documentation/arch/x86/boot.rst, zero-page.rst).
    .set INFO, 0x336ec578
    .text
    .macro say_text             # of ESI up to its zero
1:  lodsb
    test %al, %al
    jz 2f
    out %al, $0xe9
    jmp 1b
2:  mov $'\n', %al
    out %al, $0xe9
    .endm
    .macro say_bytes            # ECX of them at ESI
1:  lodsb
    out %al, $0xe9
    loop 1b
    mov $'\n', %al
    out %al, $0xe9
    .endm

    .ifdef LONG
    .code64
    .set LINUX, 1
    .else
    .code32
    .ifdef SHORT
    .set LINUX, 1
    .endif
    .endif

    .ifdef LINUX
    .globl _start
_start:
    mov %esi, %ebx
    mov 0x228(%ebx), %esi
    say_text
    mov 0x218(%ebx), %esi
    mov 0x21c(%ebx), %ecx
    say_bytes
    mov 0x70(%ebx), %esi
    mov $8, %ecx
    say_bytes
    # The map: entries of 20 bytes, how many at 0x1e8.
    lea 0x2d0(%ebx), %edi
    movzbl 0x1e8(%ebx), %ecx
1:  cmpl $0x100000, (%edi)
    je 2f
    add $20, %edi
    loop 1b
    hlt
2:  cmpl $1, 16(%edi)
    jne bad
    .else
    .globl _start
    .ifdef ADDRESSES
    .align 4
header:
    .long 0x1badb002, 0x10003, -(0x1badb002 + 0x10003), header, load, end, end, _start
    .set load, header
    .endif
_start:
    .ifdef ADDRESSES
    cmp $0x2badb002, %eax
    jne bad
    # The command line, and the module's bytes.
    mov 16(%ebx), %esi
    say_text
    cmpl $1, 20(%ebx)
    jne bad
    mov 24(%ebx), %edi
    mov (%edi), %esi
    mov 4(%edi), %ecx
    sub %esi, %ecx
    say_bytes
    # The root pointer lies where BIOSes have it.
    mov $0xe0000, %esi
1:  cmpl $0x20445352, (%esi)
    je 2f
    add $16, %esi
    cmp $0x100000, %esi
    jb 1b
    jmp bad
2:  mov $8, %ecx
    say_bytes
    # The map: each entry behind its own length.
    mov 48(%ebx), %edi
    mov 44(%ebx), %ecx
    add %edi, %ecx
1:  cmpl $0x100000, 4(%edi)
    je 2f
    add (%edi), %edi
    add $4, %edi
    cmp %ecx, %edi
    jb 1b
    jmp bad
2:  cmpl $1, 20(%edi)
    jne bad
    .else
    cmpl $INFO, (%ebx)
    jne bad
    mov 24(%ebx), %esi
    say_text
    cmpl $1, 12(%ebx)
    jne bad
    mov 16(%ebx), %edi
    mov (%edi), %esi
    mov 8(%edi), %ecx
    say_bytes
    mov 32(%ebx), %esi
    mov $8, %ecx
    say_bytes
    mov 40(%ebx), %edi
    mov 48(%ebx), %ecx
1:  cmpl $0x100000, (%edi)
    je 2f
    add $24, %edi
    loop 1b
    jmp bad
2:  cmpl $1, 16(%edi)
    jne bad
    .endif
    .endif
    mov $'M', %al
    out %al, $0xe9
    mov $5, %al
    out %al, $0xf4
bad:
    mov $6, %al
    out %al, $0xf4
    .ifdef ADDRESSES
end:
    .endif

    .ifdef PVH
    .section .note.Xen, "a", @note
    .align 4
    .long 4, 4, 18
    .asciz "Xen"
    .long _start
    .endif
