# A guest of 512 bytes: it writes 96 pages over and over, and any loss shows.
#
# In sweep N it stores N at the begin and at the end of each page, in order. At any moment the pages read
# N ... N, N-1 ... N-1, and at most one of them differs between its begin and its end. A page that was lost
# or torn on the way to another host breaks that rule for good or for a sweep.
#
# Assembled with CALM it rests after each sweep until the next tick of its clock, 18 times a second, so that
# many of them share a machine.

.set FIRST_SEGMENT, 0x2000          # address 0x20000
.set END_SEGMENT, 0x8000            # address 0x80000: 96 pages
.set SEGMENTS_PER_PAGE, 0x100

.code16
.globl _start
_start:
    cli
    movl $0x2607, %ecx              # hide the text cursor, so that two pictures of the screen are equal
    movb $1, %ah
    int $0x10
    movl $1, %ebx
sweep:
    movw $FIRST_SEGMENT, %ax
page:
    movw %ax, %ds
    movl %ebx, 0
    movl %ebx, 0xffc
    addw $SEGMENTS_PER_PAGE, %ax
    cmpw $END_SEGMENT, %ax
    jb page
    incl %ebx
#ifdef CALM
    sti
    hlt
    cli
#endif
    jmp sweep

.org 510
.word 0xaa55
