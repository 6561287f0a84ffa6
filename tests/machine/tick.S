/* tick.S: a whole guest in a boot sector, for tests that need a machine and no operating system.
 *
 * Each tick it counts, fills a page of its memory with the count, writes the count to the second sector of its disk, and says
 * "tick NNNNNNNN" on its serial port; before that it looks whether page and sector hold the count of the tick before, and says
 * "wrong" where they do not. It powers off when its power button is pressed. With SLEEPS_AT, it sleeps (S3) behind that tick. */
    .code16
    .globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    movb %dl, drive
    sti
    movw $0x602, %dx            /* PM1 enable: notice the power button */
    movw $0x100, %ax
    outw %ax, %dx
    xorl %ebp, %ebp             /* the count is in a register: it is part of the state of the CPU alone */
    movl %ebp, 0x9000
    jmp count
again:
    cmpl %ebp, 0x9000
    jne wrong
    movw $0xa000, packet_buffer
    movb $0x42, %ah
    call disk
    cmpl %ebp, 0xa000
    jne wrong
count:
    incl %ebp
    movl %ebp, %eax
    movw $0x9000, %di
    movw $1024, %cx
    rep stosl
    movw $0x9000, packet_buffer
    movw $0x4300, %ax
    call disk
    movw $tick, %si
    call say
    movl %ebp, %ebx
    movw $8, %cx
digit:
    roll $4, %ebx
    movb %bl, %al
    andb $15, %al
    addb $'0', %al
    cmpb $'9', %al
    jbe put_digit
    addb $39, %al
put_digit:
    call put
    loop digit
    movb $10, %al
    call put
    .ifdef SLEEPS_AT
    cmpl $SLEEPS_AT, %ebp
    jne awake
    movw $0x604, %dx
    movw $0x2400, %ax
    outw %ax, %dx
awake:
    .endif
    movw $0x600, %dx            /* PM1 status */
    inw %dx, %ax
    testw $0x100, %ax
    jnz power_off
    movb $0x86, %ah             /* wait 20 ms */
    xorw %cx, %cx
    movw $20000, %dx
    int $0x15
    jmp again
wrong:
    movw $wrong_text, %si
    call say
    jmp count
power_off:
    movw $off_text, %si
    call say
    movw $0x604, %dx
    movw $0x2000, %ax
    outw %ax, %dx
halt:
    hlt
    jmp halt
say:
    lodsb
    orb %al, %al
    jz said
    call put
    jmp say
said:
    ret
put:                            /* one byte to the serial port */
    pushw %ax
put_wait:
    movw $0x3fd, %dx
    inb %dx, %al
    testb $0x20, %al
    jz put_wait
    popw %ax
    movw $0x3f8, %dx
    outb %al, %dx
    ret
disk:
    movw $packet, %si
    movb drive, %dl
    int $0x13
    jnc said
    movw $disk_text, %si
    jmp say
tick:
    .asciz "tick "
wrong_text:
    .asciz "wrong\n"
disk_text:
    .asciz "disk failed\n"
off_text:
    .asciz "off\n"
drive:
    .byte 0
    .balign 4
packet:
    .byte 16, 0
    .word 1
packet_buffer:
    .word 0x9000, 0
    .quad 1
    .org 510
    .word 0xaa55
