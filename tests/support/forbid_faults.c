/* forbid_faults.c: runs a program as in a sandbox that has no userfaultfd: both ways to one are refused with EPERM.
 *
 *     #!forbid_faults PROGRAM
 *
 * It is the interpreter of a script, of which this is the only line, and gives its arguments to the program. It is linked statically, so that what LD_PRELOAD names is loaded into the program alone. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NEW_FAULTS 0xaa00 /* USERFAULTFD_IOC_NEW, of /dev/userfaultfd */

int main(int count, char **words)
{
    struct sock_filter steps[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_userfaultfd, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ, SYS_ioctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ, NEW_FAULTS, 0, 1),
        BPF_STMT(BPF_RET, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog all = {sizeof steps / sizeof steps[0], steps};
    if (count < 3 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &all))
        return 125;
    words[2] = words[1]; /* it was the path of the script */
    execvp(words[1], words + 2);
    return 126;
}
