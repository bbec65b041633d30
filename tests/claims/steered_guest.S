# A guest of 512 bytes that writes what the test wants to be written.
#
# It sweeps over 96 pages as the guest of tests/e2e does, and takes letters from its first serial port:
#   f  from now on sweep over few pages only, the first 4
#   a  from now on sweep over all 96
#   w  write the quiet page, once

.set FIRST_SEGMENT, 0x2000          # address 0x20000
.set FEW_SEGMENT, 0x2400
.set END_SEGMENT, 0x8000            # address 0x80000
.set QUIET_SEGMENT, 0x9800          # address 0x98000, which the firmware does not touch
.set SEGMENTS_PER_PAGE, 0x100
.set SERIAL_DATA, 0x3f8
.set SERIAL_STATUS, 0x3fd
.set BYTE_IS_THERE, 1

.code16
.globl _start
_start:
    cli
    movl $1, %ebx
    movw $END_SEGMENT, %bp
sweep:
    movw $SERIAL_STATUS, %dx
    inb %dx, %al
    testb $BYTE_IS_THERE, %al
    jz write
    movw $SERIAL_DATA, %dx
    inb %dx, %al
    cmpb $'f', %al
    jne not_few
    movw $FEW_SEGMENT, %bp
not_few:
    cmpb $'a', %al
    jne not_all
    movw $END_SEGMENT, %bp
not_all:
    cmpb $'w', %al
    jne write
    movw $QUIET_SEGMENT, %ax
    movw %ax, %ds
    movl %ebx, 0
    movl %ebx, 0xffc
write:
    movw $FIRST_SEGMENT, %ax
page:
    movw %ax, %ds
    movl %ebx, 0
    movl %ebx, 0xffc
    addw $SEGMENTS_PER_PAGE, %ax
    cmpw %bp, %ax
    jb page
    incl %ebx
    jmp sweep

.org 510
.word 0xaa55
