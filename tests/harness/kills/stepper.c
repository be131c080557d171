/* Counts the steps of a process that outlive it, and kills it at one of them.
 *
 *     stepper PID DIRECTORY LOG [before|after NUMBER]
 *
 * Traces every thread of PID (never its children) by ptrace, says "armed" on standard output once every system call is seen,
 * and writes a line into LOG for each step before it is done: its number, the thread, its name, on what. A step is a system
 * call that changes what a later process finds: names and contents made durable below DIRECTORY, a child made or signalled, a
 * command to a VMM. With a number, PID reads SIGKILL in place of that step, or as soon as it has been done. Ends with PID, or
 * lets go of it when its own standard input ends. An interposer of libc's symbols would be shorter and would miss much: rustix,
 * which renames most of the node's files, calls the kernel itself.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define THREADS 4096
#define OPTIONS (PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE)

static pid_t process;
static const char *directory;
static FILE *out;
static long kill_at, steps;
static int after;
/* Threads that were seen, and the one whose step is to be the last. */
static pid_t threads[THREADS];
static int thread_count;
static pid_t doomed;
static int killed;

static void fail(const char *doing)
{
    fprintf(stderr, "stepper: %s: %s\n", doing, strerror(errno));
    exit(2);
}

static int is_new(pid_t tid)
{
    for (int i = 0; i < thread_count; i++)
        if (threads[i] == tid) return 0;
    if (thread_count == THREADS) { errno = E2BIG; fail("keeping threads"); }
    threads[thread_count++] = tid;
    return 1;
}

static void gone(pid_t tid)
{
    for (int i = 0; i < thread_count; i++)
        if (threads[i] == tid) threads[i] = threads[--thread_count];
}

/* Up to size-1 bytes of the tracee's memory, page by page, as a text. */
static void peek(uint64_t address, char *into, size_t size)
{
    size_t got = 0;
    while (got < size - 1) {
        size_t most = 4096 - ((address + got) & 4095);
        if (most > size - 1 - got) most = size - 1 - got;
        struct iovec here = {into + got, most}, there = {(void *)(address + got), most};
        if (process_vm_readv(process, &here, 1, &there, 1, 0) != (ssize_t)most) break;
        if (memchr(into + got, 0, most)) return;
        got += most;
    }
    into[got] = 0;
}

/* The tracee's memory, if all of it can be read. */
static int copy(uint64_t address, void *into, size_t size)
{
    struct iovec here = {into, size}, there = {(void *)address, size};
    return process_vm_readv(process, &here, 1, &there, 1, 0) == (ssize_t)size;
}

static void link_of(const char *what, int number, char *into, size_t size)
{
    char name[64];
    if (number < 0) snprintf(name, sizeof name, "/proc/%d/%s", process, what);
    else snprintf(name, sizeof name, "/proc/%d/%s/%d", process, what, number);
    ssize_t length = readlink(name, into, size - 1);
    into[length < 0 ? 0 : length] = 0;
}

/* The path that a call names by a directory's descriptor and a text. */
static void path_of(int64_t dirfd, uint64_t text, char *into, size_t size)
{
    char name[2048], dir[2048];
    peek(text, name, sizeof name);
    if (name[0] == '/') { snprintf(into, size, "%s", name); return; }
    if ((int)dirfd == AT_FDCWD) link_of("cwd", -1, dir, sizeof dir);
    else link_of("fd", (int)dirfd, dir, sizeof dir);
    snprintf(into, size, "%s/%s", dir, name);
}

static int below(const char *path)
{
    size_t length = strlen(directory);
    return strncmp(path, directory, length) == 0 && (path[length] == '/' || path[length] == 0);
}

