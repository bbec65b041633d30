# The trial's guest, a boot sector: what a stock kernel's start asks of a CPU. Real mode, paging, 64-bit mode and an
# instruction of SSE2. It prints R in real mode and L in 64-bit mode, then lets QEMU's isa-debug-exit end QEMU.
#
# gcc -c -m32 -o kvm_guest.o kvm_guest.S; objcopy -O binary -j .text kvm_guest.o kvm_guest.bin

.set TABLES, 0x8000                 # three pages for the page tables
.set LETTERS, 0xe9                  # isa-debugcon
.set END, 0xf4                      # isa-debug-exit
.set VERDICT, 0x15                  # QEMU ends with 2 * 0x15 + 1

.code16
.globl _start
_start:
    cli
    cld
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    movb $'R', %al
    outb %al, $LETTERS
    movw $TABLES, %di
    movw $0x1800, %cx               # three pages of zeros, in words
    xorw %ax, %ax
    rep stosw
    movl $TABLES + 0x1003, TABLES
    movl $TABLES + 0x2003, TABLES + 0x1000
    movl $0x83, TABLES + 0x2000     # one page of 2 MiB
    movl $TABLES, %eax
    movl %eax, %cr3
    movl $0x620, %eax               # PAE, SSE
    movl %eax, %cr4
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax                # long mode
    wrmsr
    movl $0x80000011, %eax          # paging and protection at once
    movl %eax, %cr0
    lgdtl gdt_pointer - _start + 0x7c00
    ljmpl $8, $(long_mode - _start + 0x7c00)

.code64
long_mode:
    xorl %eax, %eax
    movl %eax, %ss
    movq $0x1122334455667788, %rax
    movq %rax, %xmm0
    paddq %xmm0, %xmm0
    movq %xmm0, %rbx
    addq %rax, %rax
    cmpq %rax, %rbx
    jne hang
    movb $'L', %al
    outb %al, $LETTERS
    movb $VERDICT, %al
    outb %al, $END
hang:
    hlt
    jmp hang

.balign 8
gdt:
    .quad 0
    .quad 0x00209a0000000000        # 64-bit code
gdt_pointer:
    .word . - gdt - 1
    .long gdt - _start + 0x7c00

.org 510
.word 0xaa55
