/* SPDX-License-Identifier: AGPL-3.0-or-later */
#define _GNU_SOURCE
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ptcomm.h"

#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC (1U << 2)
#endif
#ifndef SYS_close_range
#define SYS_close_range 436
#endif

extern char **environ;

/* -- between fork and exec: nothing but async-signal-safe calls ------------ */

/* bacula-fd's sockets and files have no close-on-exec flag; a backend that kept the storage
 * daemon's connection open would hang the job that is over. */
static void close_others_on_exec(void)
{
    if (syscall(SYS_close_range, 3U, ~0U, CLOSE_RANGE_CLOEXEC) == 0)
        return;
    struct rlimit limit; /* a kernel before 5.11 */
    int top = 65536;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < 65536)
        top = (int)limit.rlim_cur;
    for (int fd = 3; fd < top; fd++)
        fcntl(fd, F_SETFD, FD_CLOEXEC);
}

/* The daemon ignores SIGPIPE and catches others; ignored signals survive an exec. */
static void reset_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = SIG_DFL;
    for (int number = 1; number < NSIG; number++)
        sigaction(number, &action, NULL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static _Noreturn void die(int report)
{
    int error = errno;
    while (write(report, &error, sizeof error) < 0 && errno == EINTR)
        ;
    _exit(127);
}

/* Become argv[0]; `in`, `out` and `report` are above 2. */
static _Noreturn void become(char *const argv[], int in, int out, int err, int report)
{
    if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(err, 2) < 0)
        die(report);
    close_others_on_exec();
    reset_signals();
    execve(argv[0], argv, environ);
    die(report);
}

/* -- in the daemon ---------------------------------------------------------- */

/* The daemon itself may run with stdio closed, so that pipe() hands out 0, 1 or 2. */
static int above_stdio(int fd)
{
    if (fd < 0 || fd > 2)
        return fd;
    int higher = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    int error = errno;
    close(fd);
    errno = error;
    return higher;
}

static int make_pipe(int ends[2])
{
    if (pipe2(ends, O_CLOEXEC) != 0) {
        ends[0] = ends[1] = -1;
        return -1;
    }
    ends[0] = above_stdio(ends[0]);
    ends[1] = above_stdio(ends[1]);
    return ends[0] < 0 || ends[1] < 0 ? -1 : 0;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/*
 * Fork and exec with all signals blocked until the child has reset them.  With `detach` a
 * middle process starts it and ends at once.  *error is 0 or why it failed.
 */
static pid_t launch(char *const argv[], int in, int out, int err, bool detach, int *error)
{
    int report[2];
    if (make_pipe(report) != 0) {
        *error = errno;
        close_fd(&report[0]);
        close_fd(&report[1]);
        return -1;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    pid_t pid = fork();
    *error = pid < 0 ? errno : 0;
    if (pid == 0) {
        if ((detach ? setsid() : setpgid(0, 0)) < 0)
            die(report[1]);
        if (detach) {
            pid_t grandchild = _Fork();
            if (grandchild < 0)
                die(report[1]);
            if (grandchild > 0)
                _exit(0);
        }
        become(argv, in, out, err, report[1]);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    close_fd(&report[1]);
    if (pid > 0) {
        int why;
        ssize_t n;
        while ((n = read(report[0], &why, sizeof why)) < 0 && errno == EINTR)
            ;
        if (n == (ssize_t)sizeof why)
            *error = why;
        if (detach || *error != 0) {
            while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
                ;
        }
    }
    close_fd(&report[0]);
    return *error == 0 ? pid : -1;
}

void child_init(struct child *child, pthread_mutex_t *lock)
{
    *child = (struct child){ .lock = lock, .to = -1, .from = -1 };
}

int child_start(struct child *child, const char *path)
{
    int in[2] = { -1, -1 }, out[2] = { -1, -1 }, error = 0;
    int null = above_stdio(open("/dev/null", O_RDWR | O_CLOEXEC));
    if (null < 0 || make_pipe(in) != 0 || make_pipe(out) != 0) {
        error = errno;
    } else {
        char *const argv[] = { (char *)path, NULL };
        pid_t pid = launch(argv, in[0], out[1], null, false, &error);
        if (error == 0) {
            pthread_mutex_lock(child->lock);
            child->pid = pid;
            pthread_mutex_unlock(child->lock);
            child->to = in[1];
            child->from = out[0];
            in[1] = out[0] = -1;
            fcntl(child->to, F_SETFL, O_NONBLOCK);
            fcntl(child->from, F_SETFL, O_NONBLOCK);
            /* Only for speed: fewer switches between the two processes. */
            fcntl(child->to, F_SETPIPE_SZ, 1 << 20);
            fcntl(child->from, F_SETPIPE_SZ, 1 << 20);
        }
    }
    close_fd(&null);
    for (int i = 0; i < 2; i++) {
        close_fd(&in[i]);
        close_fd(&out[i]);
    }
    return error;
}

/* Has it ended?  Then sweep its group if asked, and reap it.  The lock keeps child_signal from
 * hitting a process that got the number of one just reaped. */
static bool reap(struct child *child, bool sweep)
{
    siginfo_t info = { 0 };
    bool gone = true;
    pthread_mutex_lock(child->lock);
    if (child->pid > 0) {
        if (waitid(P_PID, (id_t)child->pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0) {
            gone = info.si_pid == child->pid;
            if (gone) {
                if (sweep)
                    kill(-child->pid, SIGKILL);
                waitpid(child->pid, &child->status, 0);
            }
        } else if (errno == ECHILD) {
            child->lost = true;
        } else {
            gone = false;
        }
        if (gone) {
            child->ended = true;
            child->pid = 0;
        }
    }
    pthread_mutex_unlock(child->lock);
    return gone;
}

bool child_wait(struct child *child, int timeout_ms, bool sweep)
{
    int64_t until = pt_now_ms() + timeout_ms;
    int pause_ms = 2;
    while (!reap(child, sweep)) {
        int64_t left = until - pt_now_ms();
        if (left <= 0)
            return false;
        if (pause_ms > left)
            pause_ms = (int)left;
        struct timespec pause = { 0, (long)pause_ms * 1000000 };
        nanosleep(&pause, NULL);
        if (pause_ms < 100)
            pause_ms *= 2;
    }
    return true;
}

void child_signal(struct child *child, int signal_number)
{
    pthread_mutex_lock(child->lock);
    if (child->pid > 0)
        kill(-child->pid, signal_number);
    pthread_mutex_unlock(child->lock);
}

void child_close(struct child *child)
{
    close_fd(&child->to);
    close_fd(&child->from);
}

void child_describe(const struct child *child, char *text, size_t size)
{
    if (!child->ended)
        snprintf(text, size, "still running");
    else if (child->lost)
        snprintf(text, size, "exit status unknown");
    else if (WIFSIGNALED(child->status))
        snprintf(text, size, "killed by signal %d", WTERMSIG(child->status));
    else
        snprintf(text, size, "exit status %d", WEXITSTATUS(child->status));
}

int child_detached(const char *path, const char *argument1, const char *argument2)
{
    int error;
    int null = above_stdio(open("/dev/null", O_RDWR | O_CLOEXEC));
    if (null < 0)
        return errno;
    char *const argv[] = { (char *)path, (char *)argument1, (char *)argument2, NULL };
    launch(argv, null, null, null, true, &error);
    close_fd(&null);
    return error;
}