/* The name of the step that a system call is, with what it is done to in `on`; none if it is none. */
static const char *step_of(uint64_t nr, const uint64_t *a, char *on, size_t size)
{
    char one[4200], two[4200];
    one[0] = two[0] = 0;
    const char *name = NULL;
    switch (nr) {
    case SYS_rename: name = "rename"; path_of(AT_FDCWD, a[0], one, sizeof one); path_of(AT_FDCWD, a[1], two, sizeof two); break;
    case SYS_renameat: case SYS_renameat2: name = "rename"; path_of(a[0], a[1], one, sizeof one); path_of(a[2], a[3], two, sizeof two); break;
    case SYS_link: name = "link"; path_of(AT_FDCWD, a[0], one, sizeof one); path_of(AT_FDCWD, a[1], two, sizeof two); break;
    case SYS_linkat: name = "link"; path_of(a[0], a[1], one, sizeof one); path_of(a[2], a[3], two, sizeof two); break;
    case SYS_symlink: name = "symlink"; path_of(AT_FDCWD, a[1], one, sizeof one); break;
    case SYS_symlinkat: name = "symlink"; path_of(a[1], a[2], one, sizeof one); break;
    case SYS_unlink: name = "unlink"; path_of(AT_FDCWD, a[0], one, sizeof one); break;
    case SYS_unlinkat: name = "unlink"; path_of(a[0], a[1], one, sizeof one); break;
    case SYS_rmdir: name = "rmdir"; path_of(AT_FDCWD, a[0], one, sizeof one); break;
    case SYS_mkdir: name = "mkdir"; path_of(AT_FDCWD, a[0], one, sizeof one); break;
    case SYS_mkdirat: name = "mkdir"; path_of(a[0], a[1], one, sizeof one); break;
    case SYS_creat: name = "create"; path_of(AT_FDCWD, a[0], one, sizeof one); break;
    case SYS_open: if (a[1] & (O_CREAT | O_TRUNC)) { name = "create"; path_of(AT_FDCWD, a[0], one, sizeof one); } break;
    case SYS_openat: if (a[2] & (O_CREAT | O_TRUNC)) { name = "create"; path_of(a[0], a[1], one, sizeof one); } break;
    case SYS_truncate: name = "truncate"; path_of(AT_FDCWD, a[0], one, sizeof one); break;
    case SYS_fsync: name = "fsync"; link_of("fd", (int)a[0], one, sizeof one); break;
    case SYS_fdatasync: name = "fdatasync"; link_of("fd", (int)a[0], one, sizeof one); break;
    case SYS_ftruncate: name = "truncate"; link_of("fd", (int)a[0], one, sizeof one); break;
    /* A child, not a thread. */
    case SYS_fork: case SYS_vfork: snprintf(on, size, "(a child)"); return "spawn";
    case SYS_clone: if (!(a[0] & CLONE_THREAD)) { snprintf(on, size, "(a child)"); return "spawn"; } break;
    case SYS_clone3: {
        uint64_t flags;
        if (copy(a[0], &flags, sizeof flags) && !(flags & CLONE_THREAD)) { snprintf(on, size, "(a child)"); return "spawn"; }
        break;
    }
    case SYS_kill: if (a[1]) { snprintf(on, size, "(signal %d)", (int)a[1]); return "signal"; } break;
    case SYS_pidfd_send_signal: if (a[1]) { snprintf(on, size, "(signal %d)", (int)a[1]); return "signal"; } break;
    /* Commands to QEMU, but for questions, which are asked until the answer is good. */
    case SYS_sendmsg: {
        struct msghdr message;
        struct iovec first;
        char text[4096], *command;
        if (!copy(a[1], &message, sizeof message) || message.msg_iovlen < 1 || !copy((uint64_t)message.msg_iov, &first, sizeof first)) break;
        if (first.iov_len >= sizeof text || !copy((uint64_t)first.iov_base, text, first.iov_len)) break;
        text[first.iov_len] = 0;
        if (text[0] != '{' || !(command = strstr(text, "\"execute\":\""))) break;
        command += 11;
        command[strcspn(command, "\"")] = 0;
        if (strncmp(command, "query-", 6) == 0) break;
        snprintf(on, size, "%s", command);
        return "command";
    }
    }
    if (!name || !(below(one) || below(two))) return NULL;
    snprintf(on, size, "%s%s%s", one, two[0] ? " -> " : "", two);
    return name;
}

static void end_it(void)
{
    killed = 1;
    if (kill(process, SIGKILL)) fail("killing the process");
}

/* Looks at a system call that begins or has ended. */
static void look(pid_t tid)
{
    struct __ptrace_syscall_info info;
    if (ptrace(PTRACE_GET_SYSCALL_INFO, tid, sizeof info, &info) <= 0) return;
    if (info.op == PTRACE_SYSCALL_INFO_EXIT) {
        if (tid == doomed) end_it();
        return;
    }
    if (info.op != PTRACE_SYSCALL_INFO_ENTRY || killed || doomed) return;
    char on[8600];
    const char *name = step_of(info.entry.nr, (const uint64_t *)info.entry.args, on, sizeof on);
    if (!name) return;
    steps++;
    fprintf(out, "%ld\t%d\t%s\t%s\n", steps, tid, name, on);
    fflush(out);
    if (steps != kill_at) return;
    if (after) { doomed = tid; return; }
    /* The call is taken away first, so that it cannot be done whatever comes first. */
    ptrace(PTRACE_POKEUSER, tid, 15 * 8 /* orig_rax */, -1L);
    end_it();
}

static void seize_all(void)
{
    char name[64];
    snprintf(name, sizeof name, "/proc/%d/task", process);
    for (int found = 1; found;) {
        found = 0;
        DIR *dir = opendir(name);
        if (!dir) fail("listing threads");
        for (struct dirent *entry; (entry = readdir(dir));) {
            pid_t tid = atoi(entry->d_name);
            if (tid <= 0) continue;
            int known = 0;
            for (int i = 0; i < thread_count; i++) known |= threads[i] == tid;
            if (known) continue;
            if (ptrace(PTRACE_SEIZE, tid, 0, OPTIONS)) {
                if (errno == ESRCH) continue;
                /* One that a seized thread has made a moment ago is seized already. */
                if (errno != EPERM) fail("seizing a thread");
            } else if (ptrace(PTRACE_INTERRUPT, tid, 0, 0) && errno != ESRCH) fail("stopping a thread");
            is_new(tid);
            found = 1;
        }
        closedir(dir);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4 && argc != 6) {
        fprintf(stderr, "usage: stepper PID DIRECTORY LOG [before|after NUMBER]\n");
        return 2;
    }
    process = atoi(argv[1]);
    directory = argv[2];
    if (!(out = fopen(argv[3], "w"))) fail("opening the log");
    if (argc == 6) {
        after = strcmp(argv[4], "after") == 0;
        kill_at = atol(argv[5]);
    }
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    int changes = signalfd(-1, &children, SFD_CLOEXEC);
    if (changes < 0) fail("signalfd");
    seize_all();
    int unseen = thread_count;
    for (;;) {
        int status;
        pid_t tid = waitpid(-1, &status, __WALL | WNOHANG);
        if (tid < 0) {
            if (errno == ECHILD) break;
            fail("waiting");
        }
        if (tid == 0) {
            struct pollfd ready[2] = {{changes, POLLIN, 0}, {0, POLLIN, 0}};
            if (poll(ready, 2, -1) < 0 && errno != EINTR) fail("polling");
            char drained[sizeof(struct signalfd_siginfo) * 8];
            if (ready[0].revents && read(changes, drained, sizeof drained) < 0) fail("reading signals");
            if (ready[1].revents) {
                char byte;
                /* The tracees go on by themselves once this process is gone. */
                if (read(0, &byte, 1) <= 0) return 0;
            }
            continue;
        }
        if (WIFEXITED(status) || WIFSIGNALED(status)) {
            gone(tid);
            if (tid == process) break;
            continue;
        }
        if (!WIFSTOPPED(status)) continue;
        is_new(tid);
        int signal = WSTOPSIG(status), event = status >> 16, pass = 0;
        if (signal == (SIGTRAP | 0x80)) look(tid);
        else if (event == 0) pass = signal;
        if (ptrace(PTRACE_SYSCALL, tid, 0, pass) && errno != ESRCH) fail("letting a thread go on");
        if (unseen && event == PTRACE_EVENT_STOP && --unseen == 0) {
            puts("armed");
            fflush(stdout);
        }
    }
    return 0;
}
